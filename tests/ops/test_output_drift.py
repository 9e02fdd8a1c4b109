"""output_drift: R = sum over earlier tasks of |h W^T + b - target|^2."""

import pytest
import torch
from support.backends import CPU, NATIVE, on, operators_of
from support.comparing import check
from support.dense import SIZES, dense_problem
from support.refusals import assert_refused, each_change, whoever_is_asked
from torch.autograd import gradcheck

from hypermask_fast.ops import reference

each_backend = on(*NATIVE, "cuda")


def logits_of(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("chunks", "rows", "size"), [(1, 10, 10), (3, 4, 10), (2, 5, 10)])
def test_output_drift_definition_by_hand(chunks, rows, size):
    hidden, weight, bias = logits_of(2, chunks, 3), logits_of(rows, 3, seed=1), logits_of(rows, seed=2)
    by_hand = torch.stack([torch.cat([weight @ h + bias for h in task])[:size] for task in hidden])
    targets = logits_of(2, size, seed=3)
    torch.testing.assert_close(reference.output_drift(hidden, weight, bias, targets), ((by_hand - targets) ** 2).sum())
    inputs = tuple(t.requires_grad_() for t in (hidden, weight, bias))
    assert gradcheck(lambda h, w, b: reference.output_drift(h, w, b, targets), inputs)


def test_output_drift_definition_without_earlier_tasks():
    assert reference.output_drift(torch.empty(0, 1, 3), torch.ones(5, 3), torch.ones(5), torch.empty(0, 5)) == 0
    assert reference.output_drift(torch.empty(0, 1, 4), torch.randn(3, 4), torch.randn(3), torch.empty(0, 3)) == 0


@each_backend
@pytest.mark.parametrize(("shape", "tasks"), SIZES)
def test_output_drift_matches_the_definition(backend, shape, tasks):
    weight, bias, hidden, targets, _ = dense_problem(*shape, tasks)
    leaves = [hidden[:tasks, None].contiguous(), weight, bias]
    check(
        backend, lambda module, *leaves: module.output_drift(*leaves, targets.to(leaves[0])), leaves, "dense", "dense"
    )


@on(*CPU, "cuda")
def test_output_drift_of_nothing(backend):
    def drift(*tensors):
        return backend.output_drift(*(t.to(backend.device) for t in tensors)).item()

    hidden, weight, bias = torch.empty(0, 1, 4), torch.randn(3, 4), torch.randn(3)
    assert drift(hidden, weight, bias, torch.empty(0, 3)) == 0
    assert drift(torch.randn(2, 1, 4), torch.empty(0, 4), torch.empty(0), torch.empty(2, 0)) == 0


@operators_of("emulated")
@pytest.mark.parametrize("rows, width", [(203, 100), (201, 25)])
def test_output_drift_of_a_task_does_not_depend_on_the_other_tasks(operators, rows, width):
    """To the bit, in the forward and the backward pass: a task begins with a drift of exactly 0."""
    weight, bias, hidden, _, _ = dense_problem(rows, width, 20)
    logits = torch.stack([operators.hypernet_logits(h, weight, bias) for h in hidden])
    chunks, nothing = hidden[:, None].contiguous(), torch.zeros(21, rows)
    for tasks in (1, 5, 21):
        targets = logits[:tasks].contiguous()
        assert operators.output_drift(chunks[:tasks].contiguous(), weight, bias, targets) == 0
    *_, grad_bias = operators.output_drift_backward(torch.tensor(0.5), chunks[:1], weight, bias, nothing[:1])
    assert torch.equal(grad_bias, logits[0])


# Bad input

does_not_fit = each_change(
    ({"targets": torch.ones(1, 50)}, "targets must have shape (3, 50), not (1, 50)"),
    ({"targets": torch.ones(3, 51)}, "targets must be (T, N) with N at most 50, not (3, 51)"),
    ({"targets": torch.ones(150)}, "targets must be (T, N), not (150,)"),
    ({"bias": torch.ones(49)}, "bias must have shape (50,), not (49,)"),
)


@whoever_is_asked
@does_not_fit
def test_output_drift_refuses_what_does_not_fit(asked, change, message):
    assert_refused("output_drift", asked, change, message)
