"""The dense layer's gradients for many tasks on a GPU: by tensor cores, in float32's accuracy."""

import pytest
import torch
from support.backends import on
from support.comparing import NAN
from support.dense import dense_problem
from support.tolerances import assert_close

from hypermask_fast.ops import reference
from hypermask_fast.ops.native.dense import on_tensor_cores

# Rows, width and tasks at, below and beyond the borders of what a warp takes: 32 rows, 16 columns, 8 and 16 tasks. With
# 150 tasks a warp has more sums than it keeps in registers; 400 columns do not fit, so multiply-adds serve them.
SIZES = [
    (1, 4, 24), (33, 16, 24), (64, 20, 25), (300, 36, 31), (130, 48, 32), (257, 64, 33), (97, 100, 24), (213, 100, 41),
    (70, 100, 104), (64, 128, 150), (40, 256, 40), (35, 400, 24),
]  # fmt: skip
ONE = torch.tensor(1.0)
on_gpus = on("emulated", "cuda")
each_size = pytest.mark.parametrize(("rows", "width", "tasks"), SIZES)


def sent(backend, tensors):
    return [x.to(backend.device, copy=True) for x in tensors]


@on_gpus
@each_size
def test_a_step_of_many_tasks_is_as_defined(backend, rows, width, tasks):
    assert on_tensor_cores(tasks, width) and not on_tensor_cores(23, width)
    weight, bias, hidden, targets, moments = dense_problem(rows, width, tasks - 1)
    rest, tail = [hidden, torch.randn(rows), targets, torch.tensor(0.02)], [torch.tensor(3.0), torch.tensor(1e-3)]
    layer = [weight, bias, *moments]
    stepped, exact = sent(backend, layer), [x.double() for x in layer]
    found = backend.hypernet_adam(*sent(backend, rest), *stepped, *sent(backend, tail))
    expected = reference.hypernet_adam(*(x.double() for x in rest), *exact, *(x.double() for x in tail))
    for i, (x, y) in enumerate(zip([*found, *stepped], [*expected, *exact], strict=True)):
        assert_close(x, y, backend.kind("dense"), f"result {i}")


@on_gpus
@each_size
def test_a_step_of_many_tasks_in_two_passes_is_as_defined(backend, rows, width, tasks):
    weight, _, hidden, targets, moments = dense_problem(rows, width, tasks - 1)
    factors, scales = torch.cat([targets, torch.randn(1, rows)]), 0.1 * torch.randn(tasks)
    found = backend.hidden_gradient(*sent(backend, (factors, scales, weight)))
    expected = reference.hidden_gradient(factors.double(), scales.double(), weight.double())
    layer, tail = [weight, *moments[:2]], [torch.tensor(3.0), torch.tensor(1e-3)]
    stepped, exact = sent(backend, layer), [x.double() for x in layer]
    backend.factored_adam(*sent(backend, (factors, scales, hidden)), *stepped, *sent(backend, tail))
    reference.factored_adam(factors.double(), scales.double(), hidden.double(), *exact, *(x.double() for x in tail))
    for i, (x, y) in enumerate(zip([*found, *stepped], [*expected, *exact], strict=True)):
        assert_close(x, y, backend.kind("dense"), f"result {i}")


@on_gpus
@each_size
def test_the_drift_of_many_tasks_has_the_gradients_defined(backend, rows, width, tasks):
    weight, bias, hidden, targets, _ = dense_problem(rows, width, tasks)
    tensors = [hidden[:tasks, None], weight, bias]
    leaves = [x.requires_grad_() for x in sent(backend, tensors)]
    exact = [x.double().requires_grad_() for x in tensors]
    backend.output_drift(*leaves, targets.to(backend.device)).backward()
    reference.output_drift(*exact, targets.double()).backward()
    for name, x, y in zip(("hidden", "weight", "bias"), leaves, exact, strict=True):
        assert_close(x.grad, y.grad, backend.kind("dense"), f"gradient of {name}")


@on_gpus
@pytest.mark.parametrize("size", [1e-20, 1e18])
def test_small_and_large_numbers_keep_their_digits(backend, size):
    """The halves of a float have float32's exponents."""
    weight, _, _, targets, _ = dense_problem(70, 36, 30)
    factors, scales = size * targets, torch.ones(30)
    grad_hidden, _ = backend.hidden_gradient(*sent(backend, (factors, scales, weight)))
    assert_close(grad_hidden, factors.double() @ weight.double(), backend.kind("dense"))


