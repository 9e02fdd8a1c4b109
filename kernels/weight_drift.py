"""weight_drift: D = sum_s || (W_s - W_prev_s) * m_s ||, all tensors of a network in two launches forward, one backward.

That holds for up to 64 tensors; more take another launch each way for every 64. Sums go block by block and then, in
the second launch, over the blocks in order, so that results repeat bit for bit.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import arguments
from . import host
from .device import mask_of, slope_of
from .segments import borders_of, constants, fill_gap, first_blocks, place_of, tables, tensor_of


@triton.jit
def _change(
    row_ptr, segment, w_ptrs, previous_ptr, a_ptr, thresholds_ptr,
    MASKED: tl.constexpr, COUNT: tl.constexpr, BY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """This block's W - W_prev, logits and threshold; its first entry in the segment and in the flat space, and which
    of its entries there are."""
    begin, flat, count = place_of(row_ptr, BY, BLOCK)
    w_at, previous_at = tensor_of(w_ptrs, segment, COUNT) + begin, previous_ptr + flat
    local = tl.arange(0, BLOCK)
    inside = local < count
    w = tl.load(w_at + local, mask=inside, other=0).to(tl.float32)
    change = w - tl.load(previous_at + local, mask=inside, other=0).to(tl.float32)
    a, threshold = change, 0.0
    if MASKED:
        a_at = a_ptr + flat
        a = tl.load(a_at + local, mask=inside, other=0).to(tl.float32)
        threshold = tl.load(thresholds_ptr + segment).to(tl.float32)
    return change, a, threshold, begin, flat, inside


@triton.jit
def _partial_sums(
    table_ptr, w_ptrs, previous_ptr, a_ptr, thresholds_ptr, partial_ptr,
    NORM: tl.constexpr, MASKED: tl.constexpr, COUNT: tl.constexpr, BY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """partial[block] = sum |change m| or (change m)^2."""
    block = tl.program_id(0)
    row_ptr = table_ptr + 4 * block
    segment = tl.load(row_ptr).to(tl.int32)
    change, a, threshold, _, _, _ = _change(
        row_ptr, segment, w_ptrs, previous_ptr, a_ptr, thresholds_ptr, MASKED, COUNT, BY, BLOCK
    )
    if MASKED:
        change = change * mask_of(a, threshold, False)
    tl.store(partial_ptr + block, tl.sum(tl.abs(change) if NORM == 1 else change * change, 0))


@triton.jit
def _norms(partial_ptr, first_block_ptr, norms_ptr, total_ptr, segments, NORM: tl.constexpr, BLOCK: tl.constexpr):
    """norms[s] from the partial sums of segment s, and their total, in order."""
    total = 0.0
    for segment in range(segments):
        first, last = tl.load(first_block_ptr + segment), tl.load(first_block_ptr + segment + 1)
        sums = tl.zeros((BLOCK,), tl.float32)
        for start in range(first, last, BLOCK):
            block = start + tl.arange(0, BLOCK)
            sums += tl.load(partial_ptr + block, mask=block < last, other=0)
        norm = tl.sum(sums, 0)
        if NORM == 2:
            norm = tl.sqrt(norm)
        tl.store(norms_ptr + segment, norm)
        total += norm
    tl.store(total_ptr, total)


@triton.jit
def _gradients(
    table_ptr, w_ptrs, previous_ptr, a_ptr, thresholds_ptr, grad_ptr, norms_ptr, dw_ptrs, da_ptr,
    NORM: tl.constexpr, MASKED: tl.constexpr, COUNT: tl.constexpr, BY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dW = g m sign(c) and da = g (W - W_prev) sign(c) dm/da with c = (W - W_prev) m; norm 2: c / norm for sign."""
    row_ptr = table_ptr + 4 * tl.program_id(0)
    segment = tl.load(row_ptr).to(tl.int32)
    if segment < 0:
        fill_gap(row_ptr, da_ptr, BLOCK)
    else:
        change, a, threshold, begin, flat, inside = _change(
            row_ptr, segment, w_ptrs, previous_ptr, a_ptr, thresholds_ptr, MASKED, COUNT, BY, BLOCK
        )
        mask = mask_of(a, threshold, False) if MASKED else tl.full((BLOCK,), 1.0, tl.float32)
        c = change * mask
        if NORM == 1:
            direction = tl.where(c > 0, 1.0, tl.where(c < 0, -1.0, 0.0))
        else:
            norm = tl.load(norms_ptr + segment)
            direction = tl.where(norm == 0, 0.0, c / norm)
        direction *= tl.load(grad_ptr).to(tl.float32)
        local = tl.arange(0, BLOCK)
        dw_at = tensor_of(dw_ptrs, segment, COUNT) + begin
        tl.store(dw_at + local, (direction * mask).to(dw_at.dtype.element_ty), mask=inside)
        if MASKED:
            slope = slope_of(a, threshold)
            da = tl.where(slope == 0, 0.0, direction * change * slope)
            tl.store(da_ptr + flat + local, da.to(da_ptr.dtype.element_ty), mask=inside)


