"""masked_linear: y = x (W * m)^T + b, the mask made from the logits as the weight tile is loaded."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import arguments
from . import host, settings
from .device import gradient_of_logits, mask_of, masked_tile, times8
from .host import cdiv
from .tiles import Tiles, launch_fitting


@triton.jit(do_not_specialize=["rows"])
def _masked_product(
    x_ptr, w_ptr, a_ptr, threshold_ptr, bias_ptr, y_ptr,
    rows, outputs, reduced, steps,
    x_row, x_red, w_out, w_red, a_out, a_red, y_split, y_row, y_out,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, APPROXIMATE: tl.constexpr, BY8: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y[row, out] = sum_red x[row, red] (W * m)[out, red] + bias[out] over this split's `steps` blocks of red.

    Forward and dx are the same product with W's strides swapped. The masked weight is the left operand, so that
    on Hopper it goes from registers into wgmma.
    """
    row = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    out = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    split = tl.program_id(2)
    outputs, reduced, x_row = times8(outputs, BY8 & 1), times8(reduced, BY8 & 2), times8(x_row, BY8 & 4)
    w_out, w_red = times8(w_out, BY8 & 8), times8(w_red, BY8 & 16)
    a_out, a_red = times8(a_out, BY8 & 32), times8(a_red, BY8 & 64)
    threshold = tl.load(threshold_ptr).to(tl.float32)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(split * steps, (split + 1) * steps):
        red = step * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = (out < outputs)[:, None] & (red < reduced)[None, :]
        w = tl.load(w_ptr + out[:, None] * w_out + red[None, :] * w_red, mask=inside, other=0)
        a = tl.load(a_ptr + out[:, None] * a_out + red[None, :] * a_red, mask=inside, other=0)
        inside = (red < reduced)[:, None] & (row < rows)[None, :]
        x = tl.load(x_ptr + red[:, None] * x_red + row[None, :] * x_row, mask=inside, other=0)
        masked = masked_tile(w, a, threshold, APPROXIMATE).to(x.dtype)
        total = tl.dot(masked, x, total, input_precision=PRECISION)
    if HAS_BIAS:
        total += tl.load(bias_ptr + out, mask=out < outputs, other=0).to(tl.float32)[:, None]
    inside = (out < outputs)[:, None] & (row < rows)[None, :]
    y = y_ptr + split.to(tl.int64) * y_split + row[None, :] * y_row + out[:, None] * y_out
    tl.store(y, total.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["size"])
