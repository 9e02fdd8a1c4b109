"""hypernet_adam: the backward pass of the dense output layer and its Adam step in one."""

import pytest
import torch
from support.backends import CPU, NATIVE, on
from support.comparing import NAN
from support.dense import SHAPES, dense_problem
from support.refusals import assert_refused, changed, each_change, whoever_is_asked
from support.tolerances import assert_close

from hypermask_fast import InputError, ops
from hypermask_fast.ops import reference

NAMES = ("hidden's gradient", "drift", "weight", "bias", "weight_m", "weight_v", "bias_m", "bias_v")
SIZES = [(shape, tasks) for shape in SHAPES for tasks in (0, 1, 4, 9, 40)]
SIZES += [((101, 25), 4), ((3000, 100), 9), ((515, 64), 39)]
MOMENTS = {"small": (1e-4, 1e-4), "large for biases": (1e-4, 1.0)}  # the largest weight_v, bias_v


def assert_step_as_defined(backend, rest, state, tail, kind="dense"):
    """Results, and what is modified in place."""
    state64 = [x.double() for x in state]
    expected = reference.hypernet_adam(*(x.double() for x in rest), *state64, *(x.double() for x in tail))
    stepped = [x.to(backend.device, copy=True) for x in state]
    results = backend.hypernet_adam(
        *(x.to(backend.device) for x in rest), *stepped, *(x.to(backend.device) for x in tail)
    )
    for name, x, y in zip(NAMES, [*results, *stepped], [*expected, *state64], strict=True):
        assert_close(x, y, backend.kind(kind), name)


