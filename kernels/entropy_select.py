"""entropy_select: per sample, the task whose softmax has the lowest entropy, in one launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import arguments
from . import host
from .host import cdiv, next_power_of_2


@triton.jit(do_not_specialize=["batch", "tasks"])
def _entropy_select(
    logits_ptr,
    out_ptr,
    tasks,
    batch,
    classes,
    l_task,
    l_row,
    l_class,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """H = log s - sum_c e^z z / s with z = logit - max and s = sum_c e^z; argmin over tasks, the first among equals."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    best = tl.full((ROWS,), float("inf"), tl.float32)
    chosen = tl.zeros((ROWS,), tl.int64)
    for task in range(tasks):
        highest = tl.full((ROWS,), -float("inf"), tl.float32)
        for start in range(0, classes, BLOCK):
            c = start + tl.arange(0, BLOCK)
            inside = (row < batch)[:, None] & (c < classes)[None, :]
            at = logits_ptr + row[:, None] * l_row + c[None, :] * l_class
            logit = tl.load(at, mask=inside, other=-float("inf")).to(tl.float32)
            highest = tl.maximum(highest, tl.max(logit, 1))
        mass = tl.zeros((ROWS,), tl.float32)
        moment = tl.zeros((ROWS,), tl.float32)
        for start in range(0, classes, BLOCK):
            c = start + tl.arange(0, BLOCK)
            inside = (row < batch)[:, None] & (c < classes)[None, :]
            at = logits_ptr + row[:, None] * l_row + c[None, :] * l_class
            logit = tl.load(at, mask=inside, other=-float("inf")).to(tl.float32)
            z = tl.where((c < classes)[None, :], logit - highest[:, None], -float("inf"))
            e = tl.exp(z)
            mass += tl.sum(e, 1)
            moment += tl.sum(tl.where(e == 0, 0.0, e * z), 1)  # 0 log 0 = 0
        entropy = tl.log(mass) - moment / mass
        better = entropy < best  # false for NaN, which so counts as infinite
        best = tl.where(better, entropy, best)
        chosen = tl.where(better, task, chosen)
        logits_ptr += l_task
    tl.store(out_ptr + row, chosen, mask=row < batch)


def _forward(logits: Tensor) -> Tensor:
    out = _shapes(logits)
    tasks, batch, classes = logits.shape
    if batch > 0:
        block = min(next_power_of_2(classes), 1024)
        rows = max(1, min(2048 // block, 32))
        _entropy_select[(cdiv(batch, rows),)](
            logits, out, tasks, batch, classes, *logits.stride(), ROWS=rows, BLOCK=block, num_warps=8
        )
    return out


def _shapes(logits: Tensor) -> Tensor:
    host.check_tensors(logits=logits)
    arguments.entropy_select(logits)
    return logits.new_empty(logits.shape[1], dtype=torch.int64)


host.register("entropy_select(Tensor logits) -> Tensor", _forward, _shapes)


def entropy_select(logits: Tensor) -> Tensor:
    """argmin over tasks of the softmax entropy -sum_c p log p; the lowest index among equals, NaN counts as Inf.

    Args:
        logits: (T, batch, classes) class logits of every task's masked network, float32, float16 or bfloat16,
            any strides. Not differentiable.

    Returns:
        (batch,) int64 task per sample.

    Raises:
        InputError: no task or no class, other dtypes, a CPU tensor outside the interpreter.
    """
    return torch.ops.hypermask_triton.entropy_select(logits.detach())
