"""The extension's ops as PyTorch operators: shape functions, gradients, and the calls with the reference's signatures.

The extension (csrc/) registers schemas and kernels for CPU and CUDA; this file gives them what torch.compile, autograd
and opcheck need, and offers them to `backends`.
"""

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, library

from .. import registry as backends
from . import few_rows as small_batch

_NAMESPACE = "hypermask_native"


def register() -> None:
    """Offers the ops, and registers shape functions and gradients where the extension is there."""
    _offer()
    if backends.NATIVE_PROBLEM:
        return
    for name, fake in (_FAKES | small_batch.FAKES).items():
        library.register_fake(f"{_NAMESPACE}::{name}", _without_values(name, fake))
    for name, (backward, setup) in (_GRADIENTS | small_batch.GRADIENTS).items():
        library.register_autograd(f"{_NAMESPACE}::{name}", backward, setup_context=setup)


def _offer() -> None:
    for op, function in _CPU_CALLS.items():
        backends.offer(op, "cpu", function, _layer_condition)
    for op, (function, condition) in _CALLS.items():
        for backend in ("cpu", "cuda"):
            backends.offer(op, backend, function, condition)
    for op, (function, condition, dtypes) in small_batch.CALLS.items():
        backends.offer(op, "cuda", function, condition, dtypes)


def _without_values(name: str, fake: Callable) -> Callable:
    """A shape function that refuses meta tensors beside others: one suffices for it to be called."""

    @functools.wraps(fake)
    def checked(*args):
        devices = {tensor.device.type for tensor in backends.tensors(args)}
        if "meta" in devices and len(devices) > 1:
            raise RuntimeError(f"{name}: all tensors must be on one device, not on {' and '.join(sorted(devices))}")
        return fake(*args)

    return checked


def _contiguous(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.contiguous() for t in tensors]


# Shape functions


def _fake_mask_thresholds(logits, offsets, ranks):
    return logits.new_empty(*logits.shape[:-1], len(offsets) - 1)


def _fake_weight_drift_backward(grad, norms, weights, previous, offsets, norm, logits, thresholds):
    return [torch.empty_like(w) for w in weights], previous.new_empty(0 if logits is None else logits.shape)


_FAKES = {
    "mask_thresholds": _fake_mask_thresholds,
    "semi_binary_mask": lambda logits, threshold: torch.empty_like(logits),
    "semi_binary_mask_backward": lambda grad, logits, threshold: torch.empty_like(logits),
    "masked_weights": lambda weights, logits, thresholds, offsets: [torch.empty_like(w) for w in weights],
    "masked_weights_backward": lambda grads, weights, logits, thresholds, offsets: (
        [torch.empty_like(w) for w in weights],
        torch.empty_like(logits),
    ),
    "weight_drift": lambda weights, previous, offsets, norm, logits, thresholds: previous.new_empty(len(weights)),
    "weight_drift_backward": _fake_weight_drift_backward,
    "masked_weights_drift": lambda weights, logits, thresholds, offsets, previous, norm: (
        [torch.empty_like(w) for w in weights],
        logits.new_empty(len(weights)),
    ),
    "masked_weights_drift_backward": lambda grads, grad, norms, weights, logits, *rest: (
        [torch.empty_like(w) for w in weights],
        torch.empty_like(logits),
    ),
    "output_drift": lambda hidden, weight, bias, targets: weight.new_empty(()),
    "output_drift_backward": lambda grad, hidden, weight, bias, targets: (
        torch.empty_like(hidden),
        torch.empty_like(weight),
        torch.empty_like(bias),
    ),
    "hypernet_logits": lambda hidden, weight, bias: weight.new_empty(weight.shape[0]),
    "hypernet_adam": lambda hidden, *rest: (torch.empty_like(hidden), hidden.new_empty(())),
}


# Gradients


def _mask_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _mask_backward(ctx, grad):
    logits, threshold = ctx.saved_tensors
    return torch.ops.hypermask_native.semi_binary_mask_backward(grad.contiguous(), logits, threshold), None


def _masked_weights_setup(ctx, inputs, output):
    weights, logits, thresholds, ctx.offsets = inputs
    ctx.save_for_backward(*weights, logits, thresholds)


def _masked_weights_backward(ctx, grads):
    *weights, logits, thresholds = ctx.saved_tensors
    grads = [torch.zeros_like(w) if g is None else g.contiguous() for g, w in zip(grads, weights, strict=True)]
    grad_weights, grad_logits = torch.ops.hypermask_native.masked_weights_backward(
        grads, weights, logits, thresholds, ctx.offsets
    )
    return grad_weights, grad_logits, None, None


