"""The CUDA ops for a few rows of x: shape functions, gradients, and what they can serve.

masked_linear and chunk_masked_linear for up to 16 rows, where the bytes of W decide the time (csrc/cuda/few_rows.cu and
chunk_few_rows.cu). Their backward passes are Triton's kernels where Triton is there, which keep no logits of a chunked
hypernetwork in memory; else PyTorch's own products on the mask in float32: right in every dtype, not fast.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from .. import registry as backends
from .. import triton as triton_backend
from ..paths import MAX_ROWS

MAX_WIDTH = 512  # of the hypernetwork; shared memory holds a block's hidden vectors and output layer
_STEP = 384  # entries of the reduction that a block of the chunked kernel takes at a time
_HALVES = (torch.float16, torch.bfloat16)


# Gradients


def _mask_and_slope(logits: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """m and dm/da in float32."""
    a = logits.float()
    kept = ~(a.abs() < threshold.reshape(()))
    tanh = a.tanh()
    return torch.where(kept, tanh.abs(), 0.0), torch.where(kept, a.sign() * (1 - tanh * tanh), 0.0)


def _product_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, logits: Tensor, threshold: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dx = dy (W * m), dW = G m and da = G W dm/da with G = dy^T x; da in float32."""
    mask, slope = _mask_and_slope(logits, threshold)
    outer = (grad.t() @ x).float()
    dx = grad @ (weight * mask).to(x.dtype)
    da = torch.where(slope == 0, 0.0, outer * weight * slope)
    return dx, (outer * mask).to(weight.dtype), da


def _triton_gradients(op: str, ctx, grad: Tensor, *args) -> list[Tensor | None] | None:
    """Those of an op's leading tensors by Triton's backward pass, None for each that nobody asked for; None without
    Triton."""
    if backends.problem("triton") or triton_backend.condition(grad):
        return None
    from ... import kernels  # defines the operators

    count = {"masked_linear": 3, "chunk_masked_linear": 5}[op]
    needed = ctx.needs_input_grad[:count]
    gradients = getattr(torch.ops.hypermask_fast, f"{op}_backward")(grad, *args, needed)
    return kernels.host.none_if_unneeded(gradients, needed)


def _bias_gradient(ctx, grad: Tensor) -> Tensor | None:
    return grad.sum(0, dtype=torch.float32).to(grad.dtype) if ctx.needs_input_grad[-1] else None


def _masked_linear_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:4])


def _masked_linear_backward(ctx, grad):
    gradients = _triton_gradients("masked_linear", ctx, grad, *ctx.saved_tensors)
    if gradients is None:
        dx, dw, da = _product_gradients(grad, *ctx.saved_tensors)
        gradients = dx, dw, da.to(dw.dtype)
    return *gradients, None, _bias_gradient(ctx, grad)


def _chunk_masked_linear_setup(ctx, inputs, output) -> None:
    *tensors, ctx.start, threshold, _ = inputs
    ctx.save_for_backward(*tensors, threshold)


def _chunk_masked_linear_backward(ctx, grad):
    *tensors, threshold = ctx.saved_tensors
    gradients = _triton_gradients("chunk_masked_linear", ctx, grad, *tensors, ctx.start, threshold)
    if gradients is None:
        gradients = _chunk_gradients(grad, *tensors, ctx.start, threshold)
    return *gradients, None, None, _bias_gradient(ctx, grad)


def _chunk_gradients(grad, x, weight, hidden, output_weight, output_bias, start, threshold) -> tuple[Tensor, ...]:
    """Of x, W, the hidden vectors and the output layer, out of this weight's logits in float32."""
    size, (chunk_size, _) = weight.numel(), output_weight.shape
    if size == 0:
        return tuple(torch.zeros_like(t) for t in (x, weight, hidden, output_weight, output_bias))
    first, last = start // chunk_size, (start + size - 1) // chunk_size + 1
    h, layer, offset = hidden[first:last].float(), output_weight.float(), start - first * chunk_size
    logits = reference.chunk_logits(h, layer, output_bias.float(), offset, weight.shape)
    dx, dw, da = _product_gradients(grad, x, weight, logits, threshold)
    chunks = F.pad(da.flatten(), (offset, (last - first) * chunk_size - offset - size)).view(-1, chunk_size)
    dh = F.pad(chunks @ layer, (0, 0, first, len(hidden) - last)).to(hidden.dtype)
    d_layer = (chunks.t() @ h).to(output_weight.dtype)
    return dx, dw, dh, d_layer, chunks.sum(0).to(output_bias.dtype)


