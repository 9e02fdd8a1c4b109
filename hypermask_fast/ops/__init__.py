"""The ops of `reference`, each run by the fastest backend that can serve the call; see `backends`.

Names, arguments, results and gradients are those of `reference`; every function also takes `backend=`, a name.
Contiguous float32 tensors are accelerated. Other strides are made contiguous, but for what `hypernet_adam` steps; other
dtypes go to the reference or to plain PyTorch products.
Where no backend is named, masked layers run fused or mask first, as `dispatch` says for their shape.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import arguments as checks
from . import native, reference
from . import registry as backends
from . import triton as triton_backend
from .plain import chunked, mask_first
from .reference import kept_rank
from .task_rows import TaskRows

__all__ = [
    "chunk_masked_conv2d",
    "chunk_masked_linear",
    "chunked_output_drift",
    "entropy_select",
    "hypernet_adam",
    "hypernet_logits",
    "kept_rank",
    "mask_thresholds",
    "masked_conv2d",
    "masked_linear",
    "masked_weights",
    "masked_weights_drift",
    "output_drift",
    "semi_binary_mask",
    "task_batched_linear",
    "weight_drift",
]

mask_first.register()
native.register()
triton_backend.register()

_PLAIN = (reference.__name__, mask_first.__name__, chunked.__name__)


def _run(op: str, backend: str | None, tensor: Tensor, args: tuple):
    """The op by the backend that serves the call; `tensor` stands for device and dtype."""
    if not torch.compiler.is_compiling():
        checks.one_device(op, tensor, args)
    function = backends.choose(op, backend, tensor, args, {})
    return _checked(op, function, args)(*args)


def _checked(op: str, function: Callable, args: tuple) -> Callable:
    """`function`, once the arguments are what it needs to be given where it does not look itself."""
    if function.__module__ in _PLAIN and op in checks.CHECKS:
        checks.CHECKS[op](*args)
    return function


def mask_thresholds(logits: Tensor, offsets: Sequence[int], ranks: Tensor, *, backend: str | None = None) -> Tensor:
    """(..., S) thresholds of logits (..., N); see `reference.mask_thresholds`."""
    args = (logits, offsets, ranks)
    return _run("mask_thresholds", backend, logits, args)


def semi_binary_mask(logits: Tensor, threshold: Tensor, *, backend: str | None = None) -> Tensor:
    """Mask of the shape of logits; see `reference.semi_binary_mask`."""
    args = (logits, threshold)
    return _run("semi_binary_mask", backend, logits, args)


def masked_weights(
    weights: Sequence[Tensor],
    logits: Tensor,
    thresholds: Tensor,
    offsets: Sequence[int],
    *,
    backend: str | None = None,
) -> list[Tensor]:
    """W_s * m_s of all layers in one call; see `reference.masked_weights`."""
    args = (weights, logits, thresholds, offsets)
    return _run("masked_weights", backend, logits, args)


def masked_linear(
    x: Tensor,
    weight: Tensor,
    logits: Tensor,
    threshold: Tensor,
    bias: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """y = x (W * m)^T + b; see `reference.masked_linear`."""
    args = (x, weight, logits, threshold, bias)
    return _run("masked_linear", backend, x, args)


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
    *,
    backend: str | None = None,
) -> Tensor:
    """y = conv2d(x, W * m) + b; see `reference.masked_conv2d`."""
    args = (x, weight, logits, threshold, bias, stride, padding, dilation, groups)
    return _run("masked_conv2d", backend, x, args)


def chunk_masked_linear(
    x: Tensor,
    weight: Tensor,
    hidden: Tensor,
    output_weight: Tensor,
    output_bias: Tensor,
    start: int,
    threshold: Tensor,
    bias: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """`masked_linear` with logits generated from a chunked hypernetwork; see `reference.chunk_masked_linear`."""
    args = (x, weight, hidden, output_weight, output_bias, start, threshold, bias)
    return _run("chunk_masked_linear", backend, x, args)


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
    *,
    backend: str | None = None,
) -> Tensor:
    """`masked_conv2d` with logits generated from a chunked hypernetwork; see `reference.chunk_masked_conv2d`."""
    layer = (x, weight, hidden, output_weight, output_bias, start, threshold, bias)
    args = (*layer, stride, padding, dilation, groups)
    return _run("chunk_masked_conv2d", backend, x, args)


def task_batched_linear(
    x: Tensor,
    weight: Tensor,
    logits: Tensor,
    thresholds: Tensor,
    task_ids: Tensor | TaskRows | None = None,
    bias: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Each row of x under its own task's mask, or all tasks over one batch; see `reference.task_batched_linear`."""
    args = (x, weight, logits, thresholds, task_ids, bias)
    return _run("task_batched_linear", backend, x, args)


