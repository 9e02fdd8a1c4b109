"""semi_binary_mask: m = |tanh a| where not |a| < threshold, else 0, with its derivative, one launch each."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import arguments
from . import host
from .device import mask_of, slope_of
from .host import cdiv, next_power_of_2

_BLOCK = 1024


@triton.jit(do_not_specialize=["blocks"])
def _mask(
    a_ptr, threshold_ptr, grad_ptr, out_ptr, slope_ptr, run, blocks,
    BACKWARD: tl.constexpr, WITH_SLOPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Forward: the mask (and its slope); backward: grad times the slope. Each run of entries, `blocks` programs
    long, has one threshold."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    local = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = local < run
    entry = row * run + local
    a = tl.load(a_ptr + entry, mask=inside, other=0).to(tl.float32)
    threshold = tl.load(threshold_ptr + row).to(tl.float32)
    if BACKWARD:
        grad = tl.load(grad_ptr + entry, mask=inside, other=0).to(tl.float32)
        slope = slope_of(a, threshold)
        out = tl.where(slope == 0, 0.0, grad * slope)
    else:
        out = mask_of(a, threshold, False)
    tl.store(out_ptr + entry, out.to(out_ptr.dtype.element_ty), mask=inside)
    if WITH_SLOPE:
        tl.store(slope_ptr + entry, slope_of(a, threshold).to(slope_ptr.dtype.element_ty), mask=inside)


def _thresholds(threshold: Tensor, shape: torch.Size) -> tuple[Tensor, int]:
    """Thresholds in the order of the logits' rows, and how many consecutive entries share each."""
    expanded = threshold.expand(shape)
    shared = len(shape)
    while shared > 0 and (expanded.stride(shared - 1) == 0 or shape[shared - 1] == 1):
        shared -= 1
    rows = expanded[(..., *[0] * (len(shape) - shared))] if shared < len(shape) else expanded
    return rows.contiguous(), math.prod(shape[shared:])


def _launch(logits: Tensor, threshold: Tensor, grad: Tensor | None, slope: Tensor | None) -> Tensor:
    _check(logits, threshold, grad)
    out = logits.new_empty(logits.shape)
    if out.numel() > 0:
        thresholds, run = _thresholds(threshold, logits.shape)
        grad = None if grad is None else grad.contiguous()
        block = min(_BLOCK, next_power_of_2(run))
        blocks = cdiv(run, block)
        _mask[(len(thresholds.view(-1)) * blocks,)](
            logits.contiguous(), thresholds, grad, out, slope, run, blocks,
            BACKWARD=grad is not None, WITH_SLOPE=slope is not None, BLOCK=block,
        )  # fmt: skip
    return out


def _check(logits: Tensor, threshold: Tensor, grad: Tensor | None = None) -> None:
    host.check_tensors(logits=logits, threshold=threshold, grad=grad)
    arguments.semi_binary_mask(logits, threshold)
    if grad is not None:
        arguments.gradient(grad, logits.shape)


def _forward(logits: Tensor, threshold: Tensor) -> Tensor:
    return _launch(logits, threshold, None, None)


def _forward_with_slope(logits: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    slope = logits.new_empty(logits.shape)
    return _launch(logits, threshold, None, slope), slope


def _backward(grad: Tensor, logits: Tensor, threshold: Tensor) -> Tensor:
    return _launch(logits, threshold, grad, None)


def _shapes(logits: Tensor, threshold: Tensor) -> Tensor:
    _check(logits, threshold)
    return logits.new_empty(logits.shape)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(ctx, grad: Tensor):
    return torch.ops.hypermask_triton.semi_binary_mask_backward(grad, *ctx.saved_tensors), None


host.register("semi_binary_mask(Tensor logits, Tensor threshold) -> Tensor", _forward, _shapes)
host.register(
    "semi_binary_mask_with_slope(Tensor logits, Tensor threshold) -> (Tensor, Tensor)",
    _forward_with_slope, lambda logits, threshold: (_shapes(logits, threshold), _shapes(logits, threshold)),
)  # fmt: skip
host.register(
    "semi_binary_mask_backward(Tensor grad, Tensor logits, Tensor threshold) -> Tensor",
    _backward, lambda grad, logits, threshold: _shapes(logits, threshold),
)  # fmt: skip
host.register_autograd("semi_binary_mask", _setup_context, _autograd)


def semi_binary_mask(logits: Tensor, threshold: Tensor) -> Tensor:
    """m = |tanh a| where not |a| < threshold, else 0; differentiable in the logits.

    Args:
        logits: any shape; threshold: broadcasts to it. float32, float16 or bfloat16.

    Returns:
        Mask of the shape and dtype of logits, contiguous.

    Raises:
        InputError: shapes that do not broadcast, other dtypes, mixed devices, CPU tensors outside the interpreter.
    """
    return torch.ops.hypermask_triton.semi_binary_mask(logits, threshold)


def semi_binary_mask_with_slope(logits: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """m and dm/da = sign(a) (1 - tanh(a)^2) on kept entries, 0 on dropped ones; neither differentiable.

    Arguments and errors as `semi_binary_mask`.

    Returns:
        Two tensors of the shape and dtype of logits, contiguous.
    """
    return torch.ops.hypermask_triton.semi_binary_mask_with_slope(logits, threshold)