def _weight_drift_setup(ctx, inputs, output):
    weights, previous, ctx.offsets, ctx.norm, logits, thresholds = inputs
    ctx.masked = logits is not None
    ctx.save_for_backward(output, *weights, previous, *((logits, thresholds) if ctx.masked else ()))


def _weight_drift_backward(ctx, grad):
    norms, *rest = ctx.saved_tensors
    logits, thresholds = rest[-2:] if ctx.masked else (None, None)
    *weights, previous = rest[:-2] if ctx.masked else rest
    grad_weights, grad_logits = torch.ops.hypermask_native.weight_drift_backward(
        grad.contiguous(), norms, weights, previous, ctx.offsets, ctx.norm, logits, thresholds
    )
    return grad_weights, None, None, None, grad_logits if ctx.masked else None, None


def _masked_weights_drift_setup(ctx, inputs, output):
    weights, logits, thresholds, ctx.offsets, previous, ctx.norm = inputs
    ctx.save_for_backward(output[1], *weights, logits, thresholds, previous)


def _masked_weights_drift_backward(ctx, grads, grad):
    norms, *weights, logits, thresholds, previous = ctx.saved_tensors
    grads = [torch.zeros_like(w) if g is None else g.contiguous() for g, w in zip(grads, weights, strict=True)]
    grad = torch.zeros_like(norms) if grad is None else grad.contiguous()
    grad_weights, grad_logits = torch.ops.hypermask_native.masked_weights_drift_backward(
        grads, grad, norms, weights, logits, thresholds, ctx.offsets, previous, ctx.norm
    )
    return grad_weights, grad_logits, None, None, None, None


def _output_drift_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _output_drift_backward(ctx, grad):
    grads = torch.ops.hypermask_native.output_drift_backward(grad.contiguous(), *ctx.saved_tensors)
    return *grads, None


def _hypernet_logits_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])


def _hypernet_logits_backward(ctx, grad):
    hidden, weight = ctx.saved_tensors
    need_hidden, need_weight, need_bias = ctx.needs_input_grad
    return (
        weight.t() @ grad if need_hidden else None,
        torch.outer(grad, hidden) if need_weight else None,
        grad if need_bias else None,
    )


_GRADIENTS = {
    "semi_binary_mask": (_mask_backward, _mask_setup),
    "masked_weights": (_masked_weights_backward, _masked_weights_setup),
    "weight_drift": (_weight_drift_backward, _weight_drift_setup),
    "masked_weights_drift": (_masked_weights_drift_backward, _masked_weights_drift_setup),
    "output_drift": (_output_drift_backward, _output_drift_setup),
    "hypernet_logits": (_hypernet_logits_backward, _hypernet_logits_setup),
}


# Calls with the reference's signatures, and what they can't serve


def _mask_thresholds(logits, offsets, ranks):
    return torch.ops.hypermask_native.mask_thresholds(logits.detach().contiguous(), offsets, ranks.contiguous())


def _semi_binary_mask(logits, threshold):
    return torch.ops.hypermask_native.semi_binary_mask(logits.contiguous(), threshold.detach().contiguous())


def _semi_binary_mask_condition(logits, threshold):
    if threshold.dtype != logits.dtype or threshold.device != logits.device:
        return "logits and threshold differ in dtype or device"
    if threshold.numel() == 1 and threshold.dim() <= logits.dim():
        return ""
    shape = list(threshold.shape)
    while shape and shape[-1] == 1:
        shape.pop()
    fits = threshold.dim() == logits.dim() and tuple(shape) == tuple(logits.shape[: len(shape)])
    return "" if fits else "the threshold is not one number, nor one per leading row"


def _masked_weights(weights, logits, thresholds, offsets):
    return torch.ops.hypermask_native.masked_weights(
        _contiguous(weights), logits.contiguous(), thresholds.detach().contiguous(), offsets
    )


def _same_dtype(weights: Sequence[Tensor], like: Tensor) -> str:
    return "" if all(w.dtype == like.dtype for w in weights) else "the weights and logits differ in dtype"


def _weight_drift(weights, previous, offsets, norm=1, logits=None, thresholds=None):
    if logits is not None:
        logits = logits.contiguous()
    if thresholds is not None:
        thresholds = thresholds.detach().contiguous()
    return torch.ops.hypermask_native.weight_drift(
        _contiguous(weights), previous.detach().contiguous(), offsets, norm, logits, thresholds
    ).sum()


def _masked_weights_drift(weights, logits, thresholds, offsets, previous, norm=1):
    masked, norms = torch.ops.hypermask_native.masked_weights_drift(
        _contiguous(weights),
        logits.contiguous(),
        thresholds.detach().contiguous(),
        offsets,
        previous.detach().contiguous(),
        norm,
    )
    return masked, norms.sum()


