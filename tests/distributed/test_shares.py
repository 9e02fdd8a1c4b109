"""A rank's part of a batch: together they are the batch, and their weighted means are its mean."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hypermask_fast as hmf


@given(ranks=st.integers(1, 40), samples=st.integers(0, 300))
def test_shares_are_the_batch(ranks, samples):
    shares = [hmf.distributed.share(samples, rank, ranks, least=0) for rank in range(ranks)]
    values = torch.arange(samples, dtype=torch.float64)
    parts = [values[rows] for rows, _ in shares]
    assert torch.equal(torch.cat(parts), values)
    sizes = [len(part) for part in parts]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] - sizes[-1] <= 1
    if samples:
        mean = sum(weight * part.mean() for (_, weight), part in zip(shares, parts, strict=True) if len(part)) / ranks
        torch.testing.assert_close(mean, values.mean(), rtol=1e-12, atol=0)


def test_shares_of_32_samples_in_3_ranks():
    assert [hmf.distributed.share(32, rank, 3) for rank in range(3)] == [
        (slice(0, 11), 33 / 32),
        (slice(11, 22), 33 / 32),
        (slice(22, 32), 30 / 32),
    ]


def test_one_process_takes_the_whole_batch():
    assert hmf.distributed.share(32) == (slice(0, 32), 1.0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((2, 0, 3), "a batch of 2 is too small for 3 ranks, each of which needs 1 or more"),
        ((32, 3, 3), "there is no rank 3 of 3"),
        ((32, -1, 3), "there is no rank -1 of 3"),
    ],
)
def test_what_can_be_no_share_is_refused(arguments, said):
    with pytest.raises(hmf.InputError, match=said):
        hmf.distributed.share(*arguments)
