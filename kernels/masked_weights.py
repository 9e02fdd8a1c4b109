"""masked_weights: W_s * m_s of all layers, and dW_s and da from their gradients, in one launch each way.

That holds for up to 64 tensors; more take a launch for every 64.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import arguments
from . import host
from .device import gradient_of_logits, mask_of, masked_tile
from .segments import borders_of, constants, fill_gap, place_of, tables, tensor_of


@triton.jit
def _masked_weights(
    table_ptr, w_ptrs, a_ptr, thresholds_ptr, out_ptrs,
    APPROXIMATE: tl.constexpr, COUNT: tl.constexpr, BY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """W * m of one block of a segment."""
    row_ptr = table_ptr + 4 * tl.program_id(0)
    segment = tl.load(row_ptr).to(tl.int32)
    begin, flat, count = place_of(row_ptr, BY, BLOCK)
    w_at, a_at = tensor_of(w_ptrs, segment, COUNT) + begin, a_ptr + flat
    local = tl.arange(0, BLOCK)
    inside = local < count
    w = tl.load(w_at + local, mask=inside, other=0)
    a = tl.load(a_at + local, mask=inside, other=0)
    masked = masked_tile(w, a, tl.load(thresholds_ptr + segment).to(tl.float32), APPROXIMATE)
    out_at = tensor_of(out_ptrs, segment, COUNT) + begin
    tl.store(out_at + local, masked.to(out_at.dtype.element_ty), mask=inside)


@triton.jit
def _gradients(
    table_ptr, g_ptrs, w_ptrs, a_ptr, thresholds_ptr, dw_ptrs, da_ptr,
    WANT_W: tl.constexpr, WANT_A: tl.constexpr, COUNT: tl.constexpr, BY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dW = G m and da = G W dm/da of one block of a segment; da is 0 where no segment is."""
    row_ptr = table_ptr + 4 * tl.program_id(0)
    segment = tl.load(row_ptr).to(tl.int32)
    if segment < 0:
        fill_gap(row_ptr, da_ptr, BLOCK)
    else:
        begin, flat, count = place_of(row_ptr, BY, BLOCK)
        g_at, a_at = tensor_of(g_ptrs, segment, COUNT) + begin, a_ptr + flat
        local = tl.arange(0, BLOCK)
        inside = local < count
        g = tl.load(g_at + local, mask=inside, other=0).to(tl.float32)
        a = tl.load(a_at + local, mask=inside, other=0).to(tl.float32)
        threshold = tl.load(thresholds_ptr + segment).to(tl.float32)
        if WANT_W:
            dw_at = tensor_of(dw_ptrs, segment, COUNT) + begin
            dw = g * mask_of(a, threshold, False)
            tl.store(dw_at + local, dw.to(dw_at.dtype.element_ty), mask=inside)
        if WANT_A:
            w_at = tensor_of(w_ptrs, segment, COUNT) + begin
            w = tl.load(w_at + local, mask=inside, other=0).to(tl.float32)
            da = gradient_of_logits(g, w, a, threshold)
            tl.store(da_ptr + flat + local, da.to(da_ptr.dtype.element_ty), mask=inside)


def _check(
    weights: Sequence[Tensor],
    logits: Tensor,
    thresholds: Tensor,
    offsets: Sequence[int],
    grads: Sequence[Tensor] | None = None,
) -> None:
    host.check_tensors(logits=logits, thresholds=thresholds, weights=weights, grads=grads)
    host.check_one_dtype(weights)
    arguments.masked_weights(weights, logits, thresholds, offsets)
    if grads is not None:
        host.check_one_dtype(grads)
        arguments.masked_weights_gradients(grads, weights)


def _shapes(weights: Sequence[Tensor], logits: Tensor, thresholds: Tensor, offsets: Sequence[int]) -> list[Tensor]:
    _check(weights, logits, thresholds, offsets)
    return [w.new_empty(w.shape, dtype=_dtype(w, logits)) for w in weights]


def _dtype(weight: Tensor, logits: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, logits.dtype)


