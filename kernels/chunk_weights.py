"""Masked weights out of a chunked hypernetwork, and back: logits live in registers only, whatever the chunk size.

Laid out as (chunk, position) the hypernetwork's output is a plain product hidden output_weight^T, so a tile in those
coordinates is a tl.dot, and entry (chunk, position) belongs to weight entry chunk * C + position - start. Nothing
has to line up with the weight's rows.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import host, settings
from .device import gradient_of_logits, mask_of, masked_tile, multiple
from .host import cdiv
from .tiles import Tiles, launch_fitting


@triton.jit
def chunk_tile(
    hidden_ptr, ow_ptr, ob_ptr, chunk, chunks, position, chunk_size, h_chunk, h_width, o_position, o_width, o_bias,
    WIDTH: tl.constexpr, LAYER_BY: tl.constexpr, BLOCK_H: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Logits of (chunk, position) in float32; both are vectors of indices, outside ones give the bias or 0.
    Rows of the layer and hidden vectors begin at multiples of LAYER_BY entries."""
    h_chunk, o_position = multiple(h_chunk, LAYER_BY), multiple(o_position, LAYER_BY)
    bias = tl.load(ob_ptr + position * o_bias, mask=position < chunk_size, other=0).to(tl.float32)
    logits = tl.zeros((chunk.shape[0], position.shape[0]), tl.float32) + bias[None, :]
    for start in range(0, WIDTH, BLOCK_H):
        h = start + tl.arange(0, BLOCK_H)
        inside = (h < WIDTH)[:, None] & (position < chunk_size)[None, :]
        ow = tl.load(ow_ptr + position[None, :] * o_position + h[:, None] * o_width, mask=inside, other=0)
        inside = (chunk < chunks)[:, None] & (h < WIDTH)[None, :]
        hidden = tl.load(hidden_ptr + chunk[:, None] * h_chunk + h[None, :] * h_width, mask=inside, other=0)
        logits = tl.dot(hidden.to(ow.dtype), ow, logits, input_precision=PRECISION)
    return logits


