"""chunk_masked_conv2d: y = conv2d(x, W * m(a)) + b with a generated from a chunked hypernetwork, never stored.

A convolution reads its small weight once per tile of pixels, so W * m is made once (in one launch, the logits in
registers) and not once per tile: generating them again costs H products per weight and tile.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import arguments
from . import host
from .chunk_weights import launch_gradients, launch_masked_weight
from .conv2d_shape import Conv2dShape, pairs


def _check(
    x, weight, hidden, output_weight, output_bias, start, threshold, bias, stride, padding, dilation, groups
) -> None:
    host.check_tensors(
        x=x, weight=weight, hidden=hidden, output_weight=output_weight, output_bias=output_bias,
        threshold=threshold, bias=bias,
    )  # fmt: skip
    arguments.chunk_masked_conv2d(
        x, weight, hidden, output_weight, output_bias, start, threshold, bias, stride, padding, dilation, groups
    )


def _forward(
    x, weight, hidden, output_weight, output_bias, start, threshold, bias, stride, padding, dilation, groups
) -> Tensor:
    source = (weight, hidden, output_weight, output_bias, start, threshold)
    _check(x, *source, bias, stride, padding, dilation, groups)
    masked = launch_masked_weight(*source, x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    return F.conv2d(x, masked, bias, stride, padding, dilation, groups)


def _forward_shapes(
    x, weight, hidden, output_weight, output_bias, start, threshold, bias, stride, padding, dilation, groups
) -> Tensor:
    source = (weight, hidden, output_weight, output_bias, start, threshold)
    _check(x, *source, bias, stride, padding, dilation, groups)
    return F.conv2d(x, weight.to(x.dtype).contiguous(), None, stride, padding, dilation, groups)


def _backward(
    grad,
    x,
    weight,
    hidden,
    output_weight,
    output_bias,
    start,
    threshold,
    stride,
    padding,
    dilation,
    groups,
    needed,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    source = (weight, hidden, output_weight, output_bias, start, threshold)
    _check(x, *source, None, stride, padding, dilation, groups)
    host.check_tensors(x=x, grad=grad)
    arguments.gradient(grad, Conv2dShape.of(weight, stride, padding, dilation, groups).output(x, weight))
    want_x, *want = needed
    masked = launch_masked_weight(*source, x.dtype)
    dx, gradient, _ = torch.ops.aten.convolution_backward(
        grad, x, masked, None, stride, padding, dilation, False, (0, 0), groups, (want_x, any(want), False)
    )
    dx = dx if want_x else x.new_empty(0)
    if not any(want):
        return dx, *(t.new_empty(0) for t in source[:4])
    return dx, *launch_gradients(gradient, *source, tuple(want))


def _backward_shapes(
    grad,
    x,
    weight,
    hidden,
    output_weight,
    output_bias,
    start,
    threshold,
    stride,
    padding,
    dilation,
    groups,
    needed,
):
    masked = torch.empty(weight.shape, dtype=x.dtype, device=x.device)
    dx, _, _ = torch.ops.aten.convolution_backward(
        grad, x, masked, None, stride, padding, dilation, False, (0, 0), groups, (needed[0], False, False)
    )
    tensors = (weight, hidden, output_weight, output_bias)
    rest = (t.new_empty(t.shape if need else 0) for t, need in zip(tensors, needed[1:], strict=True))
    return dx if needed[0] else x.new_empty(0), *rest


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.start, threshold, bias = inputs[:8]
    ctx.shape = inputs[8:]
    ctx.save_for_backward(*tensors, threshold)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _autograd(ctx, grad: Tensor):
    *needed, _, _, needs_bias = ctx.needs_input_grad[:8]
    *tensors, threshold = ctx.saved_tensors
    gradients = torch.ops.hypermask_triton.chunk_masked_conv2d_backward(
        grad, *tensors, ctx.start, threshold, *ctx.shape, needed
    )
    bias = grad.sum((0, 2, 3), dtype=torch.float32).to(ctx.bias_dtype) if needs_bias else None
    return *host.none_if_unneeded(gradients, tuple(needed)), None, None, bias, None, None, None, None


_SOURCE = "Tensor weight, Tensor hidden, Tensor output_weight, Tensor output_bias, int start, Tensor threshold"
_CONVOLUTION = "int[2] stride, int[2] padding, int[2] dilation, int groups"
host.register(
    f"chunk_masked_conv2d(Tensor x, {_SOURCE}, Tensor? bias, {_CONVOLUTION}) -> Tensor",
    _forward, _forward_shapes,
)  # fmt: skip
host.register(
    f"chunk_masked_conv2d_backward(Tensor grad, Tensor x, {_SOURCE}, {_CONVOLUTION}, bool[5] needed) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward, _backward_shapes,
)  # fmt: skip
host.register_autograd("chunk_masked_conv2d", _setup_context, _autograd)


def chunk_masked_conv2d(
    x: Tensor,
    weight: Tensor,
    hidden: Tensor,
    output_weight: Tensor,
    output_bias: Tensor,
    start: int,
    threshold: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Tensor:
    """y = conv2d(x, W * m(a)) + b, a_f = hidden[f // C] . output_weight[f % C] + output_bias[f % C].

    The weight's entries are f = start to start + numel in row-major order; chunks need not line up with anything.
    One launch generates W * m with the logits in registers, cuDNN convolves; backward likewise. Differentiable in
    x, weight, hidden, output_weight, output_bias and bias.

    Args:
        x: (batch, in, height, width); weight: (out, in / groups, kh, kw); hidden: (chunks, H);
            output_weight: (C, H); output_bias: (C,); start: offset of the weight in the flat output;
            threshold: one entry, on |a|; bias: (out,), used as it is. All float32, float16 or bfloat16.

    Returns:
        (batch, out, height', width'), dtype of the products.

    Raises:
        InputError: shapes that do not fit, entries beyond the last chunk, other dtypes, mixed devices, CPU tensors
            outside the interpreter.
    """
    return torch.ops.hypermask_triton.chunk_masked_conv2d(
        host.autocast(x), weight, hidden, output_weight, output_bias, start, threshold, bias,
        *pairs(stride, padding, dilation), groups,
    )  # fmt: skip
