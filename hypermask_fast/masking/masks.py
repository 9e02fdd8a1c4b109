"""TaskMask: one task's mask over a whole network."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from .. import ops
from ..checks import shown
from ..errors import InputError
from ..transforming import transforming
from .access import parameter_of
from .layout import MaskLayout
from .scope import unhooked

_T = TypeVar("_T")


class Layer(Protocol):
    """What a mask needs of a `layers.MaskedLinear`; within a pass weight and bias read as the pass has them."""

    weight: Tensor
    bias: Tensor | None
    mask_segments: Mapping[str, int]

    def segment(self, name: str) -> int | None: ...


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


def is_another(weight: Tensor, other: Tensor) -> bool:
    """Whether they are different tensors, and not two views of one."""
    return weight is not other and (transforming() or weight.data_ptr() != other.data_ptr())


def check_exchanged(mask: Any, segment: int, plain: Tensor) -> None:
    """Raises InputError where a module has another tensor in the place of the weight that a mask was made of."""
    if is_another(plain, mask.weights[segment]):
        raise InputError(
            f"{mask.layout.segments[segment].name} has been exchanged for another tensor within a pass (such as by "
            "torch.func.functional_call of a part of the network), where it would not be masked"
        )


class Made:
    """What is made of a mask at first need, once for passes with gradients and once for those without."""

    _made: dict

    def _once(self, name: str, make: Callable[[], _T]) -> _T:
        key = name, torch.is_grad_enabled()
        if key not in self._made:
            self._made[key] = unhooked(make)
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
        earlier: what generates the earlier tasks' logits (`HyperNetwork.earlier`), where a training step's pass has
            made it for R; None otherwise.
        drift_tasks: how many earlier tasks R is over; None: all.
        drawn: (K,) int64, which of the earlier tasks R is over, where they have been drawn with the mask; None
            otherwise.
        drift_from: (N,) weights as the task began, and the norm, where the pass that makes `effective` for a training
            step is to give the weight drift with it; None otherwise.
    """

    task: int | Tensor
    layout: MaskLayout
    logits: Tensor
    thresholds: Tensor
    weights: tuple[Tensor, ...]
    output_drift: Tensor | None = None
    earlier: tuple[Tensor, tuple[Tensor, Tensor]] | None = None
    drift_from: tuple[Tensor, int] | None = None
    drift_tasks: int | None = None
    drawn: Tensor | None = None
    _made: dict = field(default_factory=dict, init=False, repr=False)

    @property
    def effective(self) -> tuple[Tensor, ...]:
        """One tensor per segment: W * m; the output layer's bias as it is.

        One launch for all layers, at first need: where every layer runs fused it is never made. Once it is there,
        all layers use it; who runs many batches under one mask may ask for it beforehand.
        """
        return self._once("effective", self._effective)

    @property
    def is_made(self) -> bool:
        """Whether `effective` is there already."""
        return self._has("effective")

    @property
    def may_fuse(self) -> bool:
        """Whether layers may run fused, without `effective`."""
        return not self.is_made and ops.may_fuse(self.logits)

    def _effective(self) -> tuple[Tensor, ...]:
        # A network of other dtypes than the hypernetwork's is multiplied in the wider one: a mask is not rounded.
        applied, dtype = self.layout.num_applied, self.logits.dtype
        wide = [weight if weight.dtype == dtype else weight.to(dtype) for weight in self.weights]
        if self.drift_from is not None and torch.is_grad_enabled():
            made, drift = ops.masked_weights_drift(
                wide, self.logits, self.thresholds, self.layout.offsets, *self.drift_from
            )
            self._once("weight drift", lambda: drift)
        else:
            made = ops.masked_weights(wide[:applied], self.logits, self.thresholds, self.layout.offsets)
        masked = list(self.weights)
        for number, segment in enumerate(self.layout.segments):
            if segment.selected:
                masked[number] = made[number].to(masked[number].dtype)
        return tuple(masked)

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

    def fused(self, op: ops.Op, layer: Layer, x: Tensor, *geometry: object) -> Tensor | None:
        """A masked layer's output by an op of its own; None where it should use `effective`.

        Once a layer has run fused, W * m of all layers would be made for a few: the others then mask their own.
        """
        segment = layer.segment("weight")
        if segment is None or self._has("effective") or not ops.may_fuse(x):
            return None
        weight, bias = self.weights[segment], layer.segment("bias")
        call = (x, weight, self._views()[segment], self.thresholds[segment])
        own = parameter_of(layer, "bias")
        function = op.fused(*call, own, *geometry)
        if function is None and not self._has("biases"):
            return None
        masked = self._once("biases", self._biases).get(bias, own)
        return (function or op)(*call, masked, *geometry)

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


def check_masks(masks: object) -> None:
    """Raises InputError where it is no sequence of masks, or an empty one."""
    made_together = isinstance(masks, Made)  # then none has to be made to be looked at
    if not isinstance(masks, Sequence) or not (made_together or all(isinstance(mask, TaskMask) for mask in masks)):
        raise InputError(f"masks are those of model.all_masks(), or [model.mask(task), ...], not {shown(masks)}")
    if not masks:
        raise InputError("masks must be those of a task or more, and there are none")
