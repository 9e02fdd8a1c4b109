"""masked_conv2d: y = conv2d(x, W * m) + b as an implicit GEMM, the mask made as the weight tile is loaded."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import arguments
from . import host, settings
from .conv2d_shape import Conv2dShape, pairs
from .device import gradient_of_logits, mask_of, masked_tile
from .host import cdiv
from .tiles import Tiles, launch_fitting


@triton.jit
def _tap(k, channels, KW: tl.constexpr, TAPS: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Index k of the reduction as (channel, kernel row, kernel column), in the order that x's memory likes."""
    if CHANNELS_LAST:
        channel, tap = k % channels, k // channels
    else:
        channel, tap = k // TAPS, k % TAPS
    return channel, tap // KW, tap % KW


@triton.jit
def _block_of_tap(index, KH: tl.constexpr, KW: tl.constexpr, BLOCK: tl.constexpr):
    """Block `index` of the reduction as (channels, kernel row, kernel column), all taps of the same channels in turn:
    they lie side by side in a contiguous weight, and in x they are neighbours, so that the later ones are at hand."""
    if KH * KW == 1:  # as constants, so that the compiler sees how the weight is aligned
        return index * BLOCK + tl.arange(0, BLOCK), 0, 0
    else:
        line = index // KW
        return line // KH * BLOCK + tl.arange(0, BLOCK), line % KH, index % KW


@triton.jit
def _pixel(pixel, height, width):
    """(image, row, column) of a pixel by two divisions, which are what the index arithmetic costs."""
    line = pixel // width
    n = line // height
    return n, line - n * height, pixel - line * width


