"""The extension's passes over the dense output layer on both sides of the number of tasks, and of the width, at which
they change to larger blocks: the definition in float64, and the same bits wherever bits matter."""

import pytest
import torch
from support.backends import CPU, on
from support.comparing import INF, NAN
from support.dense import MANY, dense_problem
from support.tolerances import assert_close

from hypermask_fast.ops import reference

ONE, LR = torch.tensor(3.0), torch.tensor(1e-3)
of_many = pytest.mark.parametrize(("rows", "width", "tasks"), MANY)


def double(tensors):
    return [t.double() for t in tensors]


def assert_all(names, found, expected):
    for name, x, y in zip(names, found, expected, strict=True):
        assert_close(x, y, "dense", name)


@on(*CPU)
@of_many
def test_the_step_matches_the_definition(backend, rows, width, tasks):
    weight, bias, hidden, targets, moments = dense_problem(rows, width, tasks - 1)
    rest, state = [hidden, torch.randn(rows), targets, torch.tensor(0.02)], [weight, bias, *moments]
    exact = double(state)
    expected = reference.hypernet_adam(*double(rest), *exact, ONE.double(), LR.double())
    found = backend.hypernet_adam(*rest, *state, ONE, LR)
    names = "hidden's gradient", "drift", "weight", "bias", "weight_m", "weight_v", "bias_m", "bias_v"
    assert_all(names, [*found, *state], [*expected, *exact])


@on(*CPU)
@of_many
def test_the_drift_and_its_gradients_match_the_definition(backend, rows, width, tasks):
    weight, bias, hidden, targets, _ = dense_problem(rows, width, tasks)
    leaves = [hidden[:tasks, None].contiguous(), weight, bias]

    def results(module, leaves, targets):
        leaves = [leaf.requires_grad_() for leaf in leaves]
        value = module.output_drift(*leaves, targets)
        return [value.detach(), *torch.autograd.grad(0.1 * value, leaves)]

    names = "drift", "hidden's gradient", "weight's", "bias's"
    assert_all(names, results(backend, leaves, targets), results(reference, double(leaves), targets.double()))


@on(*CPU)
@of_many
def test_the_passes_over_kept_factors_match_the_definition(backend, rows, width, tasks):
    weight, bias, hidden, targets, moments = dense_problem(rows, width, tasks - 1)
    factors, scales = torch.randn(tasks, rows), 0.1 * torch.randn(tasks)
    for args, name in (
        ((hidden, weight, bias, targets), "output_residuals"),
        ((factors, scales, weight), "hidden_gradient"),
    ):
        found, expected = getattr(backend, name)(*args), getattr(reference, name)(*double(args))
        assert_all(("first", "second"), found, expected)
    state, tail = [weight, *moments[:2]], (0.8, 0.99, 1e-6, 0.1, True, False)
    exact = double(state)
    reference.factored_adam(*double((factors, scales, hidden)), *exact, ONE.double(), LR.double(), *tail)
    backend.factored_adam(factors, scales, hidden, *state, ONE, LR, *tail)
    assert_all(("weight", "weight_m", "weight_v"), state, exact)


@on(*CPU)
@of_many
def test_a_tasks_logits_are_the_same_bits_beside_any_number_of_others(backend, rows, width, tasks):
    """So that a task begins with a drift of exactly 0, over all earlier tasks and over a few that were drawn."""
    weight, bias, hidden, _, moments = dense_problem(rows, width, tasks - 1)
    alone = torch.cat([backend.hypernet_logits(h[None, None], weight, bias, rows) for h in hidden])
    together = backend.hypernet_logits(
        hidden[:32, None].contiguous(), weight, bias, rows
    )  # of more by PyTorch's product
    assert torch.equal(together, alone[:32])
    residuals, drift = backend.output_residuals(hidden, weight, bias, alone[:-1].contiguous())
    assert drift == 0 and not residuals[:-1].any() and torch.equal(residuals[-1], alone[-1])
    assert backend.output_drift(hidden[:, None].contiguous(), weight, bias, alone) == 0
    state = [weight.clone(), bias, *(torch.zeros_like(m) for m in moments)]
    rest = hidden, torch.zeros(rows), alone[:-1].contiguous(), torch.tensor(1.0)
    grad_hidden, drift = backend.hypernet_adam(*rest, *state, ONE, LR)
    assert drift == 0 and not grad_hidden.any() and torch.equal(state[0], weight)


@on(*CPU)
@pytest.mark.parametrize(("rows", "width", "tasks"), [(8311, 25, 17), (4211, 100, 40), (81, 17, 16)])
def test_the_same_bits_from_any_number_of_threads(backend, rows, width, tasks):
    weight, bias, hidden, targets, moments = dense_problem(rows, width, tasks - 1)
    rest = hidden, torch.randn(rows), targets, torch.tensor(0.02)

    def results(threads):
        torch.set_num_threads(threads)
        state = [t.clone() for t in (weight, bias, *moments)]
        return [*backend.hypernet_adam(*rest, *state, ONE, LR), *state]

    before = torch.get_num_threads()
    try:
        expected = results(1)
        for threads in (1, 2, 3):
            assert all(torch.equal(x, y) for x, y in zip(results(threads), expected, strict=True)), threads
    finally:
        torch.set_num_threads(before)


@on(*CPU)
@pytest.mark.parametrize("bad", [NAN, INF])
def test_nan_and_inf_stay_where_they_belong(backend, bad):
    """In a gradient of logits: its own row, and the current task's hidden gradient; in a hidden vector: its task."""
    weight, bias, hidden, targets, moments = dense_problem(131, 25, 19)
    rest, state = [hidden, torch.randn(131), targets, torch.tensor(0.02)], [weight, bias, *moments]
    rest[1][37] = bad
    before = [t.clone() for t in state]
    grad_hidden, drift = backend.hypernet_adam(*rest, *state, ONE, LR)
    assert not grad_hidden[-1].isfinite().any() and grad_hidden[:-1].isfinite().all() and drift.isfinite()
    for x in state:
        assert not x[37].isfinite().all() and x.isfinite().sum() >= x.numel() - x[37].numel()
    rest[0], state = hidden.clone(), before
    rest[0][5, 3] = bad
    exact = double(state)
    expected = reference.hypernet_adam(*double(rest), *exact, ONE.double(), LR.double())
    found = backend.hypernet_adam(*rest, *state, ONE, LR)
    for x, y in zip([*found, *state], [*expected, *exact], strict=True):
        assert torch.equal(x.isfinite(), y.isfinite())
