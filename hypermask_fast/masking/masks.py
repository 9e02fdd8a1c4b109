"""TaskMask: one task's mask over a whole network, and which mask the running forward pass uses."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from .layout import MaskLayout

_T = TypeVar("_T")


class Layer(Protocol):
    """What a mask needs of a `layers.MaskedLinear`. Segments: numbers in the model's layout, or None."""

    weight: Tensor
    bias: Tensor | None
    weight_segment: int | None
    bias_segment: int | None


class Convolution(Layer, Protocol):
    """What it needs of a `layers.MaskedConv2d`, which says what each method does."""

    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def geometry(self, x: Tensor) -> tuple | None: ...

    def padded(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]: ...

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor: ...


class TaskNorm(Protocol):
    """What it needs of a `norms.TaskBatchNorm`, which says what each method does."""

    def forward_task(self, x: Tensor, task: int | Tensor) -> Tensor: ...

    def forward_rows(self, x: Tensor, tasks: Tensor) -> Tensor: ...


class Running(Protocol):
    """What a forward pass runs under: `TaskMask`, or many tasks at once (`task_batch.TaskBatch`).

    Each method is a layer's forward pass; the layer has checked the shape of x.
    """

    def linear(self, layer: Layer, x: Tensor) -> Tensor: ...

    def conv2d(self, layer: Convolution, x: Tensor) -> Tensor: ...

    def batch_norm(self, layer: TaskNorm, x: Tensor) -> Tensor: ...


class Made:
    """What is made of a mask at first need, once for passes with gradients and once for those without."""

    _made: dict

    def _once(self, name: str, make: Callable[[], _T]) -> _T:
        key = name, torch.is_grad_enabled()
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def _has(self, name: str) -> bool:
        return (name, torch.is_grad_enabled()) in self._made