def hypernet_logits(hidden: Tensor, weight: Tensor, bias: Tensor, size: int, *, backend: str | None = None) -> Tensor:
    """(T, N) logits of hidden (T, chunks, H); see `reference.hypernet_logits`."""
    args = (hidden, weight, bias, size)
    if backend is None and hidden.shape[:2] != (1, 1) and backends.requested() != "reference":
        backend = "auto"  # more rows than one are a matrix product, for which no backend has a kernel
    if hidden.shape[1] > 1 and backends.requested(backend) == "auto":
        return _checked("hypernet_logits", chunked.hypernet_logits, args)(*args)
    return _run("hypernet_logits", backend, hidden, args)


def output_drift(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, *, backend: str | None = None
) -> Tensor:
    """Scalar R against targets (T, N); see `reference.output_drift`."""
    args = (hidden, weight, bias, targets)
    return _run("output_drift", backend, hidden, args)


def chunked_output_drift(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    old_hidden: Tensor,
    old_weight: Tensor,
    old_bias: Tensor,
    size: int,
    *,
    backend: str | None = None,
) -> Tensor:
    """Scalar R against the same layer as it stood; see `reference.chunked_output_drift`.

    Unless the reference is asked for by name it is `chunked.output_drift` on every device and dtype: its cost does not
    grow with N, and it is more accurate.
    """
    args = (hidden, weight, bias, old_hidden, old_weight, old_bias, size)
    if backends.wanted_for("chunked_output_drift", backend) == "auto":
        return _checked("chunked_output_drift", chunked.output_drift, args)(*args)
    return _run("chunked_output_drift", backend, hidden, args)


def weight_drift(
    weights: Sequence[Tensor],
    previous: Tensor,
    offsets: Sequence[int],
    norm: int = 1,
    logits: Tensor | None = None,
    thresholds: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Scalar D, masked or not; see `reference.weight_drift`."""
    args = (weights, previous, offsets, norm, logits, thresholds)
    return _run("weight_drift", backend, previous, args)


def masked_weights_drift(
    weights: Sequence[Tensor],
    logits: Tensor,
    thresholds: Tensor,
    offsets: Sequence[int],
    previous: Tensor,
    norm: int = 1,
    *,
    backend: str | None = None,
) -> tuple[list[Tensor], Tensor]:
    """W_s * m_s of all segments and the scalar D in one pass; see `reference.masked_weights_drift`."""
    args = (weights, logits, thresholds, offsets, previous, norm)
    return _run("masked_weights_drift", backend, logits, args)


def entropy_select(logits: Tensor, *, backend: str | None = None) -> Tensor:
    """(batch,) task of lowest entropy; see `reference.entropy_select`."""
    return _run("entropy_select", backend, logits, (logits,))


@torch.no_grad()
def hypernet_adam(
    hidden: Tensor,
    grad_logits: Tensor,
    targets: Tensor,
    drift_weight: Tensor,
    weight: Tensor,
    bias: Tensor,
    weight_m: Tensor,
    weight_v: Tensor,
    bias_m: Tensor,
    bias_v: Tensor,
    step: Tensor,
    lr: Tensor,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Backward of the dense output layer and its Adam step; (hidden_grad, R). See `reference.hypernet_adam`."""
    args = (hidden, grad_logits, targets, drift_weight, weight, bias, weight_m, weight_v, bias_m, bias_v, step, lr)
    args = (*args, beta1, beta2, eps)
    return _run("hypernet_adam", backend, hidden, args)
