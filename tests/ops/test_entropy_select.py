"""entropy_select: the task whose softmax has the lowest entropy, for every row."""

import math

import pytest
import torch
from support.comparing import DEVICE, DTYPES, launches, randn
from support.refusals import assert_kernel_refuses, assert_refused, each_change, whoever_is_asked

from hypermask_fast.ops import reference


def test_entropy_select_definition_by_hand():
    certain, unsure = torch.tensor([50.0, 0.0, -50.0]), torch.zeros(3)
    logits = torch.stack([torch.stack([unsure, certain, unsure]), torch.stack([certain, unsure, unsure])])
    assert reference.entropy_select(logits).tolist() == [1, 0, 0]
    extreme = torch.tensor([[[math.inf, 0.0]], [[-math.inf, 0.0]], [[1.0, 0.9]]])  # NaN, certain, unsure
    assert reference.entropy_select(extreme).tolist() == [1]
    p = torch.randn(3, 7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).softmax(-1)
    expected = -(p * p.log()).sum(-1)
    assert torch.equal(reference.entropy_select(p.log()), expected.argmin(0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 70, 10), (2, 5, 3000), (4, 0, 3)])
def test_entropy_select_by_triton_chooses_the_same_task(triton, shape, dtype):
    logits = 3 * randn(*shape, dtype=dtype)
    chosen, expected = triton.entropy_select(logits), reference.entropy_select(logits.double())
    assert chosen.dtype == torch.int64
    assert torch.equal(chosen, expected)
    assert torch.equal(triton.entropy_select(logits.transpose(0, 2).contiguous().transpose(0, 2)), expected)


def test_entropy_select_by_triton_of_ties_infinities_and_nan(triton):
    rows = torch.randn(4, 1, 6, device=DEVICE).repeat(1, 6, 1)
    rows[2] = rows[1]  # equal tasks: the lower index
    rows[1:3, 0] *= 50
    rows[0, 1, 3] = -torch.inf  # a class ruled out: 0 log 0 = 0
    rows[0, 2] = torch.tensor([0.0] + [-torch.inf] * 5)  # entropy 0
    rows[0, 3] = torch.nan  # counts as infinite
    rows[:, 4] = torch.nan
    rows[0, 5] = torch.inf
    chosen = triton.entropy_select(rows)
    assert torch.equal(chosen, reference.entropy_select(rows.double()))
    assert chosen[0] == 1 and chosen[2] == 0 and chosen[4] == 0


def test_entropy_select_by_triton_launches_one_kernel(triton):
    with launches() as launched:
        triton.entropy_select(randn(3, 40, 5))
    assert launched == ["_entropy_select"]


# Bad input

does_not_fit = each_change(
    *(
        (
            {"logits": torch.ones(shape)},
            f"logits must be float (T, batch, classes) with T of 1 or more and a class, not torch.float32 {shape}",
        )
        for shape in [(4, 5), (0, 4, 5), (2, 3, 0)]
    ),
)


@whoever_is_asked
@does_not_fit
def test_entropy_select_refuses_what_does_not_fit(asked, change, message):
    assert_refused("entropy_select", asked, change, message)


@does_not_fit
def test_entropy_select_by_triton_called_directly_refuses_in_the_same_words(triton, change, message):
    assert_kernel_refuses(triton, "entropy_select", change, message)


@whoever_is_asked
def test_entropy_select_refuses_integers(asked):
    wanted = "float (T, batch, classes) with T of 1 or more and a class"
    message = f"logits must be {wanted}, not torch.int64 (2, 3, 4)"
    assert_refused("entropy_select", asked, {"logits": torch.ones(2, 3, 4).long()}, message)
