"""Masks, masked weights and the target's weight drift, over all segments in one call."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import Served, constant, contiguous, operator


def same_dtype(weights: Sequence[Tensor], like: Tensor, *others: Tensor | None) -> str:
    for weight in weights:
        if weight.dtype != like.dtype:
            return "the weights and logits differ in dtype"
    for other in others:
        if other is not None and other.dtype != like.dtype:
            return f"the weights are {like.dtype}, and others of the tensors {other.dtype}"
    return ""


def _zeros_for_unused(grads: Sequence[Tensor | None], outputs: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of outputs, those that nobody used included."""
    return [torch.zeros_like(y) if g is None else g.contiguous() for g, y in zip(grads, outputs, strict=True)]


# -- semi_binary_mask --------------------------------------------------------------------------------------------------


def semi_binary_mask_condition(logits, threshold):
    if threshold.dtype != logits.dtype:
        return "logits and threshold differ in dtype"
    if threshold.numel() == 1:
        return ""
    shape = list(threshold.shape)
    while shape and shape[-1] == 1:
        shape.pop()
    fits = threshold.dim() == logits.dim() and tuple(shape) == tuple(logits.shape[: len(shape)])
    return "" if fits else "the threshold is not one number, nor one per leading row"


def _mask_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _mask_backward(ctx, grad):
    logits, threshold = ctx.saved_tensors
    return _semi_binary_mask_backward_operator(grad.contiguous(), logits, threshold), None


_semi_binary_mask_operator = operator(
    "semi_binary_mask", lambda logits, threshold: torch.empty_like(logits), _mask_backward, _mask_setup
)
_semi_binary_mask_backward_operator = operator(
    "semi_binary_mask_backward", lambda grad, logits, threshold: torch.empty_like(logits)
)
semi_binary_mask = Served(
    _semi_binary_mask_operator, lambda logits, threshold: (logits.contiguous(), constant(threshold))
)


# -- masked_weights ----------------------------------------------------------------------------------------------------


def _masked_weights_ready(weights, logits, thresholds, offsets):
    return contiguous(weights), logits.contiguous(), constant(thresholds), offsets


def masked_weights_condition(weights, logits, thresholds, offsets):
    return same_dtype(weights, logits, thresholds)


def _masked_weights_setup(ctx, inputs, output):
    weights, logits, thresholds, ctx.offsets = inputs
    ctx.save_for_backward(*weights, logits, thresholds)


def _masked_weights_backward(ctx, grads):
    *weights, logits, thresholds = ctx.saved_tensors
    grad_weights, grad_logits = _masked_weights_backward_operator(
        _zeros_for_unused(grads, weights), weights, logits, thresholds, ctx.offsets
    )
    return grad_weights, grad_logits, None, None


_masked_weights_operator = operator(
    "masked_weights",
    lambda weights, logits, thresholds, offsets: [torch.empty_like(w) for w in weights],
    _masked_weights_backward,
    _masked_weights_setup,
)
_masked_weights_backward_operator = operator(
    "masked_weights_backward",
    lambda grads, weights, logits, thresholds, offsets: (
        [torch.empty_like(w) for w in weights],
        torch.empty_like(logits),
    ),
)
masked_weights = Served(_masked_weights_operator, _masked_weights_ready)


# -- weight_drift ------------------------------------------------------------------------------------------------------


def _weight_drift_ready(weights, previous, offsets, norm, logits, thresholds):
    if logits is not None:
        logits, thresholds = logits.contiguous(), constant(thresholds)
    return contiguous(weights), constant(previous), offsets, norm, logits, thresholds


def weight_drift_condition(weights, previous, offsets, norm, logits, thresholds):
    return same_dtype(weights, previous, logits, thresholds)


def _weight_drift_setup(ctx, inputs, output):
    weights, previous, ctx.offsets, ctx.norm, logits, thresholds = inputs
    ctx.masked = logits is not None
    ctx.save_for_backward(output, *weights, previous, *((logits, thresholds) if ctx.masked else ()))


def _weight_drift_backward(ctx, grad):
    norms, *rest = ctx.saved_tensors
    logits, thresholds = rest[-2:] if ctx.masked else (None, None)
    *weights, previous = rest[:-2] if ctx.masked else rest
    grad_weights, grad_logits = _weight_drift_backward_operator(
        grad.expand_as(norms).contiguous(), norms, weights, previous, ctx.offsets, ctx.norm, logits, thresholds
    )
    return grad_weights, None, None, None, grad_logits if ctx.masked else None, None


