"""mask_thresholds and kept_rank. Selection is exact on every backend: each comparison is of equal bits."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.arguments import valid
from support.backends import CPU, on, operators_of
from support.comparing import INF, NAN, sized_offsets
from support.refusals import assert_refused, each_change, whoever_is_asked
from torch._dynamo.utils import counters

from hypermask_fast import InputError, ops
from hypermask_fast.ops import kept_rank, reference

each_backend = on(*CPU, "emulated", "cuda")


def logits_of(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# The definition


@given(
    size=st.sampled_from([1, 2, 3, 10, 63, 101, 1000]),
    sparsity=st.integers(0, 1000).map(lambda tenths: tenths / 10),
    seed=st.integers(0, 5),
)
def test_mask_thresholds_definition_keeps_what_the_percentile_keeps(size, sparsity, seed):
    """|tanh a| >= numpy's percentile, the method's wording, keeps what rank selection by |a| keeps."""
    logits = logits_of(size, seed=seed)
    mask = logits.tanh().abs()
    ranks = torch.tensor([kept_rank(sparsity, size)])
    ours = reference.semi_binary_mask(logits, reference.mask_thresholds(logits, [0, size], ranks)[0])
    threshold = np.percentile(mask.numpy(), sparsity)
    # Where rounding puts the position within an ulp of a rank, both neighbours are right.
    if abs(sparsity * (size - 1) / 100 - round(sparsity * (size - 1) / 100)) < 1e-9:
        threshold -= 1e-12
    assert torch.equal(ours, torch.where(mask >= threshold, mask, 0.0))


@pytest.mark.parametrize(("sparsity", "kept"), [(0, 11), (30, 8), (50, 6), (99, 1), (100, 1)])
def test_kept_rank_gives_the_number_kept(sparsity, kept):
    logits = logits_of(11)
    ranks = torch.tensor([kept_rank(sparsity, 11)])
    mask = reference.semi_binary_mask(logits, reference.mask_thresholds(logits, [0, 11], ranks)[0])
    assert (mask > 0).sum() == kept


@pytest.mark.parametrize("sparsity", [-1, 100.1, math.nan, math.inf, "30", None, True])
def test_kept_rank_refuses_a_sparsity_outside_of_0_to_100(sparsity):
    with pytest.raises(InputError, match="percentage from 0 to 100"):
        kept_rank(sparsity, 10)


def test_mask_thresholds_definition_is_per_segment_and_row():
    logits = logits_of(2, 10)
    thresholds = reference.mask_thresholds(logits, [0, 4, 4, 10], torch.tensor([1, 0, 3]))
    assert thresholds.shape == (2, 3)
    for row in range(2):
        assert thresholds[row, 0] == logits[row, :4].abs().sort().values[1]
        assert thresholds[row, 1] == 0
        assert thresholds[row, 2] == logits[row, 4:].abs().sort().values[3]


def test_mask_thresholds_definition_ranks_nan_above_inf():
    logits = torch.tensor([0.1, math.nan, -math.inf, 2.0])
    thresholds = [reference.mask_thresholds(logits, [0, 4], torch.tensor([rank]))[0] for rank in (1, 2, 3)]
    assert thresholds[:2] == [2.0, math.inf]
    assert thresholds[2].isnan()
    mask = reference.semi_binary_mask(logits, thresholds[1])
    assert mask[1].isnan() and mask[2] == 1 and mask[0] == 0 and mask[3] == 0


def test_mask_thresholds_definition_is_one_graph_for_all_ranks():
    """Ranks are values that only the running graph knows: one graph for all of them, and the same thresholds."""
    compiled = torch.compile(reference.mask_thresholds, fullgraph=True, backend="eager")
    logits = logits_of(2, 10)
    logits[0, :3] = torch.tensor([math.nan, -math.inf, 0.0])
    counters.clear()
    for ranks in ([1, 0, 3], [3, 0, 0], [2, 0, 5]):
        given = logits, [0, 4, 4, 10], torch.tensor(ranks)
        torch.testing.assert_close(compiled(*given), reference.mask_thresholds(*given), rtol=0, atol=0, equal_nan=True)
    assert counters["stats"]["unique_graphs"] == 1


# Every backend


def check(backend, logits, offsets, ranks):
    ranks = torch.as_tensor(ranks)
    actual = backend.mask_thresholds(logits.to(backend.device), offsets, ranks.to(backend.device)).cpu()
    expected = reference.mask_thresholds(logits, offsets, ranks)
    assert actual.shape == expected.shape
    assert torch.equal(actual.nan_to_num(nan=-1.0), expected.nan_to_num(nan=-1.0))


SIZES = [1, 2, 63, 255, 256, 257, 1000, 4096, 4097, 7919, 12_300, 20_011, 32_768, 32_769, 200_003]


@each_backend
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("sparsity", [0, 0.1, 30, 50, 99.9, 100])
def test_mask_thresholds_of_every_size_and_percentile(backend, size, sparsity):
    check(backend, torch.randn(size), [0, size], [kept_rank(sparsity, size)])


@each_backend
@pytest.mark.parametrize("size", [1, 2, 200, 255, 1000, 4096, 4097, 5000, 12_300, 20_011, 100_000])
def test_mask_thresholds_of_ties_and_narrow_ranges(backend, size):
    for logits in (
        torch.randint(-3, 4, (size,)).float(),
        torch.full((size,), -0.75),
        1 + 1e-6 * torch.rand(size),
        torch.randn(size) * 1e-41,
        torch.tensor([NAN, -INF, 0.5]).repeat(size // 3 + 1)[:size] * torch.randn(size),
    ):
        for rank in (size // 3, size // 2, size - 1):
            check(backend, logits, [0, size], [rank])


@each_backend
@pytest.mark.parametrize("size", [50, 1000, 70_000])
def test_mask_thresholds_rank_nan_and_inf_above(backend, size):
    logits = torch.randn(size)
    logits[::7] = NAN
    logits[1::7] = -INF
    nans = logits.isnan().sum().item()
    for rank in (size // 2, size - nans - 1, size - nans, size - 1):
        check(backend, logits, [0, size], [rank])


@each_backend
def test_mask_thresholds_of_segments_of_very_different_sizes(backend):
    sizes = [1, 40_000, 0, 7, 300, 0, 70_001, 1]
    offsets = sized_offsets(sizes, 3)
    ranks = [kept_rank(40, size) for size in sizes]
    check(backend, torch.randn(2, 3, offsets[-1] + 5), offsets, ranks)
    check(backend, torch.randn(offsets[-1] + 5, 2).t(), offsets, ranks)  # not contiguous
    check(backend, torch.randn(0, offsets[-1]), offsets, ranks)


@each_backend
@pytest.mark.parametrize("count", [1, 63, 64, 65, 130])
def test_mask_thresholds_of_many_segments_and_rows(backend, count):
    sizes = [(7 * i) % 23 * (i % 5 != 0) for i in range(count)]
    sizes[count // 2] = 9000
    offsets = sized_offsets(sizes, 3)
    ranks = [kept_rank(40, size) for size in sizes]
    check(backend, torch.randn(2, offsets[-1] + 5), offsets, ranks)
    check(backend, torch.randn(3, 1, offsets[-1]), offsets, [0] * count)
    check(backend, torch.randn(0, offsets[-1]), offsets, ranks)


@each_backend
def test_mask_thresholds_of_nothing(backend):
    check(backend, torch.empty(0), [0, 0], [0])
    check(backend, torch.empty(3, 0), [0, 0, 0], [0, 0])
    check(backend, torch.empty(0, 5), [0, 5], [2])


@each_backend
def test_mask_thresholds_let_no_gradient_flow(backend):
    logits = torch.randn(100, device=backend.device, requires_grad=True)
    assert not backend.mask_thresholds(logits, [0, 100], torch.tensor([30], device=backend.device)).requires_grad


@on("emulated", "cuda")
def test_mask_thresholds_of_a_rank_that_does_not_exist_are_nan_on_a_gpu(backend):
    """The CPU raises; a GPU is not waited for."""
    logits, ranks = torch.randn(30, device=backend.device), torch.tensor([-1, 10, 9, 1, 0], device=backend.device)
    thresholds = backend.mask_thresholds(logits, [0, 10, 20, 30, 30, 30], ranks)
    assert thresholds.isnan().tolist() == [True, True, False, True, False] and thresholds[4] == 0


@operators_of(*CPU)
def test_mask_thresholds_operator_of_the_cpu_refuses_a_rank_that_does_not_exist(operators):
    for ranks, segment in (([1, 5, 0], 1), ([-1, 0, 0], 0)):
        with pytest.raises(RuntimeError, match=f"outside segment {segment}"):
            operators.mask_thresholds(torch.randn(18), [0, 12, 17, 18], torch.tensor(ranks))


# Bad input

does_not_fit = each_change(
    *(
        ({"offsets": borders}, f"offsets must ascend from 0 or more to at most 18 entries, not {borders}")
        for borders in ([0, 12, 17, 19], [0, 17, 12, 18], [-1, 12, 17, 18], [])
    ),
    ({"ranks": torch.tensor([1])}, "ranks must have shape (3,), not (1,)"),
    ({"ranks": torch.zeros(3).int()}, "logits must be (..., N) and ranks int64, not (18,) and torch.int32"),
    ({"logits": torch.ones(())}, "logits must be (..., N) and ranks int64, not () and torch.int64"),
)


@whoever_is_asked
@does_not_fit
def test_mask_thresholds_refuse_what_does_not_fit(asked, change, message):
    assert_refused("mask_thresholds", asked, change, message)


@pytest.mark.parametrize("asked", [None, "reference", "cpu"])
@each_change(
    ({"ranks": torch.tensor([-1, 0, 0])}, "rank -1 is outside segment 0 of 12 entries"),
    ({"ranks": torch.tensor([1, 5, 0])}, "rank 5 is outside segment 1 of 5 entries"),
)
def test_mask_thresholds_on_the_cpu_refuse_a_rank_that_does_not_exist(asked, change, message):
    """A GPU is not waited for: it gives NaN."""
    with pytest.raises(InputError) as caught:
        ops.mask_thresholds(**valid("mask_thresholds") | change, backend=asked)
    assert str(caught.value) == message