def _forward(weights: Sequence[Tensor], logits: Tensor, thresholds: Tensor, offsets: Sequence[int]) -> list[Tensor]:
    masked = _shapes(weights, logits, thresholds, offsets)
    borders, flat = borders_of(weights, offsets), [w.contiguous() for w in weights]
    logits, thresholds = logits.contiguous(), thresholds.contiguous()
    for part, table in tables(borders, None, logits.device):
        if len(table) > 0:
            _masked_weights[(len(table),)](
                table, tuple(flat[part]), logits, thresholds[part], tuple(masked[part]),
                APPROXIMATE=host.approximate_tanh(masked[0].dtype), COUNT=len(flat[part]), **constants(borders),
            )  # fmt: skip
    return masked


def _backward(grads, weights, logits, thresholds, offsets, needed) -> tuple[list[Tensor], Tensor]:
    _check(weights, logits, thresholds, offsets, grads)
    dws, da = _backward_shapes(grads, weights, logits, thresholds, offsets, needed)
    want_weights, want_logits = needed
    if not (want_weights or want_logits):
        return dws, da
    borders, flat = borders_of(weights, offsets), [w.contiguous() for w in weights]
    grads, logits, thresholds = [g.contiguous() for g in grads], logits.contiguous(), thresholds.contiguous()
    for part, table in tables(borders, len(da) if want_logits else None, logits.device):
        if len(table) > 0:
            _gradients[(len(table),)](
                table, tuple(grads[part]), tuple(flat[part]), logits, thresholds[part],
                tuple(dws[part]) if want_weights else None, da,
                WANT_W=want_weights, WANT_A=want_logits, COUNT=len(flat[part]), **constants(borders),
            )  # fmt: skip
    return dws, da


def _backward_shapes(grads, weights, logits, thresholds, offsets, needed) -> tuple[list[Tensor], Tensor]:
    dws = [w.new_empty(w.shape) for w in weights] if needed[0] else []
    return dws, logits.new_empty(logits.shape if needed[1] else 0)


def _setup_context(ctx, inputs, output) -> None:
    weights, logits, thresholds, ctx.offsets = inputs
    ctx.save_for_backward(*weights, logits, thresholds)


def _autograd(ctx, grads: Sequence[Tensor | None]):
    *weights, logits, thresholds = ctx.saved_tensors
    needed = any(ctx.needs_input_grad[0]), ctx.needs_input_grad[1]
    grads = [
        torch.zeros_like(w, dtype=_dtype(w, logits)) if g is None else g for g, w in zip(grads, weights, strict=True)
    ]
    dws, da = torch.ops.hypermask_triton.masked_weights_backward(
        grads, weights, logits, thresholds, ctx.offsets, needed
    )
    return dws if needed[0] else [None] * len(weights), da if needed[1] else None, None, None


_INPUTS = "Tensor[] weights, Tensor logits, Tensor thresholds, int[] offsets"
host.register(f"masked_weights({_INPUTS}) -> Tensor[]", _forward, _shapes)
host.register(
    f"masked_weights_backward(Tensor[] grads, {_INPUTS}, bool[2] needed) -> (Tensor[], Tensor)",
    _backward, _backward_shapes,
)  # fmt: skip
host.register_autograd("masked_weights", _setup_context, _autograd)


def masked_weights(
    weights: Sequence[Tensor], logits: Tensor, thresholds: Tensor, offsets: Sequence[int]
) -> list[Tensor]:
    """W_s * m_s for the first len(weights) segments, m = |tanh a| where not |a| < threshold_s, else 0.

    Computed in float32 and rounded once, the gradients of weights and logits too.

    Args:
        weights: tensors of one dtype and any shapes, weights[s].numel() == offsets[s + 1] - offsets[s].
        logits: (N,) flat; thresholds: (S,), on |a|; offsets: S + 1 borders of the segments, S >= len(weights).
            float32, float16 or bfloat16, any strides.

    Returns:
        A contiguous tensor for each weight, of its shape, in the dtype that PyTorch promotes weights and logits to.

    Raises:
        InputError: sizes that do not fit, other dtypes, mixed devices, CPU tensors outside the interpreter.
    """
    if len(weights) == 0:
        return []
    return torch.ops.hypermask_triton.masked_weights(list(weights), logits, thresholds, list(offsets))