def _output_drift(hidden, weight, bias, targets):
    return torch.ops.hypermask_native.output_drift(
        hidden.contiguous(), weight.contiguous(), bias.contiguous(), targets.detach().contiguous()
    )


def _output_drift_condition(hidden, weight, bias, targets):
    if hidden.dim() == 3 and hidden.shape[1] != 1:
        return "the layer is chunked; see chunked_output_drift"
    return _shared_memory_problem(hidden, hidden.shape[0])


_STATIC_SHARED = 256  # bytes that the kernel over the dense layer has besides, at most


def _shared_memory_problem(hidden: Tensor, tasks: int) -> str:
    """Why the GPU's kernel over the dense layer can't hold its tiles, the hidden vectors and the factors."""
    if not hidden.is_cuda:
        return ""
    width = hidden.shape[-1]
    needed = dense_shared_bytes(tasks, width) + _STATIC_SHARED
    there = torch.cuda.get_device_properties(hidden.device).shared_memory_per_block_optin
    return "" if needed <= there else f"{tasks} tasks of width {width} need {needed} bytes of shared memory"


def dense_shared_bytes(tasks: int, width: int) -> int:
    """What csrc/common/launch.h says: `dense_shared_floats` of `dense_layout`, for tensors that begin on 16 bytes."""
    pack, tiles = (4, 4) if width % 4 == 0 else (1, 5)
    packs = width // pack
    rows = 4 * min(max(256 // packs, 1), 64)
    stride = (packs | 1) * 4 if pack == 4 else packs
    chunk = 8 if tasks > (16 if pack == 4 else 4) else 4
    slots = -(-max(tasks, 1) // chunk) * chunk
    return 4 * (tiles * rows * stride + slots * (rows + stride))


def _hypernet_logits(hidden, weight, bias, size):
    row = hidden.reshape(-1).contiguous()
    return torch.ops.hypermask_native.hypernet_logits(row, weight.contiguous(), bias.contiguous()).unsqueeze(0)


def _hypernet_logits_condition(hidden, weight, bias, size):
    if hidden.shape[:2] != (1, 1) or size != weight.shape[0]:
        return "more than one task or chunk: a matrix product, torch's own"
    return _shared_memory_problem(hidden, 1)


_STEPPED = slice(4, 10)  # of hypernet_adam's arguments: what it modifies


def _hypernet_adam(*args):
    *tensors, beta1, beta2, eps = args
    stepped = tensors[_STEPPED]
    before, behind = _contiguous(tensors[: _STEPPED.start]), _contiguous(tensors[_STEPPED.stop :])
    everything = (t.detach() for t in (*before, *stepped, *behind))
    result = torch.ops.hypermask_native.hypernet_adam(*everything, beta1, beta2, eps)
    if not torch.compiler.is_compiling():
        for t in stepped:
            torch.autograd.graph.increment_version(t)
    return result


def _hypernet_adam_condition(hidden, *rest):
    if not all(t.is_contiguous() for t in (hidden, *rest)[_STEPPED]):  # a copy would be stepped in its place
        return "weight, bias and their moments are not contiguous"
    return _shared_memory_problem(hidden, hidden.shape[0])


def _masked_weight(weight, logits, threshold):
    (masked,) = _masked_weights([weight], logits.reshape(-1), threshold.reshape(1), [0, weight.numel()])
    return masked


def _masked_linear(x, weight, logits, threshold, bias=None):
    return F.linear(x, _masked_weight(weight, logits, threshold), bias)


def _masked_conv2d(x, weight, logits, threshold, bias=None, stride=1, padding=0, dilation=1, groups=1):
    return F.conv2d(x, _masked_weight(weight, logits, threshold), bias, stride, padding, dilation, groups)


def _layer_condition(x, weight, logits, threshold, *rest):
    fits = threshold.numel() == 1 and weight.dtype == logits.dtype and weight.shape == logits.shape
    return "" if fits else "weight, logits and threshold do not fit"


# The weight is masked once, and the product is the CPU library's own.
_CPU_CALLS = {"masked_linear": _masked_linear, "masked_conv2d": _masked_conv2d}

_CALLS = {
    "mask_thresholds": (_mask_thresholds, None),
    "semi_binary_mask": (_semi_binary_mask, _semi_binary_mask_condition),
    "masked_weights": (_masked_weights, lambda weights, logits, *rest: _same_dtype(weights, logits)),
    "weight_drift": (_weight_drift, lambda weights, previous, *rest: _same_dtype(weights, previous)),
    "masked_weights_drift": (_masked_weights_drift, lambda weights, logits, *rest: _same_dtype(weights, logits)),
    "output_drift": (_output_drift, _output_drift_condition),
    "hypernet_logits": (_hypernet_logits, _hypernet_logits_condition),
    "hypernet_adam": (_hypernet_adam, _hypernet_adam_condition),
}