@triton.jit
def _source(at, tap, size, STRIDE: tl.constexpr, PAD: tl.constexpr, DILATION: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Coordinate that an output coordinate reads through a tap, and whether there is one."""
    if TRANSPOSED:  # the gradient's view: output (at + pad - tap * dilation) / stride touched input `at`
        there = at + PAD - tap * DILATION
        source = there // STRIDE
        valid = (there >= 0) & (there % STRIDE == 0) & (source < size)
    else:
        source = at * STRIDE - PAD + tap * DILATION
        valid = (source >= 0) & (source < size)
    return source, valid


@triton.jit(do_not_specialize=["pixels"])
def _masked_convolution(
    x_ptr, w_ptr, a_ptr, threshold_ptr, bias_ptr, y_ptr,
    pixels, channels, in_channels, in_height, in_width, height, width,
    x_n, x_c, x_h, x_w, w_out, w_in, w_r, w_s, w_group, a_out, a_in, a_r, a_s, a_group, y_n, y_c, y_h, y_w,
    KH: tl.constexpr, KW: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    TRANSPOSED: tl.constexpr, CHANNELS_LAST: tl.constexpr, BY_TAP: tl.constexpr, HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr, APPROXIMATE: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y[n, c, :, :] = sum over a group's in_channels and taps of (W * m)[c, k] x[n, k, source]; with TRANSPOSED
    x is the output's gradient and y the input's. `channels` and `in_channels` count those of one group."""
    tiles_per_group = tl.cdiv(channels, BLOCK_M)
    group = tl.program_id(1) // tiles_per_group
    channel = (tl.program_id(1) % tiles_per_group) * BLOCK_M + tl.arange(0, BLOCK_M)
    pixel = tl.program_id(0).to(INDEX) * BLOCK_N + tl.arange(0, BLOCK_N)
    n, row, col = _pixel(pixel, height, width)
    threshold = tl.load(threshold_ptr).to(tl.float32)
    x_ptr += group.to(INDEX) * in_channels * x_c
    w_ptr += group * w_group
    a_ptr += group * a_group
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    reduced = in_channels * KH * KW
    blocks = tl.cdiv(in_channels, BLOCK_K)
    for step in range(KH * KW * blocks if BY_TAP else tl.cdiv(reduced, BLOCK_K)):
        if BY_TAP:  # one tap and a block of channels: pixels are located once for all of them
            c, r, s = _block_of_tap(step, KH, KW, BLOCK_K)
            known = c < in_channels
            h, h_valid = _source(row, r, in_height, STRIDE_H, PAD_H, DILATION_H, TRANSPOSED)
            q, q_valid = _source(col, s, in_width, STRIDE_W, PAD_W, DILATION_W, TRANSPOSED)
            pixel_at, valid = (n * x_n + h * x_h + q * x_w)[None, :], (h_valid & q_valid & (pixel < pixels))[None, :]
        else:
            k = step * BLOCK_K + tl.arange(0, BLOCK_K)
            known = k < reduced
            c, r, s = _tap(k, in_channels, KW, KH * KW, CHANNELS_LAST)
            h, h_valid = _source(row[None, :], r[:, None], in_height, STRIDE_H, PAD_H, DILATION_H, TRANSPOSED)
            q, q_valid = _source(col[None, :], s[:, None], in_width, STRIDE_W, PAD_W, DILATION_W, TRANSPOSED)
            pixel_at, valid = (n * x_n)[None, :] + h * x_h + q * x_w, h_valid & q_valid & (pixel < pixels)[None, :]
        x = tl.load(x_ptr + pixel_at + (c.to(INDEX) * x_c)[:, None], mask=valid & known[:, None], other=0)
        inside = (channel < channels)[:, None] & known[None, :]
        w_at = channel[:, None] * w_out + (c * w_in + r * w_r + s * w_s)[None, :]
        a_at = channel[:, None] * a_out + (c * a_in + r * a_r + s * a_s)[None, :]
        w = tl.load(w_ptr + w_at, mask=inside, other=0)
        a = tl.load(a_ptr + a_at, mask=inside, other=0)
        masked = masked_tile(w, a, threshold, APPROXIMATE).to(x.dtype)
        total = tl.dot(masked, x, total, input_precision=PRECISION)
    channel_of_all = group * channels + channel
    if HAS_BIAS:
        total += tl.load(bias_ptr + channel_of_all, mask=channel < channels, other=0).to(tl.float32)[:, None]
    inside = (channel < channels)[:, None] & (pixel < pixels)[None, :]
    y_at = (channel_of_all.to(INDEX) * y_c)[:, None] + (n * y_n + row * y_h + col * y_w)[None, :]
    tl.store(y_ptr + y_at, total.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _write_gradients(
    gradient, w_ptr, a_ptr, w_at, a_at, threshold, dw_ptr, da_ptr, dw_at, da_at, inside,
    WANT_W: tl.constexpr, WANT_A: tl.constexpr,
):  # fmt: skip
    """dW = G m and da = G W dm/da of one tile."""
    a = tl.load(a_ptr + a_at, mask=inside, other=0).to(tl.float32)
    if WANT_W:
        dw = gradient * mask_of(a, threshold, False)
        tl.store(dw_ptr + dw_at, dw.to(dw_ptr.dtype.element_ty), mask=inside)
    if WANT_A:
        w = tl.load(w_ptr + w_at, mask=inside, other=0).to(tl.float32)
        da = gradient_of_logits(gradient, w, a, threshold)
        tl.store(da_ptr + da_at, da.to(da_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["pixels", "steps"])
def _weight_gradient(
    dy_ptr, x_ptr, w_ptr, a_ptr, threshold_ptr, dw_ptr, da_ptr, partial_ptr,
    pixels, steps, channels, in_channels, in_height, in_width, height, width, weights,
    dy_n, dy_c, dy_h, dy_w, x_n, x_c, x_h, x_w, w_out, w_in, w_r, w_s, a_out, a_in, a_r, a_s,
    dw_out, dw_in, dw_r, dw_s, da_out, da_in, da_r, da_s,
    KH: tl.constexpr, KW: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, BY_TAP: tl.constexpr, SPLIT: tl.constexpr, WANT_W: tl.constexpr, WANT_A: tl.constexpr,
    PRECISION: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """G[c, k] = sum over this split's pixels of dy[c] x[source of k]; unsplit, the epilogue writes dW and da."""
    tiles_per_group = tl.cdiv(channels, BLOCK_M)
    group = tl.program_id(1) // tiles_per_group
    channel = (tl.program_id(1) % tiles_per_group) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
    reduced = in_channels * KH * KW
    if BY_TAP:  # a block of channels at one tap: pixels are located once for all of them
        c, r, s = _block_of_tap(tl.program_id(0), KH, KW, BLOCK_N)
        known = c < in_channels
    else:
        k = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        known = k < reduced
        c, r, s = _tap(k, in_channels, KW, KH * KW, CHANNELS_LAST)
    dy_ptr += group.to(INDEX) * channels * dy_c
    x_ptr += group.to(INDEX) * in_channels * x_c
    gradient = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first = split.to(INDEX) * steps * BLOCK_K + tl.arange(0, BLOCK_K)
    for step in range(steps):
        pixel = first + step * BLOCK_K
        n, row, col = _pixel(pixel, height, width)
        inside = (channel < channels)[:, None] & (pixel < pixels)[None, :]
        dy_at = (channel.to(INDEX) * dy_c)[:, None] + (n * dy_n + row * dy_h + col * dy_w)[None, :]
        dy = tl.load(dy_ptr + dy_at, mask=inside, other=0)
        if BY_TAP:
            h, h_valid = _source(row, r, in_height, STRIDE_H, PAD_H, DILATION_H, False)
            q, q_valid = _source(col, s, in_width, STRIDE_W, PAD_W, DILATION_W, False)
            pixel_at, valid = (n * x_n + h * x_h + q * x_w)[:, None], (h_valid & q_valid & (pixel < pixels))[:, None]
        else:
            h, h_valid = _source(row[:, None], r[None, :], in_height, STRIDE_H, PAD_H, DILATION_H, False)
            q, q_valid = _source(col[:, None], s[None, :], in_width, STRIDE_W, PAD_W, DILATION_W, False)
            pixel_at, valid = (n * x_n)[:, None] + h * x_h + q * x_w, h_valid & q_valid & (pixel < pixels)[:, None]
        x = tl.load(x_ptr + pixel_at + (c.to(INDEX) * x_c)[None, :], mask=valid & known[None, :], other=0)
        gradient = tl.dot(dy, x, gradient, input_precision=PRECISION)

    inside = (channel < channels)[:, None] & known[None, :]
    out = group * channels + channel
    if SPLIT:
        entry = out[:, None] * reduced + (c * (KH * KW) + r * KW + s)[None, :]
        tl.store(partial_ptr + split.to(INDEX) * weights + entry, gradient, mask=inside)
    else:
        _write_gradients(
            gradient, w_ptr, a_ptr,
            out[:, None] * w_out + (c * w_in + r * w_r + s * w_s)[None, :],
            out[:, None] * a_out + (c * a_in + r * a_r + s * a_s)[None, :],
            tl.load(threshold_ptr).to(tl.float32), dw_ptr, da_ptr,
            out[:, None] * dw_out + (c * dw_in + r * dw_r + s * dw_s)[None, :],
            out[:, None] * da_out + (c * da_in + r * da_r + s * da_s)[None, :],
            inside, WANT_W, WANT_A,
        )  # fmt: skip


@triton.jit
def _finish_gradients(
    partial_ptr, w_ptr, a_ptr, threshold_ptr, dw_ptr, da_ptr, weights, splits, in_channels,
    w_out, w_in, w_r, w_s, a_out, a_in, a_r, a_s, dw_out, dw_in, dw_r, dw_s, da_out, da_in, da_r, da_s,
    KW: tl.constexpr, TAPS: tl.constexpr, WANT_W: tl.constexpr, WANT_A: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add the splits' partial G in order, then dW and da."""
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < weights
    gradient = tl.zeros((BLOCK,), tl.float32)
    for _ in range(splits):
        gradient += tl.load(partial_ptr + entry, mask=inside, other=0)
        partial_ptr += weights
    out, k = entry // (in_channels * TAPS), entry % (in_channels * TAPS)
    c, r, s = _tap(k, in_channels, KW, TAPS, False)
    _write_gradients(
        gradient, w_ptr, a_ptr, out * w_out + c * w_in + r * w_r + s * w_s,
        out * a_out + c * a_in + r * a_r + s * a_s, tl.load(threshold_ptr).to(tl.float32), dw_ptr, da_ptr,
        out * dw_out + c * dw_in + r * dw_r + s * dw_s, out * da_out + c * da_in + r * da_r + s * da_s,
        inside, WANT_W, WANT_A,
    )  # fmt: skip


def _index_type(*tensors: Tensor) -> tl.dtype:
    """64-bit offsets only where a tensor reaches beyond 2^31 entries."""
    span = max(1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) for t in tensors)
    return host.index_type(span)


def _channels_last(x: Tensor) -> bool:
    return x.shape[1] > 1 and x.stride(1) == 1


def launch_convolution(
    x: Tensor, weight: Tensor, logits: Tensor, threshold: Tensor, bias: Tensor | None, y: Tensor,
    shape: Conv2dShape, transposed: bool = False, tiles: Tiles | None = None,
) -> None:  # fmt: skip
    """Fill y with conv2d(x, W * m) + bias; transposed: x is the output's gradient, y the input's."""
    if y.numel() == 0:
        return
    group_out, group_in = weight.shape[0] // shape.groups, weight.shape[1]
    channels, reduced = (group_in, group_out) if transposed else (group_out, group_in)
    pixels = y.shape[0] * y.shape[2] * y.shape[3]
    tiles = tiles or settings.convolution(
        channels, pixels, reduced, shape.taps, shape.groups, x.dtype, host.stored_bytes(weight, logits),
        host.gpu(x.device),
    )  # fmt: skip
    w, a = ((t.permute(1, 0, 2, 3) if transposed else t).stride() for t in (weight, logits))
    w_group, a_group = weight.stride(0) * group_out, logits.stride(0) * group_out

    def launch(tiles: Tiles) -> None:
        _masked_convolution[cdiv(pixels, tiles.block_n), cdiv(channels, tiles.block_m) * shape.groups](
            x, weight, logits, threshold, bias, y,
            pixels, channels, reduced, x.shape[2], x.shape[3], y.shape[2], y.shape[3],
            *x.stride(), *w, w_group, *a, a_group, *y.stride(),
            **shape.constants(), TRANSPOSED=transposed, CHANNELS_LAST=_channels_last(x),
            BY_TAP=settings.by_tap(reduced), HAS_BIAS=bias is not None, PRECISION=host.convolution_precision(x.dtype),
            APPROXIMATE=host.approximate_tanh(x.dtype), INDEX=_index_type(x, y), **tiles.launch(x.dtype),
        )  # fmt: skip

    launch_fitting("masked_conv2d", launch, tiles, x, weight, logits)


def launch_weight_gradient(
    grad: Tensor, x: Tensor, weight: Tensor, logits: Tensor, threshold: Tensor, shape: Conv2dShape,
    want_weight: bool = True, want_logits: bool = True, tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dW = G m and da = G W dm/da, each like its tensor; an unwanted one comes back empty."""
    dw = torch.empty_like(weight) if want_weight else weight.new_empty(0, 0, 0, 0)
    da = torch.empty_like(logits) if want_logits else logits.new_empty(0, 0, 0, 0)
    if weight.numel() == 0 or not (want_weight or want_logits):
        return dw, da
    channels, in_channels = weight.shape[0] // shape.groups, weight.shape[1]
    pixels = grad.shape[0] * grad.shape[2] * grad.shape[3]
    tiles = tiles or settings.convolution_gradient(
        channels, in_channels, pixels, shape.taps, shape.groups, x.dtype, host.gpu(x.device)
    )
    split = tiles.splits > 1
    partial = x.new_empty((tiles.splits, weight.numel()) if split else 0, dtype=torch.float32)
    strides = (*weight.stride(), *logits.stride(), *dw.stride(), *da.stride())
    constants = shape.constants()

    def launch(tiles: Tiles) -> None:
        columns = settings.convolution_columns(in_channels, shape.taps, tiles.block_n)
        grid = (columns, cdiv(channels, tiles.block_m) * shape.groups, tiles.splits)
        _weight_gradient[grid](
            grad, x, weight, logits, threshold, dw, da, partial,
            pixels, cdiv(cdiv(pixels, tiles.block_k), tiles.splits), channels, in_channels,
            x.shape[2], x.shape[3], grad.shape[2], grad.shape[3], weight.numel(),
            *grad.stride(), *x.stride(), *strides,
            **constants, CHANNELS_LAST=_channels_last(x), BY_TAP=settings.by_tap(in_channels), SPLIT=split,
            WANT_W=want_weight, WANT_A=want_logits, PRECISION=host.convolution_precision(x.dtype),
            INDEX=_index_type(x, grad), **tiles.launch(x.dtype),
        )  # fmt: skip

    launch_fitting("masked_conv2d's gradient", launch, tiles, x, weight, logits)
    if split:
        _finish_gradients[(cdiv(weight.numel(), 512),)](
            partial, weight, logits, threshold, dw, da, weight.numel(), tiles.splits, in_channels, *strides,
            KW=constants["KW"], TAPS=shape.taps, WANT_W=want_weight, WANT_A=want_logits, BLOCK=512,
        )  # fmt: skip
    return dw, da


def _check(x, weight, logits, threshold, bias, stride, padding, dilation, groups) -> None:
    host.check_tensors(x=x, weight=weight, logits=logits, threshold=threshold, bias=bias)
    arguments.masked_conv2d(x, weight, logits, threshold, bias, stride, padding, dilation, groups)


def _forward(x, weight, logits, threshold, bias, stride, padding, dilation, groups) -> Tensor:
    y = _forward_shapes(x, weight, logits, threshold, bias, stride, padding, dilation, groups)
    bias = None if bias is None else bias.contiguous()
    shape = Conv2dShape.of(weight, stride, padding, dilation, groups)
    launch_convolution(x, weight, logits, threshold, bias, y, shape)
    return y


def _forward_shapes(x, weight, logits, threshold, bias, stride, padding, dilation, groups) -> Tensor:
    _check(x, weight, logits, threshold, bias, stride, padding, dilation, groups)
    return Conv2dShape.of(weight, stride, padding, dilation, groups).new_output(x, weight)


def _backward(
    grad, x, weight, logits, threshold, stride, padding, dilation, groups, needed
) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, weight, logits, threshold, None, stride, padding, dilation, groups)
    host.check_tensors(x=x, grad=grad)
    shape = Conv2dShape.of(weight, stride, padding, dilation, groups)
    arguments.gradient(grad, shape.output(x, weight))
    want_x, want_weight, want_logits = needed
    dx = torch.empty_like(x) if want_x else x.new_empty(0, 0, 0, 0)
    if want_x:
        launch_convolution(grad, weight, logits, threshold, None, dx, shape, transposed=True)
    return dx, *launch_weight_gradient(grad, x, weight, logits, threshold, shape, want_weight, want_logits)


def _backward_shapes(grad, x, weight, logits, threshold, stride, padding, dilation, groups, needed):
    return tuple(
        torch.empty_like(t) if need else t.new_empty(0, 0, 0, 0)
        for t, need in zip((x, weight, logits), needed, strict=True)
    )


def _setup_context(ctx, inputs, output) -> None:
    x, weight, logits, threshold, bias, *ctx.shape = inputs
    ctx.save_for_backward(x, weight, logits, threshold)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _autograd(ctx, grad: Tensor):
    needs_x, needs_weight, needs_logits, _, needs_bias = ctx.needs_input_grad[:5]
    needed = (needs_x, needs_weight, needs_logits)
    op = torch.ops.hypermask_triton.masked_conv2d_backward
    gradients = op(grad, *ctx.saved_tensors, *ctx.shape, needed)
    bias = grad.sum((0, 2, 3), dtype=torch.float32).to(ctx.bias_dtype) if needs_bias else None
    return *host.none_if_unneeded(gradients, needed), None, bias, None, None, None, None


_CONVOLUTION = "int[2] stride, int[2] padding, int[2] dilation, int groups"
host.register(
    "masked_conv2d(Tensor x, Tensor weight, Tensor logits, Tensor threshold, Tensor? bias, "
    f"{_CONVOLUTION}) -> Tensor",
    _forward, _forward_shapes,
)  # fmt: skip
host.register(
    "masked_conv2d_backward(Tensor grad, Tensor x, Tensor weight, Tensor logits, Tensor threshold, "
    f"{_CONVOLUTION}, bool[3] needed) -> (Tensor, Tensor, Tensor)",
    _backward, _backward_shapes,
)  # fmt: skip
host.register_autograd("masked_conv2d", _setup_context, _autograd)


def masked_conv2d(
    x: Tensor,
    weight: Tensor,
    logits: Tensor,
    threshold: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Tensor:
    """y = conv2d(x, W * m) + b, m = |tanh a| where not |a| < threshold, else 0.

    Differentiable in x, weight, logits and bias; autocast and dtypes as `masked_linear`, TF32 by
    torch.backends.cudnn.conv.fp32_precision. The output has x's memory format.

    Args:
        x: (batch, in, height, width); weight, logits: (out, in / groups, kh, kw); threshold: one entry, on |a|;
            bias: (out,), used as it is. float32, float16 or bfloat16, any strides.

    Returns:
        (batch, out, height', width'), dtype of the products.

    Raises:
        InputError: shapes that do not fit, other dtypes, mixed devices, CPU tensors outside the interpreter.
    """
    return torch.ops.hypermask_triton.masked_conv2d(
        host.autocast(x), weight, logits, threshold, bias, *pairs(stride, padding, dilation), groups
    )