@triton.jit(do_not_specialize=["start", "first_chunk"])
def _masked_weight(
    w_ptr, hidden_ptr, ow_ptr, ob_ptr, threshold_ptr, out_ptr,
    start, first_chunk, weights, chunks, chunk_size, h_chunk, h_width, o_position, o_width, o_bias,
    WIDTH: tl.constexpr, LAYER_BY: tl.constexpr, FLAT_BY: tl.constexpr, BLOCK_H: tl.constexpr,
    PRECISION: tl.constexpr, APPROXIMATE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """W * m for one tile of (chunk, position)."""
    start, chunk_size, weights = multiple(start, FLAT_BY), multiple(chunk_size, FLAT_BY), multiple(weights, FLAT_BY)
    chunk = (first_chunk + tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    position = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    logits = chunk_tile(
        hidden_ptr, ow_ptr, ob_ptr, chunk, chunks, position, chunk_size, h_chunk, h_width, o_position, o_width, o_bias,
        WIDTH, LAYER_BY, BLOCK_H, PRECISION,
    )  # fmt: skip
    entry = chunk[:, None] * chunk_size + position[None, :] - start
    inside = (position < chunk_size)[None, :] & (entry >= 0) & (entry < weights)
    w = tl.load(w_ptr + entry, mask=inside, other=0)
    masked = masked_tile(w, logits, tl.load(threshold_ptr).to(tl.float32), APPROXIMATE)
    tl.store(out_ptr + entry, masked.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["start", "first_chunk"])
def _gradients(
    g_ptr, w_ptr, hidden_ptr, ow_ptr, ob_ptr, threshold_ptr, dw_ptr, da_ptr,
    start, first_chunk, weights, chunks, chunk_size, h_chunk, h_width, o_position, o_width, o_bias,
    WANT_W: tl.constexpr, WANT_A: tl.constexpr, WIDTH: tl.constexpr, LAYER_BY: tl.constexpr, FLAT_BY: tl.constexpr,
    BLOCK_H: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dW = G m and da = G W dm/da for one tile of (chunk, position); da is 0 outside this weight."""
    start, chunk_size, weights = multiple(start, FLAT_BY), multiple(chunk_size, FLAT_BY), multiple(weights, FLAT_BY)
    local = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    chunk = (first_chunk + local).to(tl.int64)
    position = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    logits = chunk_tile(
        hidden_ptr, ow_ptr, ob_ptr, chunk, chunks, position, chunk_size, h_chunk, h_width, o_position, o_width, o_bias,
        WIDTH, LAYER_BY, BLOCK_H, PRECISION,
    )  # fmt: skip
    entry = chunk[:, None] * chunk_size + position[None, :] - start
    inside = (position < chunk_size)[None, :] & (entry >= 0) & (entry < weights)
    threshold = tl.load(threshold_ptr).to(tl.float32)
    gradient = tl.load(g_ptr + entry, mask=inside, other=0).to(tl.float32)
    if WANT_W:
        dw = gradient * mask_of(logits, threshold, False)
        tl.store(dw_ptr + entry, dw.to(dw_ptr.dtype.element_ty), mask=inside)
    if WANT_A:
        w = tl.load(w_ptr + entry, mask=inside, other=0).to(tl.float32)
        da = tl.where(inside, gradient_of_logits(gradient, w, logits, threshold), 0.0)
        at = local.to(tl.int64)[:, None] * chunk_size + position[None, :]
        last = (start + weights - 1) // chunk_size
        rows = (position < chunk_size)[None, :] & (chunk <= last)[:, None]
        tl.store(da_ptr + at, da.to(da_ptr.dtype.element_ty), mask=rows)


def _span(start: int, weights: int, chunk_size: int) -> tuple[int, int]:
    """First chunk that holds an entry of the weight, and how many do."""
    first = start // chunk_size
    return first, (start + weights - 1) // chunk_size + 1 - first


def _launch(
    kernel: Any, name: str, tensors: tuple[Tensor, ...], hidden: Tensor, output_weight: Tensor,
    output_bias: Tensor, start: int, weights: int, **constants: bool,
) -> None:  # fmt: skip
    """Either kernel, by its name in a warning: `tensors` are its arguments before `start`, `constants` its own ones."""
    chunk_size, width = output_weight.shape
    first, chunks = _span(start, weights, chunk_size)
    strides = *hidden.stride(), *output_weight.stride(), *output_bias.stride()

    def launch(tiles: Tiles) -> None:
        kernel[cdiv(chunk_size, tiles.block_n), cdiv(chunks, tiles.block_m)](
            *tensors, start, first, weights, len(hidden), chunk_size, *strides, **constants,
            WIDTH=width, LAYER_BY=layer_factor(hidden, output_weight),
            FLAT_BY=host.common_factor(start, chunk_size, weights),
            PRECISION=host.matmul_precision(output_weight.dtype), **tiles.launch_chunks(output_weight.dtype),
        )  # fmt: skip

    tiles = settings.chunk_tiles(chunks, chunk_size, width, output_weight.dtype, host.gpu(output_weight.device))
    launch_fitting(name, launch, tiles, *tensors)


def layer_factor(hidden: Tensor, output_weight: Tensor) -> int:
    """LAYER_BY of `chunk_tile`."""
    return host.common_factor(hidden.stride(0), output_weight.stride(0))


def launch_masked_weight(
    weight: Tensor, hidden: Tensor, output_weight: Tensor, output_bias: Tensor, start: int, threshold: Tensor,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """W * m in dtype, of W's shape, contiguous; the logits of entries start to start + numel are made on the way."""
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    if out.numel() == 0:
        return out
    layer = hidden, output_weight, output_bias
    tensors = weight.contiguous(), *layer, threshold, out
    constant = host.approximate_tanh(dtype)
    _launch(_masked_weight, "chunk_weights", tensors, *layer, start, weight.numel(), APPROXIMATE=constant)
    return out


def launch_gradients(
    gradient: Tensor, weight: Tensor, hidden: Tensor, output_weight: Tensor, output_bias: Tensor, start: int,
    threshold: Tensor, needed: tuple[bool, bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of W, hidden, output_weight and output_bias from that of W * m; unneeded ones come back empty."""
    want_weight, *want_layer = needed
    dw = weight.new_empty(weight.shape if want_weight else 0)
    if weight.numel() == 0:
        layer = (hidden, output_weight, output_bias)
        dh, d_layer, db = (t.new_zeros(t.shape if want else 0) for t, want in zip(layer, want_layer, strict=True))
        return dw, dh, d_layer, db
    first, chunks = _span(start, weight.numel(), len(output_weight))
    da = output_weight.new_empty((chunks, len(output_weight)) if any(want_layer) else 0)
    if any(needed):
        layer = hidden, output_weight, output_bias
        tensors = gradient.contiguous(), weight.contiguous(), *layer, threshold, dw, da
        wanted = {"WANT_W": want_weight, "WANT_A": any(want_layer)}
        _launch(_gradients, "chunk_weights' gradient", tensors, *layer, start, weight.numel(), **wanted)
    return dw, *_layer_gradients(da, hidden, output_weight, output_bias, first, want_layer)


def _layer_gradients(
    da: Tensor, hidden: Tensor, output_weight: Tensor, output_bias: Tensor, first: int, needed: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Of hidden, output_weight and output_bias, from da (chunks of this weight, C), which begins at chunk `first`."""
    want_hidden, want_weight, want_bias = needed
    rows = slice(first, first + len(da))
    dh, dw, db = hidden.new_empty(0), output_weight.new_empty(0), output_bias.new_empty(0)
    if want_hidden:
        dh = hidden.new_zeros(hidden.shape)
        dh[rows] = (da @ output_weight).to(hidden.dtype)
    if want_weight:
        dw = da.t() @ hidden[rows].to(da.dtype)
    if want_bias:
        db = da.sum(0, dtype=torch.float32).to(output_bias.dtype)
    return dh, dw, db