_weight_drift_operator = operator(
    "weight_drift",
    lambda weights, previous, offsets, norm, logits, thresholds: previous.new_empty(len(weights)),
    _weight_drift_backward,
    _weight_drift_setup,
    torch.sum,
)
_weight_drift_backward_operator = operator(
    "weight_drift_backward",
    lambda grad, norms, weights, previous, offsets, norm, logits, thresholds: (
        [torch.empty_like(w) for w in weights],
        previous.new_empty(0 if logits is None else logits.shape),
    ),
)
weight_drift = Served(_weight_drift_operator, _weight_drift_ready)


# -- masked_weights_drift ----------------------------------------------------------------------------------------------


def _masked_weights_drift_ready(weights, logits, thresholds, offsets, previous, norm):
    return contiguous(weights), logits.contiguous(), constant(thresholds), offsets, constant(previous), norm


def _with_sum(masked_and_norms):
    masked, norms = masked_and_norms
    return masked, norms.sum()


def masked_weights_drift_condition(weights, logits, thresholds, offsets, previous, norm):
    return same_dtype(weights, logits, thresholds, previous)


def _masked_weights_drift_setup(ctx, inputs, output):
    weights, logits, thresholds, ctx.offsets, previous, ctx.norm = inputs
    ctx.save_for_backward(output[1], *weights, logits, thresholds, previous)


def _masked_weights_drift_backward(ctx, grads, grad):
    norms, *weights, logits, thresholds, previous = ctx.saved_tensors
    grad = torch.zeros_like(norms) if grad is None else grad.expand_as(norms).contiguous()
    grad_weights, grad_logits = _masked_weights_drift_backward_operator(
        _zeros_for_unused(grads, weights), grad, norms, weights, logits, thresholds, ctx.offsets, previous, ctx.norm
    )
    return grad_weights, grad_logits, None, None, None, None


_masked_weights_drift_operator = operator(
    "masked_weights_drift",
    lambda weights, logits, thresholds, offsets, previous, norm: (
        [torch.empty_like(w) for w in weights],
        logits.new_empty(len(weights)),
    ),
    _masked_weights_drift_backward,
    _masked_weights_drift_setup,
    _with_sum,
)
_masked_weights_drift_backward_operator = operator(
    "masked_weights_drift_backward",
    lambda grads, grad, norms, weights, logits, *rest: (
        [torch.empty_like(w) for w in weights],
        torch.empty_like(logits),
    ),
)
masked_weights_drift = Served(_masked_weights_drift_operator, _masked_weights_drift_ready)


# -- the CPU's layers: the weight is masked once, and the product is the library's own ---------------------------------


def _masked_weight_ready(weight, logits, threshold):
    return weight.contiguous(), logits.contiguous(), constant(threshold)


def _masked_weight_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _masked_weight_backward(ctx, grad):
    return *_masked_weight_backward_operator(grad.contiguous(), *ctx.saved_tensors), None


_masked_weight_operator = operator(
    "masked_weight",
    lambda weight, logits, threshold: torch.empty_like(weight),
    _masked_weight_backward,
    _masked_weight_setup,
)
_masked_weight_backward_operator = operator(
    "masked_weight_backward",
    lambda grad, weight, logits, threshold: (torch.empty_like(weight), torch.empty_like(logits)),
)
masked_weight = Served(_masked_weight_operator, _masked_weight_ready)


class _Layer:
    """A layer's op: `product` of x with W * m in place of W, and with the op's other arguments."""

    def __init__(self, product: Callable[..., Tensor]) -> None:
        self._product = product

    def __call__(self, x: Tensor, weight: Tensor, logits: Tensor, threshold: Tensor, *rest: Any) -> Tensor:
        return self._product(x, masked_weight(weight, logits, threshold), *rest)

    def of_kind(
        self, x: Tensor, weight: Tensor, logits: Tensor, threshold: Tensor, *rest: Any
    ) -> Callable[..., Tensor]:
        product, masked = self._product, masked_weight.of_kind(weight, logits, threshold)
        return lambda x, weight, logits, threshold, *rest: product(x, masked(weight, logits, threshold), *rest)


masked_linear, masked_conv2d = _Layer(F.linear), _Layer(F.conv2d)


def layer_condition(x, weight, logits, threshold, *rest):
    return "" if weight.dtype == logits.dtype == threshold.dtype else "weight, logits and threshold differ in dtype"