@on_gpus
@pytest.mark.parametrize("of", ["factors", "weight"])
def test_numbers_of_22_bits_lose_nothing(backend, of):
    """Two halves of 11 bits hold them; where one had a bit fewer, or were left out, the last digits would go."""
    tasks = torch.arange(30)
    rows, digits = 2 * tasks, torch.randint(2**21, 2**22, (70, 36)).float()
    factors, weight, expected = torch.zeros(30, 70), digits, digits[rows]
    factors[tasks, rows] = 1
    if of == "factors":
        factors[tasks, rows], weight = digits[rows, 0], torch.ones(70, 36)
        expected = digits[rows, :1].expand(30, 36)
    found, _ = backend.hidden_gradient(*sent(backend, (factors, torch.ones(30), weight)))
    assert torch.equal(found.cpu(), expected)


@on_gpus
@pytest.mark.parametrize("tasks", [23, 24])
def test_tensor_cores_begin_at_24_tasks(backend, tasks):
    """Multiply-adds keep all 24 bits of a number, two halves of 11 bits do not: so each shows that it was there."""
    rows = torch.arange(tasks)
    weight, factors = torch.randint(2**23, 2**24, (70, 36)).float(), torch.zeros(tasks, 70)
    factors[rows, rows] = 1
    found, _ = backend.hidden_gradient(*sent(backend, (factors, torch.ones(tasks), weight)))
    assert torch.equal(found.cpu(), weight[:tasks]) == (tasks < 24)
    assert_close(found, weight[:tasks].double(), backend.kind("dense"))


@on_gpus
def test_many_tasks_of_a_layer_that_begins_between_16_bytes(backend):
    """Fragments and copies of 16 bytes would not be aligned: multiply-adds serve it."""
    weight, _, _, targets, _ = dense_problem(70, 36, 30)
    (memory,) = sent(backend, (torch.zeros(70 * 36 + 1),))
    shifted = memory[1:].view(70, 36).copy_(weight)
    found, _ = backend.hidden_gradient(*sent(backend, (targets, torch.ones(30))), shifted)
    assert_close(found, targets.double() @ weight.double(), backend.kind("dense"))


@on_gpus
def test_many_tasks_that_have_not_moved_are_not_stepped(backend):
    """To the bit: residuals are made as `hypernet_logits` makes logits, however the gradients are."""
    weight, bias, hidden, _, _ = (x.to(backend.device) for x in (*dense_problem(203, 100, 40)[:4], ONE))
    logits = torch.stack([backend.hypernet_logits(h[None, None], weight, bias, 203)[0] for h in hidden])
    state = [weight.clone(), bias.clone(), *(torch.zeros_like(x) for x in (weight, weight, bias, bias))]
    rest = hidden, torch.zeros_like(bias), logits[:40].contiguous(), ONE.to(bias)
    grad_hidden, drift = backend.hypernet_adam(*rest, *state, ONE.to(bias), ONE.to(bias))
    assert drift == 0 and not grad_hidden.any() and torch.equal(state[0], weight) and torch.equal(state[1], bias)


@on_gpus
@pytest.mark.parametrize("tasks", [23, 39])
def test_nan_among_many_tasks_shows_where_it_belongs(backend, tasks):
    """A NaN gradient reaches its own row and the current task's hidden gradient, nothing else."""
    weight, bias, hidden, targets, moments = dense_problem(100, 20, tasks)
    grad_logits = torch.randn(100)
    grad_logits[37] = NAN
    rest, state = sent(backend, (hidden, grad_logits, targets, ONE)), sent(backend, (weight, bias, *moments))
    grad_hidden, drift = backend.hypernet_adam(*rest, *state, *sent(backend, (ONE, ONE)))
    assert grad_hidden[tasks].isnan().all() and grad_hidden[:tasks].isfinite().all() and drift.isfinite()
    for x in state:
        assert x[37].isnan().all() and torch.isfinite(x).sum() == x.numel() - x[37].numel()


@on_gpus
@pytest.mark.parametrize("width", [100, 104, 200])
def test_a_layer_without_rows_gives_no_gradient(backend, width):
    """However many sums there are; 130 tasks have more than fit into registers."""
    factors, scales, weight = torch.empty(130, 0), torch.ones(130), torch.empty(0, width)
    grad_hidden, grad_bias = backend.hidden_gradient(*sent(backend, (factors, scales, weight)))
    assert grad_hidden.shape == (130, width) and not grad_hidden.any() and grad_bias.shape == (0,)
