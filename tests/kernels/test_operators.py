"""The ops as PyTorch sees them: schemas, shape functions, autograd, torch.compile."""

import contextlib
import os
import subprocess
import sys

import pytest
import torch
from comparing import DEVICE, exact_threshold, randn
from torch._dynamo.utils import counters

from hypermask_fast import InputError, kernels
from hypermask_fast.kernels import host
from hypermask_fast.ops.task_rows import TaskRows

F32 = torch.float32
THRESHOLD = torch.tensor(0.4, device=DEVICE)


def grad(*shape):
    return randn(*shape, dtype=F32).requires_grad_()


def plain(*shape):
    return randn(*shape, dtype=F32)


CASES = {
    "masked_linear": lambda: (grad(3, 5), grad(4, 5), grad(4, 5), THRESHOLD, grad(4)),
    "masked_linear_backward": lambda: (
        plain(3, 4), plain(3, 5), plain(4, 5), plain(4, 5), THRESHOLD, [True, False, True],
    ),
    "masked_conv2d": lambda: (
        grad(2, 4, 5, 5), grad(6, 2, 3, 3), grad(6, 2, 3, 3), THRESHOLD, grad(6), (2, 1), (1, 1), (1, 1), 2,
    ),
    "masked_conv2d_backward": lambda: (
        plain(2, 6, 3, 5), plain(2, 4, 5, 5), plain(6, 2, 3, 3), plain(6, 2, 3, 3), THRESHOLD,
        (2, 1), (1, 1), (1, 1), 2, [True, True, False],
    ),
    "chunk_masked_linear": lambda: (
        grad(3, 5), grad(4, 5), grad(4, 3), grad(6, 3), grad(6), 2, THRESHOLD, grad(4),
    ),
    "chunk_masked_linear_backward": lambda: (
        plain(3, 4), plain(3, 5), plain(4, 5), plain(4, 3), plain(6, 3), plain(6), 2, THRESHOLD,
        [True, False, True, False, True],
    ),
    "chunk_masked_conv2d": lambda: (
        grad(2, 2, 5, 5), grad(2, 1, 3, 3), grad(4, 3), grad(6, 3), grad(6), 2, THRESHOLD, grad(2),
        (1, 1), (1, 1), (1, 1), 2,
    ),
    "chunk_masked_conv2d_backward": lambda: (
        plain(2, 2, 5, 5), plain(2, 2, 5, 5), plain(2, 1, 3, 3), plain(4, 3), plain(6, 3), plain(6), 2, THRESHOLD,
        (1, 1), (1, 1), (1, 1), 2, [True] * 5,
    ),
    "task_batched_linear": lambda: (
        grad(3, 5), grad(4, 5), grad(2, 4, 5), THRESHOLD.expand(2),
        *TaskRows.of(torch.tensor([1, 0, 1], device=DEVICE), 2), grad(2, 4),
    ),
    "task_batched_linear_backward": lambda: (
        plain(2, 3, 4), plain(3, 5), plain(4, 5), plain(2, 4, 5), THRESHOLD.expand(2), None, None, [True] * 3,
    ),
    "semi_binary_mask": lambda: (grad(3, 5), THRESHOLD),
    "semi_binary_mask_with_slope": lambda: (plain(3, 5), THRESHOLD),
    "semi_binary_mask_backward": lambda: (plain(3, 5), plain(3, 5), THRESHOLD),
    "entropy_select": lambda: (plain(3, 4, 5),),
    "masked_weights": lambda: ([grad(2, 3), grad(4)], grad(11), THRESHOLD.expand(3), [0, 6, 10, 11]),
    "masked_weights_backward": lambda: (
        [plain(2, 3), plain(4)], [plain(2, 3), plain(4)], plain(11), THRESHOLD.expand(3), [0, 6, 10, 11], [True] * 2,
    ),
    "weight_drift": lambda: (
        [grad(2, 3), grad(4)], plain(11), [0, 6, 10], 2, grad(11), THRESHOLD.expand(2),
    ),
    "weight_drift_backward": lambda: (
        plain(), plain(2).abs(), [plain(2, 3), plain(4)], plain(11), [0, 6, 10], 1, plain(11), THRESHOLD.expand(2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name):
    torch.library.opcheck(getattr(torch.ops.hypermask_triton, name).default, CASES[name]())


def test_every_op_is_checked():
    assert {name.split("::")[1] for name in host._LIBRARY._op_defs} == set(CASES)


# Tensors of which half is an argument too.
HALVES = {
    ("semi_binary_mask", 0), ("semi_binary_mask_with_slope", 0), ("entropy_select", 0), ("masked_conv2d", 0),
    ("chunk_masked_conv2d", 0), ("chunk_masked_conv2d", 1),
}  # fmt: skip


def another_shape(value):
    if isinstance(value, list):
        return [another_shape(value[0]), *value[1:]]
    return value[..., : value.shape[-1] // 2] if value.dim() else value.expand(2)


@pytest.mark.parametrize("name", CASES)
def test_a_direct_call_refuses_what_does_not_fit(name):
    """Every tensor of every operator, those of the backward passes too: nothing is read beyond an end."""
    for i, value in enumerate(CASES[name]()):
        tensors = isinstance(value, torch.Tensor) or (isinstance(value, list) and isinstance(value[0], torch.Tensor))
        if not tensors or (name, i) in HALVES:
            continue
        arguments = list(CASES[name]())
        arguments[i] = another_shape(value)
        with pytest.raises(InputError):
            getattr(torch.ops.hypermask_triton, name)(*arguments)


def own(values, task):
    """Those of one task, whose id is a tensor (1,)."""
    return values.index_select(0, task)[0]


# An op under a task that is a tensor, as a compiled model calls it, and the shapes of what it differentiates; what each
# of the two tasks has of its own comes first.
COMPILED = {
    "masked_linear": (
        lambda task, limits, a, x, w, b: kernels.masked_linear(x, w, own(a, task), own(limits, task), b),
        ((2, 4, 5), (3, 5), (4, 5), (4,)),
    ),
    "masked_conv2d": (
        lambda task, limits, a, x, w, b: kernels.masked_conv2d(x, w, own(a, task), own(limits, task), b, 2, 1, 1, 2),
        ((2, 6, 2, 3, 3), (2, 4, 5, 5), (6, 2, 3, 3), (6,)),
    ),
    "chunk_masked_linear": (
        lambda task, limits, h, x, w, *layer: kernels.chunk_masked_linear(
            x, w, own(h, task), *layer, 2, own(limits, task)
        ),
        ((2, 4, 3), (3, 5), (4, 5), (6, 3), (6,)),
    ),
    "chunk_masked_conv2d": (
        lambda task, limits, h, x, w, *layer: kernels.chunk_masked_conv2d(
            x, w, own(h, task), *layer, 2, own(limits, task)
        ),
        ((2, 4, 3), (2, 1, 5, 5), (2, 1, 3, 3), (6, 3), (6,)),
    ),
    "task_batched_linear": (
        lambda task, limits, a, x, w, b: kernels.task_batched_linear(x, w, a, limits, task.expand(3), b),
        ((2, 4, 5), (3, 5), (4, 5), (2, 4)),
    ),
    "task_batched_linear, every task": (
        lambda task, limits, a, x, w, b: kernels.task_batched_linear(x, w, a, limits, None, b),
        ((2, 4, 5), (3, 5), (4, 5), (2, 4)),
    ),
    "semi_binary_mask": (
        lambda task, limits, a: kernels.semi_binary_mask(own(a, task), own(limits, task)),
        ((2, 3, 5),),
    ),
    "masked_weights": (
        lambda task, limits, a, v, w: torch.cat(
            [m.flatten() for m in kernels.masked_weights((v, w), own(a, task), limits, (0, 6, 10))]
        ),
        ((2, 10), (2, 3), (4,)),
    ),
    "entropy_select": (lambda task, limits, x: kernels.entropy_select(x * own(limits, task)), ((3, 4, 5),)),
    "weight_drift": (
        lambda task, limits, a, v, w: kernels.weight_drift(
            (v, w), own(a, 1 - task), (0, 6, 10), 2, own(a, task), limits
        ),
        ((2, 10), (2, 3), (4,)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPILED)
def test_compiles_to_one_graph_for_all_tasks(name):
    """Forward and backward without a graph break, the eager numbers, and no other code for another task."""
    op, shapes = COMPILED[name]
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    counters.clear()
    for task, limits in ((0, (0.3, 0.4)), (1, (0.5, 0.2))):
        leaves = [grad(*shape) for shape in shapes]
        call = torch.tensor([task], device=DEVICE), torch.tensor(limits, device=DEVICE), *leaves
        y, expected = compiled(*call), op(*call)
        assert torch.equal(y, expected)
        if y.is_floating_point():
            seed = torch.randn_like(y)
            ours, theirs = (torch.autograd.grad(found, leaves, seed) for found in (y, expected))
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert counters["stats"]["unique_graphs"] == 1


def test_repeats_bit_for_bit():
    x, weight, logits = grad(5, 300), grad(20, 300), grad(20, 300)
    threshold = exact_threshold(logits)

    def once():
        y = kernels.masked_linear(x, weight, logits, threshold)
        return y, *torch.autograd.grad(y.sum(), (x, weight, logits))

    for first, second in zip(once(), once(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.skipif(not host.INTERPRETED, reason="needs a process where Triton's interpreter is off")
def test_cpu_tensors_without_the_interpreter_say_what_to_do():
    program = (
        "import torch; from hypermask_fast.kernels import masked_linear\n"
        "o = torch.ones(2, 2)\n"
        "try: masked_linear(o, o, o, o.sum())\n"
        "except ValueError as error: print(type(error).__name__, error)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, cwd=os.getcwd()
    )
    assert answer.stdout.startswith("InputError Triton kernels need CUDA tensors"), answer.stderr


def test_launches_on_the_tensors_own_device(monkeypatch):
    """With several GPUs the current one may be another."""
    entered = []
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: entered.append(tensor) or contextlib.nullcontext())
    weight, logits = plain(3), plain(3)
    run = host.on_its_device(lambda *args: len(entered))
    assert run([weight], logits) == 1 and run([], logits) == 2
    assert entered[0] is weight and entered[1] is logits
