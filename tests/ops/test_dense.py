"""output_drift, hypernet_logits, hypernet_adam and chunked_output_drift against the float64 reference."""

import pytest
import torch
from tolerances import assert_close

from hypermask_fast import ops
from hypermask_fast.ops import reference

SHAPES = [(1, 1), (63, 7), (1000, 100), (997, 25), (4133, 33), (129, 200), (40, 257)]


def problem(rows, width, tasks):
    """A layer, hidden vectors of tasks + 1 tasks, targets of the earlier ones, moments."""
    weight, bias = torch.randn(rows, width) * 0.1, torch.randn(rows) * 0.1
    hidden, targets = torch.randn(tasks + 1, width), torch.randn(tasks, rows)
    moments = [0.01 * torch.randn(rows, width), 1e-4 * torch.rand(rows, width), torch.randn(rows), torch.rand(rows)]
    return weight, bias, hidden, targets, moments


@pytest.mark.native
@pytest.mark.parametrize("rows, width", SHAPES)
@pytest.mark.parametrize("tasks", [0, 1, 3, 6])
def test_output_drift(cpu, isa, rows, width, tasks):
    weight, bias, hidden, targets, _ = problem(rows, width, tasks)
    leaves = [x.requires_grad_() for x in (hidden[:tasks, None].clone(), weight, bias)]
    leaves64 = [x.detach().double().requires_grad_() for x in leaves]
    (cpu.output_drift(*leaves, targets) * 0.3).backward()
    value = cpu.output_drift(*leaves, targets)
    expected = reference.output_drift(*leaves64, targets.double())
    (expected * 0.3).backward()
    assert_close(value, expected, "sum", "drift")
    for name, x, y in zip(("hidden", "weight", "bias"), leaves, leaves64, strict=True):
        assert_close(x.grad, y.grad, "sum", f"gradient of {name}")


@pytest.mark.native
@pytest.mark.parametrize("rows, width", SHAPES)
def test_hypernet_logits(cpu, isa, rows, width):
    weight, bias, hidden, _, _ = problem(rows, width, 0)
    leaves = [x.requires_grad_() for x in (hidden[:, None], weight, bias)]
    leaves64 = [x.detach().double().requires_grad_() for x in leaves]
    outer = torch.randn(1, rows)
    logits = cpu.hypernet_logits(*leaves, rows)
    logits.backward(outer)
    expected = reference.hypernet_logits(*leaves64, rows)
    expected.backward(outer.double())
    assert_close(logits, expected, "sum", "logits")
    for name, x, y in zip(("hidden", "weight", "bias"), leaves, leaves64, strict=True):
        assert_close(x.grad, y.grad, "sum", f"gradient of {name}")


@pytest.mark.native
@pytest.mark.parametrize("rows, width", SHAPES)
@pytest.mark.parametrize("tasks", [0, 1, 4, 9])
def test_hypernet_adam(cpu, isa, rows, width, tasks):
    weight, bias, hidden, targets, (wm, wv, bm, bv) = problem(rows, width, tasks)
    state = [weight, bias, wm, wv, bm, bv]
    state64 = [x.double() for x in state]
    rest = [hidden, torch.randn(rows), targets, torch.tensor(0.02)]
    tail = [torch.tensor(3.0), torch.tensor(1e-3)]
    results = cpu.hypernet_adam(*rest, *state, *tail)
    expected = reference.hypernet_adam(*(x.double() for x in rest), *state64, *(x.double() for x in tail))
    for name, x, y in zip(("hidden", "drift"), results, expected, strict=True):
        assert_close(x, y, "sum", name)
    for name, x, y in zip(("weight", "bias", "wm", "wv", "bm", "bv"), state, state64, strict=True):
        assert_close(x, y, "sum", name)


@pytest.mark.native
@pytest.mark.parametrize("tasks", [0, 3])
def test_a_hundred_steps_are_those_of_torch_adam(cpu, isa, tasks):
    rows, width = 331, 27
    weight, bias, _, targets, _ = problem(rows, width, tasks)
    weight[5] = 0  # and a row that never gets a gradient: 0 / (0 + eps)
    state = [weight.clone(), bias.clone(), *(torch.zeros_like(x) for x in (weight, weight, bias, bias))]
    layer = [weight.double().requires_grad_(), bias.double().requires_grad_()]
    optimizer = torch.optim.Adam(layer, lr=1e-2)
    drift_weight = torch.tensor(0.01)
    for step in range(1, 101):
        hidden = torch.randn(tasks + 1, width)
        grad_logits = torch.randn(rows)
        grad_logits[5] = 0 if tasks == 0 else 1
        cpu.hypernet_adam(
            hidden, grad_logits, targets, drift_weight, *state, torch.tensor(float(step)), torch.tensor(1e-2)
        )
        predictions = hidden.double() @ layer[0].t() + layer[1]
        drift = (predictions[:-1] - targets.double()).square().sum()
        optimizer.zero_grad()
        (0.01 * drift + (predictions[-1] * grad_logits.double()).sum()).backward()
        optimizer.step()
    assert_close(state[0], layer[0], "adam100", "weight")
    assert_close(state[1], layer[1], "adam100", "bias")


@pytest.mark.native
def test_adam_of_extreme_gradients(cpu, isa):
    """Zero, denormal and overflowing second moments follow the same formula; eps = 0 gives NaN at 0 / 0 as in torch."""
    rows, width = 64, 16
    grad_logits = torch.logspace(-30, 18, rows)
    grad_logits[::8] = 0
    for eps in (1e-8, 0.0):
        state = [torch.zeros(s) for s in ((rows, width), (rows,), (rows, width), (rows, width), (rows,), (rows,))]
        exact = [x.double() for x in state]
        args = (torch.ones(1, width), grad_logits, torch.empty(0, rows), torch.tensor(0.0))
        tail = (torch.tensor(1.0), torch.tensor(1e-3), 0.9, 0.999, eps)
        cpu.hypernet_adam(*args, *state, *tail)
        reference.hypernet_adam(*(x.double() for x in args), *exact, *tail)
        sure = (grad_logits == 0) | (state[3][:, 0] > 1e-37)  # v keeps few digits where it is denormal
        assert_close(state[0][sure], exact[0][sure], "sum", f"weight, eps {eps}")
        assert state[0][~sure].isfinite().all() or eps == 0


@pytest.mark.parametrize("size", [45, 48, 60, 41])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chunked_output_drift(size, dtype):
    torch.manual_seed(1)
    tasks, chunks, rows, width = 3, -(-size // 12), 12, 5
    old = [torch.randn(tasks, chunks, width), torch.randn(rows, width), torch.randn(rows)]
    new = [(x + 1e-3 * torch.randn_like(x)) for x in old]
    mine = [x.to(dtype, copy=True).requires_grad_() for x in new]
    drift = ops.chunked_output_drift(*mine, *(x.to(dtype) for x in old), size)
    drift.backward()
    exact = [x.to(dtype).double().detach().clone().requires_grad_() for x in new]
    expected = reference.chunked_output_drift(*exact, *(x.double() for x in old), size)
    expected.backward()
    # Subtracting outputs in float32 would cost three digits here; the Gram form does not subtract them.
    torch.testing.assert_close(drift.double(), expected, rtol=2e-5 if dtype is torch.float32 else 1e-9, atol=0)
    for x, y in zip(mine, exact, strict=True):
        scale = y.grad.abs().max()
        torch.testing.assert_close(x.grad.double() / scale, y.grad / scale, rtol=0, atol=1e-4)
