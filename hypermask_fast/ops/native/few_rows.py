"""masked_linear and chunk_masked_linear by CUDA for few rows of x, where the bytes of W decide the time.

Their backward passes are Triton's kernels where Triton is there, which keep no logits of a chunked hypernetwork in
memory; else PyTorch's own products on the mask in float32: right in every dtype, not fast.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference, registry, triton
from ..paths import FEWEST_ROWS, few_rows
from . import operator

MAX_WIDTH = 512  # of the hypernetwork; shared memory holds a block's hidden vectors and output layer
_STEP = 384  # entries of the reduction that a block of the chunked kernel takes at a time
# In float32 the generated logits' 2 H operations an entry would outlast the bytes many times.
DTYPES, CHUNK_DTYPES = (torch.float32, torch.float16, torch.bfloat16), (torch.float16, torch.bfloat16)


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


def _triton_gradients(ctx, op: str, grad: Tensor, leading: Sequence[Tensor], *rest) -> Sequence[Tensor | None] | None:
    """The gradients of an op's leading tensors by Triton's backward pass, None for each that nobody asked for; None
    without Triton. rest: the op's other arguments but the bias."""
    if registry.problem("triton") or triton.condition(grad):
        return None
    needed = ctx.needs_input_grad[: len(leading)]
    gradients = triton.operator(f"{op}_backward")(grad, *leading, *rest, needed)
    return [g if need else None for g, need in zip(gradients, needed, strict=True)]


def _bias_gradient(ctx, grad: Tensor) -> Tensor | None:
    return grad.sum(0, dtype=torch.float32).to(grad.dtype) if ctx.needs_input_grad[-1] else None


def _masked_linear_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:4])


def _masked_linear_backward(ctx, grad):
    x, weight, logits, threshold = ctx.saved_tensors
    gradients = _triton_gradients(ctx, "masked_linear", grad, (x, weight, logits), threshold)
    if gradients is None:
        dx, dw, da = _product_gradients(grad, x, weight, logits, threshold)
        gradients = dx, dw, da.to(dw.dtype)
    return *gradients, None, _bias_gradient(ctx, grad)


def _chunk_masked_linear_setup(ctx, inputs, output) -> None:
    *tensors, ctx.start, threshold, _ = inputs
    ctx.save_for_backward(*tensors, threshold)


def _chunk_masked_linear_backward(ctx, grad):
    *tensors, threshold = ctx.saved_tensors
    gradients = _triton_gradients(ctx, "chunk_masked_linear", grad, tensors, ctx.start, threshold)
    if gradients is None:
        gradients = _chunk_gradients(grad, *tensors, start=ctx.start, threshold=threshold)
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


# Calls with the reference's arguments, and what they can't serve


def _rows(x: Tensor) -> Tensor:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).contiguous()


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [t if t is None else t.contiguous() for t in tensors]


def masked_linear(x, weight, logits, threshold, bias):
    tensors = _contiguous(weight, logits, threshold.detach(), bias)
    y = _masked_linear_operator(_rows(x), *tensors)
    return y.view(*x.shape[:-1], weight.shape[0])


def chunk_masked_linear(x, weight, hidden, output_weight, output_bias, start, threshold, bias):
    tensors = _contiguous(weight, hidden, output_weight, output_bias)
    y = _chunk_masked_linear_operator(_rows(x), *tensors, start, *_contiguous(threshold.detach(), bias))
    return y.view(*x.shape[:-1], weight.shape[0])


def _layer_condition(
    most_rows: int, x: Tensor, weight: Tensor, threshold: Tensor, bias: Tensor | None, *others: Tensor
) -> str:
    layer = [weight, *others, *([] if bias is None else [bias])]
    rows = math.prod(x.shape[:-1])
    if rows > most_rows:
        return f"{rows} rows of x are more than {most_rows}"
    if any(t.dtype != x.dtype for t in layer) or threshold.dtype not in (x.dtype, torch.float32):
        return "x and the layer differ in dtype"
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != x.dtype:
        return "autocast asks for another dtype"
    return "" if threshold.device == x.device else "x and the threshold are on different devices"


def masked_linear_condition(x, weight, logits, threshold, bias):
    most_rows = few_rows(str(x.dtype).removeprefix("torch."))
    return _layer_condition(most_rows, x, weight, threshold, bias, logits)


def chunk_masked_linear_condition(x, weight, hidden, output_weight, output_bias, start, threshold, bias):
    if problem := _layer_condition(FEWEST_ROWS, x, weight, threshold, bias, hidden, output_weight, output_bias):
        return problem
    (outputs, inputs), (chunk_size, width) = weight.shape, output_weight.shape
    if width > MAX_WIDTH:
        return f"the hypernetwork is {width} wide, more than {MAX_WIDTH}"
    if chunk_size < min(inputs, _STEP):
        return f"chunks of {chunk_size} entries are shorter than the {min(inputs, _STEP)} that a block takes at a time"
    if weight.numel() and outputs * math.gcd(chunk_size, inputs) < 16 * chunk_size:
        return "fewer than 16 rows of the weight have their positions in the chunks in common"
    return ""


def _shapes(x, weight, *rest):
    return x.new_empty(x.shape[0], weight.shape[0])


_masked_linear_operator = operator("masked_linear", _shapes, _masked_linear_backward, _masked_linear_setup)
_chunk_masked_linear_operator = operator(
    "chunk_masked_linear", _shapes, _chunk_masked_linear_backward, _chunk_masked_linear_setup
)