def _sum_splits(
    partial_ptr,
    bias_ptr,
    y_ptr,
    size,
    outputs,
    splits,
    HAS_BIAS: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y = sum_s partial[s] + bias, always in the order of s, so that results repeat bit for bit."""
    entry = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < size
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        total += tl.load(partial_ptr + split * size.to(tl.int64) + entry, mask=inside, other=0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + entry % outputs, mask=inside, other=0).to(tl.float32)
    tl.store(y_ptr + entry, total.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _halves(tile):
    return tl.split(tl.permute(tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _column_parts(tile, PARTS: tl.constexpr):
    """A tile's columns in 1, 4 or 8 parts, so that what an epilogue holds beside it stays within the registers."""
    if PARTS == 1:
        parts = (tile,)
    else:
        left, right = _halves(tile)
        a, b = _halves(left)
        c, d = _halves(right)
        if PARTS == 4:
            parts = (a, b, c, d)
        else:
            a0, a1 = _halves(a)
            b0, b1 = _halves(b)
            c0, c1 = _halves(c)
            d0, d1 = _halves(d)
            parts = (a0, a1, b0, b1, c0, c1, d0, d1)
    return parts


@triton.jit(do_not_specialize=["rows"])
def _weight_gradient(
    dy_ptr, x_ptr, w_ptr, a_ptr, threshold_ptr, dw_ptr, da_ptr,
    rows, outputs, inputs, dy_row, dy_out, x_row, x_in, w_out, w_in, a_out, a_in,
    WANT_W: tl.constexpr, WANT_A: tl.constexpr, PRECISION: tl.constexpr, BY8: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """G = dy^T x in registers; out of it dW = G m and da = G W dm/da, each written once."""
    out = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    col = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    outputs, inputs = times8(outputs, BY8 & 1), times8(inputs, BY8 & 2)
    dy_row, x_row = times8(dy_row, BY8 & 4), times8(x_row, BY8 & 8)
    w_out, a_out = times8(w_out, BY8 & 16), times8(a_out, BY8 & 32)
    gradient = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, rows, BLOCK_K):
        row = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        inside = (out < outputs)[:, None] & (row < rows)[None, :]
        dy = tl.load(dy_ptr + row[None, :] * dy_row + out[:, None] * dy_out, mask=inside, other=0)
        inside = (row < rows)[:, None] & (col < inputs)[None, :]
        x = tl.load(x_ptr + row[:, None] * x_row + col[None, :] * x_in, mask=inside, other=0)
        gradient = tl.dot(dy, x, gradient, input_precision=PRECISION)

    threshold = tl.load(threshold_ptr).to(tl.float32)
    PARTS: tl.constexpr = 1 if BLOCK_N < 64 else 4 if BLOCK_N < 256 else 8
    WIDTH: tl.constexpr = BLOCK_N // PARTS
    parts = _column_parts(gradient, PARTS)
    for part in tl.static_range(PARTS):
        col = tl.program_id(0) * BLOCK_N + part * WIDTH + tl.arange(0, WIDTH)
        inside = (out < outputs)[:, None] & (col < inputs)[None, :]
        a = tl.load(a_ptr + out[:, None] * a_out + col[None, :] * a_in, mask=inside, other=0).to(tl.float32)
        entry = out[:, None] * inputs + col[None, :]
        if WANT_W:
            dw = parts[part] * mask_of(a, threshold, False)
            tl.store(dw_ptr + entry, dw.to(dw_ptr.dtype.element_ty), mask=inside)
        if WANT_A:
            w = tl.load(w_ptr + out[:, None] * w_out + col[None, :] * w_in, mask=inside, other=0).to(tl.float32)
            da = gradient_of_logits(parts[part], w, a, threshold)
            tl.store(da_ptr + entry, da.to(da_ptr.dtype.element_ty), mask=inside)


def sum_splits(partial: Tensor, bias: Tensor | None, y: Tensor) -> Tensor:
    """y (rows, out) = partial (splits, rows, out) summed, plus bias; y is returned."""
    _sum_splits[(cdiv(y.numel(), 1024),)](
        partial, bias, y, y.numel(), y.shape[1], len(partial), HAS_BIAS=bias is not None,
        INDEX=host.index_type(y.numel()), BLOCK=1024,
    )  # fmt: skip
    return y


def launch_product(
    x: Tensor,
    weight: Tensor,
    logits: Tensor,
    threshold: Tensor,
    bias: Tensor | None,
    tiles: Tiles | None = None,
) -> Tensor:
    """x (rows, red), weight and logits (out, red) of any strides: x (W * m)^T + bias, (rows, out) contiguous."""
    (rows, reduced), outputs = x.shape, weight.shape[0]
    y = x.new_empty((rows, outputs))
    if y.numel() == 0:
        return y
    stored = host.stored_bytes(weight, logits)
    tiles = tiles or settings.masked_product(rows, outputs, reduced, x.dtype, stored, host.gpu(x.device))
    split = tiles.splits > 1
    target = x.new_empty((tiles.splits, rows, outputs), dtype=torch.float32) if split else y[None]

    def launch(tiles: Tiles) -> None:
        grid = (cdiv(rows, tiles.block_n), cdiv(outputs, tiles.block_m), tiles.splits)
        _masked_product[grid](
            x, weight, logits, threshold, bias, target, rows, outputs, reduced,
            cdiv(cdiv(reduced, tiles.block_k), tiles.splits),
            *x.stride(), *weight.stride(), *logits.stride(), *target.stride(),
            HAS_BIAS=bias is not None and not split, PRECISION=host.matmul_precision(x.dtype),
            APPROXIMATE=host.approximate_tanh(x.dtype),
            BY8=host.multiples_of_8(outputs, reduced, x.stride(0), *weight.stride(), *logits.stride()),
            **tiles.launch(x.dtype),
        )  # fmt: skip

    launch_fitting("masked_linear", launch, tiles, x, weight, logits)
    return sum_splits(target, bias, y) if split else y


def launch_weight_gradient(
    grad: Tensor, x: Tensor, weight: Tensor, logits: Tensor, threshold: Tensor,
    want_weight: bool = True, want_logits: bool = True, tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dW = G m and da = G W dm/da with G = grad^T x, each (out, in); an unwanted one comes back empty."""
    outputs, inputs = weight.shape
    dw = weight.new_empty(weight.shape if want_weight else 0)
    da = logits.new_empty(logits.shape if want_logits else 0)
    if weight.numel() == 0 or not (want_weight or want_logits):
        return dw, da
    tiles = tiles or settings.weight_gradient(outputs, inputs, len(x), x.dtype, host.gpu(x.device))

    def launch(tiles: Tiles) -> None:
        _weight_gradient[cdiv(inputs, tiles.block_n), cdiv(outputs, tiles.block_m)](
            grad, x, weight, logits, threshold, dw, da, len(x), outputs, inputs,
            *grad.stride(), *x.stride(), *weight.stride(), *logits.stride(),
            WANT_W=want_weight, WANT_A=want_logits, PRECISION=host.matmul_precision(x.dtype),
            BY8=host.multiples_of_8(outputs, inputs, *(t.stride(0) for t in (grad, x, weight, logits))),
            **tiles.launch(x.dtype),
        )  # fmt: skip

    launch_fitting("masked_linear's gradient", launch, tiles, x, weight, logits)
    return dw, da


def _check(x: Tensor, weight: Tensor, logits: Tensor, threshold: Tensor, bias: Tensor | None) -> None:
    host.check_tensors(x=x, weight=weight, logits=logits, threshold=threshold, bias=bias)
    arguments.masked_linear(x, weight, logits, threshold, bias)


def _forward(x: Tensor, weight: Tensor, logits: Tensor, threshold: Tensor, bias: Tensor | None) -> Tensor:
    _check(x, weight, logits, threshold, bias)
    bias = None if bias is None else bias.contiguous()
    y = launch_product(host.rows_of(x), weight, logits, threshold, bias)
    return y.view(*x.shape[:-1], weight.shape[0])


def _forward_shapes(x: Tensor, weight: Tensor, logits: Tensor, threshold: Tensor, bias: Tensor | None) -> Tensor:
    _check(x, weight, logits, threshold, bias)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, logits: Tensor, threshold: Tensor, needed: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    host.check_tensors(grad=grad, x=x, weight=weight, logits=logits, threshold=threshold)
    arguments.masked_linear(x, weight, logits, threshold, None)
    arguments.gradient(grad, (*x.shape[:-1], weight.shape[0]))
    want_x, want_weight, want_logits = needed
    grad = host.rows_of(grad)
    dx = launch_product(grad, weight.t(), logits.t(), threshold, None).view(x.shape) if want_x else x.new_empty(0)
    return dx, *launch_weight_gradient(grad, host.rows_of(x), weight, logits, threshold, want_weight, want_logits)


def _backward_shapes(
    grad: Tensor, x: Tensor, weight: Tensor, logits: Tensor, threshold: Tensor, needed: list[bool]
) -> tuple[Tensor, ...]:
    shapes = [(t, t.shape if need else 0) for t, need in zip((x, weight, logits), needed, strict=True)]
    return tuple(t.new_empty(shape) for t, shape in shapes)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, logits, threshold, bias = inputs
    ctx.save_for_backward(x, weight, logits, threshold)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _autograd(ctx, grad: Tensor):
    needs_x, needs_weight, needs_logits, _, needs_bias = ctx.needs_input_grad
    needed = (needs_x, needs_weight, needs_logits)
    gradients = torch.ops.hypermask_triton.masked_linear_backward(grad, *ctx.saved_tensors, needed)
    bias = host.rows_of(grad).sum(0, dtype=torch.float32).to(ctx.bias_dtype) if needs_bias else None
    return *host.none_if_unneeded(gradients, needed), None, bias


host.register(
    "masked_linear(Tensor x, Tensor weight, Tensor logits, Tensor threshold, Tensor? bias) -> Tensor",
    _forward, _forward_shapes,
)  # fmt: skip
host.register(
    "masked_linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor logits, Tensor threshold, "
    "bool[3] needed) -> (Tensor, Tensor, Tensor)",
    _backward, _backward_shapes,
)  # fmt: skip
host.register_autograd("masked_linear", _setup_context, _autograd)


def masked_linear(x: Tensor, weight: Tensor, logits: Tensor, threshold: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x (W * m)^T + b, m = |tanh a| where not |a| < threshold, else 0.

    Differentiable in x, weight, logits and bias, each gradient in its tensor's own dtype. Products are in x's dtype
    (under autocast: autocast's), float32 as IEEE or TF32 by torch.backends.cuda.matmul.fp32_precision; sums are in
    float32, the mask is applied in float32 to the weight as stored.

    Args:
        x: (..., in); weight, logits: (out, in); threshold: one entry, on |a|; bias: (out,), used as it is.
            float32, float16 or bfloat16, each its own, any strides.

    Returns:
        (..., out), dtype of the products.

    Raises:
        InputError: shapes that do not fit, other dtypes, mixed devices, CPU tensors outside the interpreter.
    """
    return torch.ops.hypermask_triton.masked_linear(host.autocast(x), weight, logits, threshold, bias)