@on(*NATIVE, "cuda")
@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize(("shape", "tasks"), SIZES)
def test_hypernet_adam_matches_the_definition(backend, shape, tasks, moments):
    weight, bias, hidden, targets, state = dense_problem(*shape, tasks, *MOMENTS[moments])
    grad_logits = torch.randn(shape[0])
    grad_logits[shape[0] // 2] = 0
    rest, tail = [hidden, grad_logits, targets, torch.tensor(0.02)], [torch.tensor(3.0), torch.tensor(1e-3)]
    assert_step_as_defined(backend, rest, [weight, bias, *state], tail)


@on("cuda")
@pytest.mark.parametrize(("size", "width", "tasks"), [(1, 1, 1), (101, 25, 5), (3000, 100, 10), (515, 64, 40)])
def test_hypernet_adam_of_large_weights(backend, size, width, tasks):
    layer = [torch.randn(size, width), torch.randn(size), 0.1 * torch.randn(size, width), torch.rand(size, width)]
    layer += [0.1 * torch.randn(size), torch.rand(size)]
    rest = [torch.randn(tasks, width), torch.randn(size), torch.randn(tasks - 1, size), torch.tensor(0.3)]
    assert_step_as_defined(backend, rest, layer, [torch.tensor(7.0), torch.tensor(1e-3)])


def hundred_steps(backend, rows, width, tasks):
    """Beside torch.optim.Adam in float64."""
    weight, bias, _, targets, _ = dense_problem(rows, width, tasks)
    weight[5] = 0  # and with one task a row that never gets a gradient: 0 / (0 + eps)
    state = [x.to(backend.device, copy=True) for x in (weight, bias, *[torch.zeros_like(weight)] * 2)]
    state += [torch.zeros_like(bias).to(backend.device) for _ in range(2)]
    layer = [weight.double().requires_grad_(), bias.double().requires_grad_()]
    optimizer = torch.optim.Adam(layer, lr=1e-2)
    for step in range(1, 101):
        hidden, grad_logits = torch.randn(tasks + 1, width), torch.randn(rows)
        grad_logits[5] = 0 if tasks == 0 else 1
        rest = hidden, grad_logits, targets, torch.tensor(0.01)
        tail = torch.tensor(float(step)), torch.tensor(1e-2)
        backend.hypernet_adam(*(x.to(backend.device) for x in rest), *state, *(x.to(backend.device) for x in tail))
        predictions = hidden.double() @ layer[0].t() + layer[1]
        drift = (predictions[:-1] - targets.double()).square().sum()
        optimizer.zero_grad()
        (0.01 * drift + (predictions[-1] * grad_logits.double()).sum()).backward()
        optimizer.step()
    assert_close(state[0], layer[0], "adam100", "weight")
    assert_close(state[1], layer[1], "adam100", "bias")


@on(*CPU)
@pytest.mark.parametrize("tasks", [0, 3])
def test_hypernet_adam_for_a_hundred_steps_is_torch_adam(backend, tasks):
    hundred_steps(backend, 331, 27, tasks)


@on("emulated")
@pytest.mark.parametrize("tasks", [0, 3])
def test_hypernet_adam_for_a_hundred_steps_of_approximate_roots_and_quotients(backend, instruction_errors, tasks):
    """Roots too small and quotients too large in each step, or the other way round: as far as they can be off."""
    hundred_steps(backend, 61, 12, tasks)


@on(*CPU)
@pytest.mark.parametrize("eps", [1e-8, 0.0])
def test_hypernet_adam_of_extreme_gradients(backend, eps):
    """Zero, denormal and overflowing second moments follow the same formula; eps = 0 gives NaN at 0 / 0 as in torch."""
    rows, width = 64, 16
    grad_logits = torch.logspace(-30, 18, rows)
    grad_logits[::8] = 0
    state = [torch.zeros(s) for s in ((rows, width), (rows,), (rows, width), (rows, width), (rows,), (rows,))]
    exact = [x.double() for x in state]
    args = (torch.ones(1, width), grad_logits, torch.empty(0, rows), torch.tensor(0.0))
    tail = (torch.tensor(1.0), torch.tensor(1e-3), 0.9, 0.999, eps)
    backend.hypernet_adam(*args, *state, *tail)
    reference.hypernet_adam(*(x.double() for x in args), *exact, *tail)
    sure = (grad_logits == 0) | (state[3][:, 0] > 1e-37)  # v keeps few digits where it is denormal
    assert_close(state[0][sure], exact[0][sure], "sum", f"weight, eps {eps}")
    assert state[0][~sure].isfinite().all() or eps == 0


def nan_gradient(backend):
    """A step whose gradient of logits has a NaN in row 37: its results and what it stepped."""
    weight, bias, hidden, targets, moments = dense_problem(100, 12, 2)
    grad_logits = torch.randn(100)
    grad_logits[37] = NAN
    state = [x.to(backend.device) for x in (weight, bias, *moments)]
    one = torch.tensor(1.0)
    rest = [x.to(backend.device) for x in (hidden, grad_logits, targets, one)]
    return backend.hypernet_adam(*rest, *state, one.to(backend.device), one.to(backend.device)), state


@on(*NATIVE, "cuda")
def test_hypernet_adam_shows_nan_where_it_belongs(backend):
    """A NaN gradient reaches its own row and the current task's hidden gradient, nothing else."""
    (grad_hidden, drift), state = nan_gradient(backend)
    assert grad_hidden[2].isnan().all() and grad_hidden[:2].isfinite().all() and drift.isfinite()
    for x in state:
        assert x[37].isnan().all() and torch.isfinite(x).sum() == x.numel() - x[37].numel()


def unaligned(x):
    """A copy that begins 4 bytes behind a border of 16."""
    memory = torch.empty(x.numel() + 1)
    return memory[1:].view(x.shape).copy_(x)


@pytest.mark.parametrize("rows, width", [(63, 7), (301, 100)])
def test_hypernet_adam_of_unaligned_tensors_on_an_emulated_gpu(emulated, rows, width):
    weight, bias, hidden, targets, moments = dense_problem(rows, width, 2)
    rest, tail = [hidden, torch.randn(rows), targets, torch.tensor(0.02)], [torch.tensor(3.0), torch.tensor(1e-3)]
    aligned = [weight, bias, *moments]
    shifted = [unaligned(x) for x in aligned]
    expected = emulated.hypernet_adam(*rest, *aligned, *tail, 0.9, 0.999, 1e-8)
    torch.ops.hypermask_emulated.hypernet_adam(*rest, *shifted, *tail, 0.9, 0.999, 1e-8)
    for name, x, y in zip(NAMES[2:], shifted, aligned, strict=True):
        assert_close(x, y.double(), "sum", name)
    assert expected[0].isfinite().all()


@pytest.mark.parametrize("rows, width", [(203, 100), (201, 25)])
def test_hypernet_adam_does_not_step_a_task_that_has_not_moved(emulated, rows, width):
    """To the bit: the predictions in the step are those of hypernet_logits, so that the drift is exactly 0."""
    weight, bias, hidden, _, _ = dense_problem(rows, width, 20)
    logits = torch.stack([emulated.hypernet_logits(h, weight, bias) for h in hidden])
    state = [x.clone() for x in (weight, bias, *[torch.zeros_like(x) for x in (weight, weight, bias, bias)])]
    one = torch.tensor(1.0)
    args = hidden, torch.zeros(rows), logits[:20].contiguous(), one
    grad_hidden, drift = emulated.hypernet_adam(*args, *state, one, one, 0.9, 0.999, 1e-8)
    assert drift == 0 and not grad_hidden.any() and torch.equal(state[0], weight)


def test_hypernet_adam_of_too_many_tasks_is_refused_on_an_emulated_gpu(emulated):
    weight, bias, hidden, targets, moments = dense_problem(5, 100, 400)
    one = torch.tensor(1.0)
    with pytest.raises(RuntimeError, match="bytes of shared memory"):
        emulated.hypernet_adam(
            hidden, torch.randn(5), targets, one, weight, bias, *moments, one, one, 0.9, 0.999, 1e-8
        )  # fmt: skip


# Bad input

does_not_fit = each_change(
    ({"hidden": torch.ones(3, 5)}, "hidden must have shape (3, 6), not (3, 5)"),
    ({"hidden": torch.ones(0, 6)}, "hidden must be (t + 1, H) and weight (N, H), not (0, 6) and (50, 6)"),
    ({"targets": torch.ones(2, 49)}, "targets must have shape (2, 50), not (2, 49)"),
    ({"bias_m": torch.ones(1)}, "bias_m must have shape (50,), not (1,)"),
    (
        {"bias_v": torch.ones(50).double()},
        "bias and bias_v must be torch.float32, as weight, not torch.float32 and torch.float64",
    ),
    ({"lr": torch.ones(2)}, "lr must have one entry, not 2"),
)


@whoever_is_asked
@does_not_fit
def test_hypernet_adam_refuses_what_does_not_fit(asked, change, message):
    assert_refused("hypernet_adam", asked, change, message)


@whoever_is_asked
@does_not_fit
def test_hypernet_adam_that_is_refused_changes_nothing(asked, change, message):
    given = changed("hypernet_adam", change)
    before = {name: tensor.clone() for name, tensor in given.items()}
    with pytest.raises(InputError):
        ops.hypernet_adam(**given, backend=asked)
    assert all(torch.equal(tensor, before[name]) for name, tensor in given.items())