@dataclass(frozen=True, eq=False)
class TaskMask(Made):
    """What the hypernetwork generated for one task, made by `HyperMask.mask`.

    Made once, it serves a forward pass, the regulariser and any number of evaluation batches, until a weight changes.

    Attributes:
        task: the task's id, an int or a 0-dim int64 tensor.
        layout: the flat space it lies in.
        logits: (N,) mask logits a.
        thresholds: (S,) thresholds on |a|.
        weights: the target network's Parameters, one per segment.
        output_drift: R, where the same pass over the output layer gives it (see `optim.Adam`); None otherwise.
        earlier_hidden: (t, chunks, H) the hypernetwork's last hidden layer for the earlier tasks, where a training
            step's pass has made it for R; None otherwise.
        drift_from: (N,) weights as the task began, and the norm, where the pass that makes `effective` for a training
            step is to give the weight drift with it; None otherwise.
    """

    task: int | Tensor
    layout: MaskLayout
    logits: Tensor
    thresholds: Tensor
    weights: tuple[Tensor, ...]
    output_drift: Tensor | None = None
    earlier_hidden: Tensor | None = None
    drift_from: tuple[Tensor, int] | None = None
    _made: dict = field(default_factory=dict, init=False, repr=False)

    @property
    def effective(self) -> tuple[Tensor, ...]:
        """One tensor per segment: W * m; the output layer's bias as it is.

        One launch for all layers, at first need: where every layer runs fused it is never made. Once it is there,
        all layers use it; who runs many batches under one mask may ask for it beforehand.
        """
        return self._once("effective", self._effective)

    def _effective(self) -> tuple[Tensor, ...]:
        applied = self.layout.num_applied
        if self.drift_from is not None and torch.is_grad_enabled():
            masked, drift = ops.masked_weights_drift(
                self.weights, self.logits, self.thresholds, self.layout.offsets, *self.drift_from
            )
            self._once("weight drift", lambda: drift)
            return (*masked[:applied], *self.weights[applied:])
        masked = ops.masked_weights(self.weights[:applied], self.logits, self.thresholds, self.layout.offsets)
        return (*masked, *self.weights[applied:])

    def weight_drift(self, previous: Tensor) -> Tensor | None:
        """D from `previous` where it came with `effective`; None otherwise."""
        if self.drift_from is None or self.drift_from[0] is not previous or not self._has("weight drift"):
            return None
        return self._made["weight drift", torch.is_grad_enabled()]

    def _biases(self) -> dict[int | None, Tensor]:
        """Segment number -> masked bias of all layers, in one launch: what fused layers need besides their op."""
        chosen = [s for s, segment in enumerate(self.layout.segments) if len(segment.shape) == 1 and segment.selected]
        if not chosen:
            return {}
        views, offsets = self._views(), [0]
        for s in chosen:
            offsets.append(offsets[-1] + self.layout.segments[s].size)
        logits = torch.cat([views[s] for s in chosen])
        thresholds = torch.stack([self.thresholds[s] for s in chosen])
        masked = ops.masked_weights([self.weights[s] for s in chosen], logits, thresholds, offsets)
        return dict(zip(chosen, masked, strict=True))

    def _views(self) -> list[Tensor]:
        return self._once("views", lambda: self.layout.views(self.logits))

    # -- layers ---------------------------------------------------------------------------------------------------

    def linear(self, layer: Layer, x: Tensor) -> Tensor:
        """x (W * m)^T + b, fused or with `effective`, as `Op.fused` says for this call."""
        y = self._alone(ops.masked_linear, layer, x)
        return F.linear(x, *self.of_layer(layer)) if y is None else y

    def conv2d(self, layer: Convolution, x: Tensor) -> Tensor:
        """conv2d(x, W * m) + b, chosen likewise."""
        geometry = layer.geometry(x)
        y = None if geometry is None else self._alone(ops.masked_conv2d, layer, x, *geometry)
        return layer.convolve(x, *self.of_layer(layer)) if y is None else y

    def batch_norm(self, layer: TaskNorm, x: Tensor) -> Tensor:
        """Batch norm with this task's statistics."""
        return layer.forward_task(x, self.task)

    def of_layer(self, layer: Layer) -> tuple[Tensor, Tensor | None]:
        """The weight and bias of a layer as they are multiplied with: `effective`, or its own where not masked."""
        weight = layer.weight if layer.weight_segment is None else self.effective[layer.weight_segment]
        bias = layer.bias if layer.bias_segment is None else self.effective[layer.bias_segment]
        return weight, bias

    def _alone(self, op: ops.Op, layer: Layer, x: Tensor, *geometry: object) -> Tensor | None:
        """The layer's output by an op of its own; None where it should use `effective`.

        Once a layer has run fused, W * m of all layers would be made for a few: the others then mask their own.
        """
        segment = layer.weight_segment
        if segment is None or self._has("effective") or not ops.may_fuse(x):
            return None
        layer_call = (x, layer.weight, self._views()[segment], self.thresholds[segment])
        function = op.fused(*layer_call, layer.bias, *geometry)
        if function is None and not self._has("biases"):
            return None
        bias = self._once("biases", self._biases).get(layer.bias_segment, layer.bias)
        return (function or op)(*layer_call, bias, *geometry)

    # -- what it looks like ---------------------------------------------------------------------------------------

    def masks(self) -> dict[str, Tensor]:
        """Parameter name -> mask |tanh a| where |a| >= thr, of the parameter's shape, values in [0, 1]."""
        views = self.layout.views(self.logits)
        return {
            segment.name: ops.semi_binary_mask(view, threshold)
            for segment, view, threshold in zip(self.layout.segments, views, self.thresholds, strict=True)
        }

    def sparsity(self) -> Tensor:
        """Scalar: percent of the masked entries (the output layer's bias apart) whose mask is 0."""
        masks = self.masks()
        applied = [masks[segment.name] for segment in self.layout.segments if segment.selected]
        zeros: Any = sum((mask == 0).sum() for mask in applied)
        return 100.0 * zeros / sum(mask.numel() for mask in applied)


class _Active(threading.local):
    """Per thread, so that two threads can run two tasks through one model; torch.compile traces through it."""

    mask: Running | None = None


_active = _Active()


def active_mask() -> Running | None:
    """The mask of the forward pass this thread is in; None outside of one."""
    return _active.mask


@contextmanager
def use_mask(mask: Running) -> Iterator[None]:
    """Masked layers called inside use `mask`; afterwards nothing of it is left behind."""
    before = _active.mask
    _active.mask = mask
    try:
        yield
    finally:
        _active.mask = before
