"""chunk_masked_linear: y = x (W * m(a))^T + b with a's tiles generated in the kernel from a chunked hypernetwork."""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..ops import arguments, estimates, paths
from . import host, settings
from .chunk_weights import chunk_tile, launch_gradients, launch_masked_weight, layer_factor
from .device import masked_tile, multiple
from .host import cdiv
from .masked_linear import sum_splits
from .tiles import Tiles, launch_fitting


@triton.jit(do_not_specialize=["rows", "start"])
def _chunk_product(
    x_ptr, w_ptr, hidden_ptr, ow_ptr, ob_ptr, threshold_ptr, bias_ptr, y_ptr,
    rows, outputs, inputs, steps, start, chunks, chunk_size, residues, chunks_per_step,
    x_row, x_in, w_out, w_in, h_chunk, h_width, o_position, o_width, o_bias, y_split, y_row, y_out,
    HAS_BIAS: tl.constexpr, WIDTH: tl.constexpr, LAYER_BY: tl.constexpr, ROWS_BY: tl.constexpr, BLOCK_H: tl.constexpr,
    PRECISION: tl.constexpr, LOGITS_PRECISION: tl.constexpr, APPROXIMATE: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows out = residue + t * residues of W begin at the same position of their chunks, chunks_per_step apart:
    so a tile of them is hidden[chunk of t] output_weight[position of k]^T, one tl.dot."""
    inputs, x_row, w_out = multiple(inputs, ROWS_BY), multiple(x_row, ROWS_BY), multiple(w_out, ROWS_BY)
    tiles = tl.cdiv(tl.cdiv(outputs, residues), BLOCK_M)
    residue = tl.program_id(1) // tiles
    t = (tl.program_id(1) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    out = (residue + t * residues).to(tl.int64)
    row = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    split = tl.program_id(2)
    threshold = tl.load(threshold_ptr).to(tl.float32)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(split * steps, (split + 1) * steps):
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        first = start + residue.to(INDEX) * inputs + step * BLOCK_K
        chunk = (first // chunk_size).to(tl.int64) + t.to(tl.int64) * chunks_per_step
        position = (first % chunk_size).to(tl.int32) + tl.arange(0, BLOCK_K)
        logits = chunk_tile(
            hidden_ptr, ow_ptr, ob_ptr, chunk, chunks, position, chunk_size,
            h_chunk, h_width, o_position, o_width, o_bias, WIDTH, LAYER_BY, BLOCK_H, LOGITS_PRECISION,
        )  # fmt: skip
        inside = (out < outputs)[:, None] & (k < inputs)[None, :]
        w = tl.load(w_ptr + out[:, None] * w_out + k[None, :] * w_in, mask=inside, other=0)
        inside = (k < inputs)[:, None] & (row < rows)[None, :]
        x = tl.load(x_ptr + k[:, None] * x_in + row[None, :] * x_row, mask=inside, other=0)
        masked = tl.where((k < inputs)[None, :], masked_tile(w, logits, threshold, APPROXIMATE), 0.0)
        total = tl.dot(masked.to(x.dtype), x, total, input_precision=PRECISION)
    if HAS_BIAS:
        total += tl.load(bias_ptr + out, mask=out < outputs, other=0).to(tl.float32)[:, None]
    inside = (out < outputs)[:, None] & (row < rows)[None, :]
    y = y_ptr + split.to(tl.int64) * y_split + row[None, :] * y_row + out[:, None] * y_out
    tl.store(y, total.to(y_ptr.dtype.element_ty), mask=inside)


def aligned_block(outputs: int, inputs: int, chunk_size: int, start: int, block_k: int) -> int | None:
    """The largest block_k up to the given one with which no tile of `_chunk_product` crosses a chunk's end; None if
    there is none of 16 or more, or too few rows share their positions."""
    if outputs < 16 * (chunk_size // math.gcd(chunk_size, inputs)):
        return None
    if chunk_size % inputs == 0 and start % inputs == 0:  # whole rows in every chunk
        return block_k
    common = math.gcd(chunk_size, inputs, start)
    block_k = min(block_k, common & -common)
    return block_k if block_k >= 16 else None


def launch_fused(
    x: Tensor, weight: Tensor, hidden: Tensor, output_weight: Tensor, output_bias: Tensor, start: int,
    threshold: Tensor, bias: Tensor | None,
) -> Tensor | None:  # fmt: skip
    """x (rows, in) to (rows, out) by `_chunk_product`; None where `aligned_block` has none."""
    (outputs, inputs), chunk_size, width = weight.shape, len(output_weight), hidden.shape[1]
    residues = chunk_size // math.gcd(chunk_size, inputs)
    tiles = settings.chunk_product(len(x), cdiv(outputs, residues), residues, inputs, x.dtype, host.gpu(x.device))
    block_k = aligned_block(outputs, inputs, chunk_size, start, tiles.block_k)
    if block_k is None:
        return None
    tiles = replace(tiles, block_k=block_k)
    y = x.new_empty((len(x), outputs))
    split = tiles.splits > 1
    target = x.new_empty((tiles.splits, *y.shape), dtype=torch.float32) if split else y[None]
    index = host.index_type(len(hidden) * chunk_size)

    def launch(tiles: Tiles) -> None:
        per_residue = cdiv(cdiv(outputs, residues), tiles.block_m)
        _chunk_product[cdiv(len(x), tiles.block_n), residues * per_residue, tiles.splits](
            x, weight, hidden, output_weight, output_bias, threshold, bias, target,
            len(x), outputs, inputs, cdiv(cdiv(inputs, tiles.block_k), tiles.splits),
            start, len(hidden), chunk_size, residues, residues * inputs // chunk_size,
            *x.stride(), *weight.stride(), *hidden.stride(), *output_weight.stride(), *output_bias.stride(),
            *target.stride(), HAS_BIAS=bias is not None and not split,
            WIDTH=width, LAYER_BY=layer_factor(hidden, output_weight),
            ROWS_BY=host.common_factor(inputs, x.stride(0), weight.stride(0)),
            BLOCK_H=settings.width_block(width), PRECISION=host.matmul_precision(x.dtype),
            LOGITS_PRECISION=host.matmul_precision(output_weight.dtype),
            APPROXIMATE=host.approximate_tanh(x.dtype), INDEX=index, **tiles.launch(x.dtype),
        )  # fmt: skip

    launch_fitting("chunk_masked_linear", launch, tiles, x, weight, hidden, output_weight)
    return sum_splits(target, bias, y) if split else y


def _check(x, weight, hidden, output_weight, output_bias, start, threshold, bias) -> None:
    host.check_tensors(
        x=x, weight=weight, hidden=hidden, output_weight=output_weight, output_bias=output_bias,
        threshold=threshold, bias=bias,
    )  # fmt: skip
    arguments.chunk_masked_linear(x, weight, hidden, output_weight, output_bias, start, threshold, bias)


def _in_one_kernel(rows: Tensor, weight: Tensor, hidden: Tensor, output_weight: Tensor) -> bool:
    """Whether the count says so; see `estimates`."""
    if rows.numel() * weight.numel() == 0:
        return False
    dtype, tf32 = str(rows.dtype).removeprefix("torch."), host.matmul_precision(rows.dtype) == "tf32"
    (outputs, reduced), (chunk_size, width) = weight.shape, output_weight.shape
    call = estimates.Call(
        "chunk_masked_linear", len(rows), outputs, reduced, dtype, weight.element_size(), False, tf32=tf32,
        generated=True, chunk_size=chunk_size, width=width,
    )  # fmt: skip
    return estimates.in_one_kernel(call, paths.gpu_of(host.name(rows.device)))


def _forward(x, weight, hidden, output_weight, output_bias, start, threshold, bias) -> Tensor:
    _check(x, weight, hidden, output_weight, output_bias, start, threshold, bias)
    rows = host.rows_of(x)
    source = (weight, hidden, output_weight, output_bias, start, threshold)
    y = None
    if _in_one_kernel(rows, weight, hidden, output_weight):
        y = launch_fused(rows, *source, None if bias is None else bias.contiguous())
    if y is None:
        masked = launch_masked_weight(*source, x.dtype)
        y = F.linear(rows, masked, None if bias is None else bias.to(x.dtype))
    return y.view(*x.shape[:-1], weight.shape[0])


def _forward_shapes(x, weight, hidden, output_weight, output_bias, start, threshold, bias) -> Tensor:
    _check(x, weight, hidden, output_weight, output_bias, start, threshold, bias)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _backward(
    grad, x, weight, hidden, output_weight, output_bias, start, threshold, needed
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    source = (weight, hidden, output_weight, output_bias, start, threshold)
    _check(x, *source, None)
    host.check_tensors(x=x, grad=grad)
    arguments.gradient(grad, (*x.shape[:-1], weight.shape[0]))
    want_x, *want = needed
    grad_rows, dx = host.rows_of(grad), x.new_empty(0)
    if want_x:
        dx = (grad_rows @ launch_masked_weight(*source, x.dtype)).view(x.shape)
    gradient = grad_rows.t() @ host.rows_of(x) if any(want) else None
    if gradient is None:
        return dx, *(t.new_empty(0) for t in source[:4])
    return dx, *launch_gradients(gradient, *source, tuple(want))


def _backward_shapes(grad, x, weight, hidden, output_weight, output_bias, start, threshold, needed):
    tensors = (x, weight, hidden, output_weight, output_bias)
    return tuple(t.new_empty(t.shape if need else 0) for t, need in zip(tensors, needed, strict=True))


def _setup_context(ctx, inputs, output) -> None:
    *tensors, start, threshold, bias = inputs
    ctx.save_for_backward(*tensors, threshold)
    ctx.start, ctx.bias_dtype = start, None if bias is None else bias.dtype


def _autograd(ctx, grad: Tensor):
    *needed, _, _, needs_bias = ctx.needs_input_grad
    *tensors, threshold = ctx.saved_tensors
    gradients = torch.ops.hypermask_triton.chunk_masked_linear_backward(grad, *tensors, ctx.start, threshold, needed)
    bias = host.rows_of(grad).sum(0, dtype=torch.float32).to(ctx.bias_dtype) if needs_bias else None
    return *host.none_if_unneeded(gradients, tuple(needed)), None, None, bias


_SOURCE = "Tensor weight, Tensor hidden, Tensor output_weight, Tensor output_bias, int start, Tensor threshold"
host.register(f"chunk_masked_linear(Tensor x, {_SOURCE}, Tensor? bias) -> Tensor", _forward, _forward_shapes)
host.register(
    f"chunk_masked_linear_backward(Tensor grad, Tensor x, {_SOURCE}, bool[5] needed) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward, _backward_shapes,
)  # fmt: skip
host.register_autograd("chunk_masked_linear", _setup_context, _autograd)


def chunk_masked_linear(
    x: Tensor,
    weight: Tensor,
    hidden: Tensor,
    output_weight: Tensor,
    output_bias: Tensor,
    start: int,
    threshold: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """y = x (W * m(a))^T + b, a_f = hidden[f // C] . output_weight[f % C] + output_bias[f % C] for flat entry f.

    The weight's entries are f = start to start + numel, row by row; chunks need not line up with its rows. The
    logits stay in registers. With up to 64 rows of x and rows of W that recur in their chunks it is one kernel
    (plus one that adds up a split reduction), where counting says that this is the faster way; otherwise W * m is
    generated once, in (chunk, position) tiles, and cuBLAS multiplies.

    Differentiable in x, weight, hidden, output_weight, output_bias and bias. Products of x are in x's dtype (under
    autocast: autocast's), those of the logits in output_weight's, TF32 by torch.backends.cuda.matmul.fp32_precision.

    Args:
        x: (..., in); weight: (out, in); hidden: (chunks, H); output_weight: (C, H); output_bias: (C,).
        start: offset of the weight in the hypernetwork's flat output; threshold: one entry, on |a|.
        bias: (out,), used as it is. All float32, float16 or bfloat16, any strides.

    Returns:
        (..., out), dtype of the products.

    Raises:
        InputError: shapes that do not fit, entries beyond the last chunk, other dtypes, mixed devices, CPU tensors
            outside the interpreter.
    """
    return torch.ops.hypermask_triton.chunk_masked_linear(
        host.autocast(x), weight, hidden, output_weight, output_bias, start, threshold, bias
    )