# Calls with the reference's signatures, and what they can't serve


def _rows(x: Tensor) -> Tensor:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).contiguous()


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [t if t is None else t.contiguous() for t in tensors]


def _masked_linear(x, weight, logits, threshold, bias=None):
    tensors = _contiguous(weight, logits, threshold.detach(), bias)
    y = torch.ops.hypermask_native.masked_linear(_rows(x), *tensors)
    return y.view(*x.shape[:-1], weight.shape[0])


def _chunk_masked_linear(x, weight, hidden, output_weight, output_bias, start, threshold, bias=None):
    tensors = _contiguous(weight, hidden, output_weight, output_bias)
    y = torch.ops.hypermask_native.chunk_masked_linear(
        _rows(x), *tensors, start, *_contiguous(threshold.detach(), bias)
    )
    return y.view(*x.shape[:-1], weight.shape[0])


def _layer_condition(x: Tensor, weight: Tensor, threshold: Tensor, bias: Tensor | None, *others: Tensor) -> str:
    layer = [weight, *others, *([] if bias is None else [bias])]
    rows = math.prod(x.shape[:-1])
    if rows > MAX_ROWS:
        return f"{rows} rows of x are more than {MAX_ROWS}"
    if any(t.dtype != x.dtype for t in layer) or threshold.dtype not in (x.dtype, torch.float32):
        return "x and the layer differ in dtype"
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != x.dtype:
        return "autocast asks for another dtype"
    if any(t.device != x.device for t in (*layer, threshold)):
        return "x and the layer are on different devices"
    fits = weight.dim() == 2 and x.dim() > 0 and x.shape[-1] == weight.shape[1] and threshold.numel() == 1
    fits = fits and (bias is None or bias.shape == weight.shape[:1])
    return "" if fits else "x, weight, threshold and bias do not fit"


def _masked_linear_condition(x, weight, logits, threshold, bias=None):
    if logits.shape != weight.shape:
        return "weight and logits differ in shape"
    return _layer_condition(x, weight, threshold, bias, logits)


def _chunk_masked_linear_condition(x, weight, hidden, output_weight, output_bias, start, threshold, bias=None):
    if problem := _layer_condition(x, weight, threshold, bias, hidden, output_weight, output_bias):
        return problem
    if hidden.dim() != 2 or output_weight.dim() != 2 or hidden.shape[1] != output_weight.shape[1]:
        return "hidden and output_weight do not fit"
    if output_bias.shape != output_weight.shape[:1]:
        return "output_weight and output_bias do not fit"
    (outputs, inputs), (chunk_size, width) = weight.shape, output_weight.shape
    if start < 0 or start + weight.numel() > len(hidden) * chunk_size:
        return "the chunks do not generate the weight's entries"
    if width > MAX_WIDTH:
        return f"the hypernetwork is {width} wide, more than {MAX_WIDTH}"
    if chunk_size < min(inputs, _STEP):
        return f"chunks of {chunk_size} entries are shorter than the {min(inputs, _STEP)} that a block takes at a time"
    if weight.numel() and outputs * math.gcd(chunk_size, inputs) < 16 * chunk_size:
        return "fewer than 16 rows of the weight have their positions in the chunks in common"
    return ""


def _fake(x, weight, *rest):
    return x.new_empty(x.shape[0], weight.shape[0])


FAKES = {"masked_linear": _fake, "chunk_masked_linear": _fake}
GRADIENTS = {
    "masked_linear": (_masked_linear_backward, _masked_linear_setup),
    "chunk_masked_linear": (_chunk_masked_linear_backward, _chunk_masked_linear_setup),
}
# In float32 the logits' 2 H operations an entry would outlast the bytes many times.
CALLS = {
    "masked_linear": (_masked_linear, _masked_linear_condition, (torch.float32, *_HALVES)),
    "chunk_masked_linear": (_chunk_masked_linear, _chunk_masked_linear_condition, _HALVES),
}
