"""weight_drift: D = sum_s || (W_s - W_prev_s) * m_s ||, all tensors of a network in one launch each way.

The tensors lie anywhere; the kernels read their addresses from a table. Sums go block by block and then over the
blocks in order, so that results repeat bit for bit.
"""

import functools
import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv

from . import host
from .device import mask_of, slope_of
from .host import check

_BLOCK = 2048


@triton.jit
def _change(
    block, address_ptr, segment_ptr, first_block_ptr, offset_ptr, previous_ptr, a_ptr, threshold_ptr,
    MASKED: tl.constexpr, TYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """This block's segment, flat entries, W - W_prev, logits and threshold."""
    segment = tl.load(segment_ptr + block)
    local = (block - tl.load(first_block_ptr + segment)) * BLOCK + tl.arange(0, BLOCK)
    begin = tl.load(offset_ptr + segment)
    inside = local < tl.load(offset_ptr + segment + 1) - begin
    entry = begin + local
    w_ptr = tl.load(address_ptr + segment).to(tl.pointer_type(TYPE))
    w = tl.load(w_ptr + local, mask=inside, other=0).to(tl.float32)
    change = w - tl.load(previous_ptr + entry, mask=inside, other=0).to(tl.float32)
    a, threshold = change, 0.0
    if MASKED:
        a = tl.load(a_ptr + entry, mask=inside, other=0).to(tl.float32)
        threshold = tl.load(threshold_ptr + segment).to(tl.float32)
    return segment, entry, inside, change, a, threshold


@triton.jit
def _partial_sums(
    address_ptr, segment_ptr, first_block_ptr, offset_ptr, previous_ptr, a_ptr, threshold_ptr, partial_ptr,
    NORM: tl.constexpr, MASKED: tl.constexpr, TYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """partial[block] = sum |change m| or (change m)^2."""
    block = tl.program_id(0)
    _, _, _, change, a, threshold = _change(
        block, address_ptr, segment_ptr, first_block_ptr, offset_ptr, previous_ptr, a_ptr, threshold_ptr,
        MASKED, TYPE, BLOCK,
    )  # fmt: skip
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
    address_ptr, segment_ptr, first_block_ptr, offset_ptr, previous_ptr, a_ptr, threshold_ptr,
    grad_ptr, norms_ptr, dw_ptr, da_ptr, skipped,
    NORM: tl.constexpr, MASKED: tl.constexpr, TYPE: tl.constexpr, WANT_A: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dW = g m sign(c) and da = g (W - W_prev) sign(c) dm/da with c = (W - W_prev) m; norm 2: c / norm for sign."""
    segment, entry, inside, change, a, threshold = _change(
        tl.program_id(0), address_ptr, segment_ptr, first_block_ptr, offset_ptr, previous_ptr, a_ptr, threshold_ptr,
        MASKED, TYPE, BLOCK,
    )  # fmt: skip
    mask = mask_of(a, threshold, False) if MASKED else tl.full((BLOCK,), 1.0, tl.float32)
    c = change * mask
    if NORM == 1:
        direction = tl.where(c > 0, 1.0, tl.where(c < 0, -1.0, c))  # NaN stays
    else:
        norm = tl.load(norms_ptr + segment)
        direction = tl.where(norm == 0, 0.0, c / norm)
    direction *= tl.load(grad_ptr).to(tl.float32)
    tl.store(dw_ptr + entry - skipped, (direction * mask).to(dw_ptr.dtype.element_ty), mask=inside)
    if WANT_A:
        slope = slope_of(a, threshold)
        da = tl.where(slope == 0, 0.0, direction * change * slope)
        tl.store(da_ptr + entry, da.to(da_ptr.dtype.element_ty), mask=inside)


@functools.lru_cache(maxsize=256)
def _addresses(pointers: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(pointers, dtype=torch.int64, device=device)


@functools.lru_cache(maxsize=256)
def _blocks(offsets: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Segment of each block, first block of each segment (and one more), the offsets; all int64 on the device."""
    counts = [cdiv(end - begin, _BLOCK) for begin, end in itertools.pairwise(offsets)]
    segments = [s for s, count in enumerate(counts) for _ in range(count)]
    first = [0, *itertools.accumulate(counts)]
    return tuple(torch.tensor(t, dtype=torch.int64, device=device) for t in (segments, first, offsets))


def _tables(weights: Sequence[Tensor], offsets: Sequence[int], device: torch.device) -> tuple[tuple, list[Tensor]]:
    """The kernels' tables, and the contiguous weights they point to, to be kept until the launch is queued."""
    flat = [weight.contiguous() for weight in weights]
    segments, first, borders = _blocks(tuple(offsets), device)
    addresses = _addresses(tuple(weight.data_ptr() for weight in flat), device)
    return (addresses, segments, first, borders), flat


def _forward(weights, previous, offsets, norm, logits=None, thresholds=None) -> tuple[Tensor, Tensor]:
    host.check_runnable(previous)
    total, norms = _forward_shapes(weights, previous, offsets, norm, logits, thresholds)
    if not weights:
        return total.zero_(), norms
    tables, flat = _tables(weights, offsets, previous.device)
    partial = previous.new_empty(len(tables[1]), dtype=torch.float32)
    if len(partial) > 0:
        _partial_sums[(len(partial),)](
            *tables, previous.contiguous(), *_masking(logits, thresholds), partial,
            NORM=norm, MASKED=logits is not None, TYPE=host.TRITON_DTYPES[flat[0].dtype], BLOCK=_BLOCK, num_warps=8,
        )  # fmt: skip
    _norms[(1,)](partial, tables[2], norms, total, len(weights), NORM=norm, BLOCK=256)
    return total, norms


def _masking(logits: Tensor | None, thresholds: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if logits is None else (logits.contiguous(), thresholds.contiguous())


def _forward_shapes(weights, previous, offsets, norm, logits=None, thresholds=None) -> tuple[Tensor, Tensor]:
    _check(weights, previous, offsets, norm, logits, thresholds)
    return previous.new_empty((), dtype=torch.float32), previous.new_empty(len(weights), dtype=torch.float32)


def _check(weights, previous, offsets, norm, logits, thresholds) -> None:
    named = {f"weights[{s}]": weight for s, weight in enumerate(weights)}
    host.check_tensors(previous=previous, **named, logits=logits, thresholds=thresholds)
    check(len({weight.dtype for weight in weights}) <= 1, "all weights must have one dtype")
    check(norm in (1, 2), f"norm must be 1 or 2, not {norm}")
    check(len(offsets) == len(weights) + 1, f"offsets must be {len(weights) + 1} borders, not {len(offsets)}")
    for s, weight in enumerate(weights):
        check(
            weight.numel() == offsets[s + 1] - offsets[s],
            f"weights[{s}] has {weight.numel()} entries, its offsets say {offsets[s + 1] - offsets[s]}",
        )
    entries = offsets[-1]
    check(offsets[0] >= 0, f"offsets must begin at 0 or later, not {offsets[0]}")
    check(
        previous.dim() == 1 and len(previous) >= entries,
        f"previous must be flat with at least {entries} entries, not {tuple(previous.shape)}",
    )
    check((logits is None) == (thresholds is None), "give logits and thresholds, or neither")
    if logits is not None:
        check(
            logits.dim() == 1 and len(logits) >= entries,
            f"logits must be flat with at least {entries} entries, not {tuple(logits.shape)}",
        )
        check(
            thresholds.dim() == 1 and len(thresholds) >= len(weights),
            f"thresholds must be flat with at least {len(weights)} entries, not {tuple(thresholds.shape)}",
        )


def _backward(grad, norms, weights, previous, offsets, norm, logits, thresholds) -> tuple[Tensor, Tensor]:
    host.check_runnable(previous)
    dw, da = _backward_shapes(grad, norms, weights, previous, offsets, norm, logits, thresholds)
    if len(da) != len(dw):
        da.zero_()  # entries that no weight covers
    if len(dw) > 0:
        tables, flat = _tables(weights, offsets, previous.device)
        _gradients[(len(tables[1]),)](
            *tables, previous.contiguous(), *_masking(logits, thresholds), grad, norms, dw, da, offsets[0],
            NORM=norm, MASKED=logits is not None, TYPE=host.TRITON_DTYPES[flat[0].dtype],
            WANT_A=logits is not None, BLOCK=_BLOCK,
        )  # fmt: skip
    return dw, da


def _backward_shapes(grad, norms, weights, previous, offsets, norm, logits, thresholds) -> tuple[Tensor, Tensor]:
    like = weights[0] if weights else previous
    da = previous.new_empty(0) if logits is None else logits.new_empty(logits.shape)
    return like.new_empty(offsets[-1] - offsets[0]), da


def _setup_context(ctx, inputs, output) -> None:
    weights, previous, ctx.offsets, ctx.norm, logits, thresholds = inputs
    _, norms = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(norms, previous, logits, thresholds, *weights)


def _autograd(ctx, grad: Tensor | None, grad_norms: Tensor | None):
    norms, previous, logits, thresholds, *weights = ctx.saved_tensors
    if grad is None:
        return [None] * len(weights), None, None, None, None, None
    dw, da = torch.ops.hypermask_fast.triton_weight_drift_backward(
        grad, norms, weights, previous, ctx.offsets, ctx.norm, logits, thresholds
    )
    sizes = [weight.numel() for weight in weights]
    gradients = [g.view(weight.shape) for g, weight in zip(dw.split(sizes), weights, strict=True)]
    return gradients, None, None, None, None if logits is None else da, None


_INPUTS = "Tensor[] weights, Tensor previous, int[] offsets, int norm, Tensor? logits, Tensor? thresholds"
host.register(f"triton_weight_drift({_INPUTS}) -> (Tensor, Tensor)", _forward, _forward_shapes)
host.register(
    f"triton_weight_drift_backward(Tensor grad, Tensor norms, {_INPUTS}) -> (Tensor, Tensor)",
    _backward, _backward_shapes,
)  # fmt: skip
host.register_autograd("triton_weight_drift", _setup_context, _autograd)


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
    total, _ = torch.ops.hypermask_fast.triton_weight_drift(
        list(weights), previous, list(offsets), norm, logits, thresholds
    )
    return total
