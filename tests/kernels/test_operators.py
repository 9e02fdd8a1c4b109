"""The ops as PyTorch sees them: schemas, shape functions, autograd, torch.compile."""

import os
import subprocess
import sys

import pytest
import torch
from comparing import DEVICE, exact_threshold, randn
from torch._dynamo.utils import counters

from hypermask_fast import kernels
from hypermask_fast.kernels import host

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
        grad(3, 5), grad(4, 5), grad(2, 4, 5), THRESHOLD.expand(2), torch.tensor([1, 0, 1], device=DEVICE), grad(2, 4),
    ),
    "task_batched_linear_backward": lambda: (
        plain(2, 3, 4), plain(3, 5), plain(4, 5), plain(2, 4, 5), THRESHOLD.expand(2), None, [True] * 3,
    ),
    "triton_semi_binary_mask": lambda: (grad(3, 5), THRESHOLD),
    "triton_semi_binary_mask_with_slope": lambda: (plain(3, 5), THRESHOLD),
    "triton_semi_binary_mask_backward": lambda: (plain(3, 5), plain(3, 5), THRESHOLD),
    "entropy_select": lambda: (plain(3, 4, 5),),
    "triton_weight_drift": lambda: (
        [grad(2, 3), grad(4)], plain(11), [0, 6, 10], 2, grad(11), THRESHOLD.expand(2),
    ),
    "triton_weight_drift_backward": lambda: (
        plain(), plain(2).abs(), [plain(2, 3), plain(4)], plain(11), [0, 6, 10], 1, plain(11), THRESHOLD.expand(2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name):
    torch.library.opcheck(getattr(torch.ops.hypermask_fast, name).default, CASES[name]())


def test_every_op_is_checked():
    ours = {name.split("::")[1] for name in host._LIBRARY._op_defs}  # the extension defines ops of its own
    assert ours == set(CASES)


def network(x, weights, logits, thresholds, task_ids, hidden, layer, layer_bias):
    """One call of each op."""
    y = kernels.masked_conv2d(x, weights[0], logits[0], thresholds[0], padding=1)
    y = kernels.chunk_masked_conv2d(y, weights[0], hidden, layer, layer_bias, 3, thresholds[0], padding=(1, 1))
    y = kernels.masked_linear(y.flatten(1), weights[1], logits[1], thresholds[0])
    y = kernels.chunk_masked_linear(y, weights[2], hidden, layer, layer_bias, 5, thresholds[0])
    every = kernels.task_batched_linear(y, weights[2], logits[2], thresholds)
    y = kernels.task_batched_linear(y, weights[2], logits[2], thresholds, task_ids)
    mask = kernels.semi_binary_mask(logits[0], thresholds[0])
    drift = kernels.weight_drift(
        weights[:2], torch.cat([logits[0].flatten(), logits[1].flatten()]).detach(), [0, 36, 108]
    )
    return y.square().sum() + mask.sum() + drift + every.sum(), kernels.entropy_select(every)


def test_compile_without_graph_breaks_or_recompilation():
    weights = [grad(2, 2, 3, 3), grad(4, 18), grad(4, 4)]
    logits = [grad(2, 2, 3, 3), grad(4, 18), grad(2, 4, 4)]
    hidden, layer, layer_bias = grad(8, 3), grad(6, 3), grad(6)
    leaves = [*weights, *logits, hidden, layer, layer_bias]
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    counters.clear()
    for thresholds, ids in [((0.3, 0.4), (0, 1, 1)), ((0.5, 0.2), (1, 0, 0))]:
        arguments = (
            plain(3, 2, 3, 3), weights, [logits[0][:, :, :3, :3], *logits[1:]],
            torch.tensor(thresholds, device=DEVICE), torch.tensor(ids, device=DEVICE), hidden, layer, layer_bias,
        )  # fmt: skip
        (loss, task), (expected, expected_task) = compiled(*arguments), network(*arguments)
        torch.testing.assert_close(loss, expected)
        assert torch.equal(task, expected_task)
        wanted = torch.autograd.grad(expected, leaves)
        torch.testing.assert_close(torch.autograd.grad(loss, leaves), wanted)
    assert counters["stats"]["unique_graphs"] == 1  # other tasks and thresholds are other tensors, not other code


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