def _forward(weights, previous, offsets, norm, logits=None, thresholds=None) -> tuple[Tensor, Tensor]:
    total, norms = _forward_shapes(weights, previous, offsets, norm, logits, thresholds)
    if not weights:
        return total.zero_(), norms
    borders, flat = borders_of(weights, offsets), [w.contiguous() for w in weights]
    previous, logits = previous.contiguous(), None if logits is None else logits.contiguous()
    launches = tables(borders, None, previous.device)
    partial = previous.new_empty(sum(len(table) for _, table in launches), dtype=torch.float32)
    sums = partial.split([len(table) for _, table in launches])
    for (part, table), of_part in zip(launches, sums, strict=True):
        if len(table) > 0:
            _partial_sums[(len(table),)](
                table, tuple(flat[part]), previous, logits, _part(thresholds, part), of_part,
                NORM=norm, MASKED=logits is not None, COUNT=len(flat[part]), num_warps=8, **constants(borders),
            )  # fmt: skip
    _norms[(1,)](partial, first_blocks(borders, partial.device), norms, total, len(weights), NORM=norm, BLOCK=256)
    return total, norms


def _part(thresholds: Tensor | None, part: slice) -> Tensor | None:
    return None if thresholds is None else thresholds.contiguous()[part]


def _forward_shapes(weights, previous, offsets, norm, logits=None, thresholds=None) -> tuple[Tensor, Tensor]:
    _check(weights, previous, offsets, norm, logits, thresholds)
    return previous.new_empty((), dtype=torch.float32), previous.new_empty(len(weights), dtype=torch.float32)


def _check(weights, previous, offsets, norm, logits, thresholds) -> None:
    host.check_tensors(previous=previous, weights=weights, logits=logits, thresholds=thresholds)
    host.check_one_dtype(weights)
    arguments.weight_drift(weights, previous, offsets, norm, logits, thresholds)


def _backward(grad, norms, weights, previous, offsets, norm, logits, thresholds) -> tuple[list[Tensor], Tensor]:
    _check(weights, previous, offsets, norm, logits, thresholds)
    host.check_tensors(previous=previous, grad=grad, norms=norms)
    arguments.weight_drift_gradient(grad, norms, weights)
    dws, da = _backward_shapes(grad, norms, weights, previous, offsets, norm, logits, thresholds)
    if not weights:
        return dws, da.zero_()
    borders, flat = borders_of(weights, offsets), [w.contiguous() for w in weights]
    previous, logits = previous.contiguous(), None if logits is None else logits.contiguous()
    for part, table in tables(borders, None if logits is None else len(da), previous.device):
        if len(table) > 0:
            _gradients[(len(table),)](
                table, tuple(flat[part]), previous, logits, _part(thresholds, part), grad, norms[part],
                tuple(dws[part]), da, NORM=norm, MASKED=logits is not None, COUNT=len(flat[part]),
                **constants(borders),
            )  # fmt: skip
    return dws, da


def _backward_shapes(grad, norms, weights, previous, offsets, norm, logits, thresholds) -> tuple[list[Tensor], Tensor]:
    da = previous.new_empty(0) if logits is None else logits.new_empty(logits.shape)
    return [w.new_empty(w.shape) for w in weights], da


def _setup_context(ctx, inputs, output) -> None:
    weights, previous, ctx.offsets, ctx.norm, logits, thresholds = inputs
    _, norms = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(norms, previous, logits, thresholds, *weights)


def _autograd(ctx, grad: Tensor | None, grad_norms: Tensor | None):
    norms, previous, logits, thresholds, *weights = ctx.saved_tensors
    if grad is None:
        return [None] * len(weights), None, None, None, None, None
    dws, da = torch.ops.hypermask_triton.weight_drift_backward(
        grad, norms, weights, previous, ctx.offsets, ctx.norm, logits, thresholds
    )
    return dws, None, None, None, None if logits is None else da, None


_INPUTS = "Tensor[] weights, Tensor previous, int[] offsets, int norm, Tensor? logits, Tensor? thresholds"
host.register(f"weight_drift({_INPUTS}) -> (Tensor, Tensor)", _forward, _forward_shapes)
host.register(
    f"weight_drift_backward(Tensor grad, Tensor norms, {_INPUTS}) -> (Tensor[], Tensor)",
    _backward, _backward_shapes,
)  # fmt: skip
host.register_autograd("weight_drift", _setup_context, _autograd)


def weight_drift(
    weights: Sequence[Tensor],
    previous: Tensor,
    offsets: Sequence[int],
    norm: int = 1,
    logits: Tensor | None = None,
    thresholds: Tensor | None = None,
) -> Tensor:
    """D = sum_s || (W_s - W_prev_s) * m_s ||_norm; without logits, m = 1. Differentiable in weights and logits.

    The 2-norm's gradient at 0 is 0. Sums are in float32 and in a fixed order.

    Args:
        weights: S tensors of one dtype, any shapes; previous: (N,) flat weights as the task began.
        offsets: S + 1 borders of the weights in the flat space; norm: 1 or 2.
        logits: (N,) and thresholds: (S,) on |a|, both or neither.

    Returns:
        Scalar, float32.

    Raises:
        InputError: sizes that do not fit, another norm, other dtypes, mixed devices, CPU tensors outside the
            interpreter.
    """
    total, _ = torch.ops.hypermask_triton.weight_drift(list(weights), previous, list(offsets), norm, logits, thresholds)
    return total
