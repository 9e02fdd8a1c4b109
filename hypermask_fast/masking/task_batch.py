"""Many tasks in one forward pass: every sample under its own task's mask, or every task over every sample."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, overload
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from .. import ops
from ..errors import InputError
from ..ops.task_rows import TaskRows
from .access import is_attached, parameter_of, scope_of
from .layers import MaskedConv2d, MaskedLinear
from .layout import MaskLayout
from .masks import Convolution, Layer, Made, TaskMask, check_exchanged
from .norms import TaskNorm, TaskStatistics, TrackingNorm

# Samples up to which all tasks go through together, counted once per task where there are convolutions: more fill a
# GPU task by task, by cuBLAS and cuDNN, and so many images under all tasks would not fit beside each other.
_MOST_ROWS = 4096
_row_per_sample_of: WeakKeyDictionary[nn.Module, dict[tuple, bool]] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class TaskMasks(Made, Sequence[TaskMask]):
    """The masks of T tasks, from one pass over the hypernetwork: a sequence of `TaskMask`, sliced like one.

    Attributes:
        tasks: their T ids, integers or an int64 tensor (T,) on the device.
        layout, weights: as in `TaskMask`.
        logits: (T, N); thresholds: (T, S).
    """

    tasks: Sequence[int] | Tensor
    layout: MaskLayout
    logits: Tensor
    thresholds: Tensor
    weights: tuple[Tensor, ...]
    _made: dict = field(default_factory=dict, init=False, repr=False)

    def __len__(self) -> int:
        return len(self.logits)

    @overload
    def __getitem__(self, index: int) -> TaskMask: ...
    @overload
    def __getitem__(self, index: slice) -> "TaskMasks": ...
    def __getitem__(self, index: int | slice) -> "TaskMask | TaskMasks":
        if isinstance(index, slice):
            rows = (self.tasks[index], self.layout, self.logits[index], self.thresholds[index], self.weights)
            return TaskMasks(*rows)
        return self._each()[index]

    def _each(self) -> list[TaskMask]:
        """One `TaskMask` per row, kept, so that what they make is made once."""
        return self._once("each", lambda: list(self.for_one_use()))

    def for_one_use(self) -> Iterator[TaskMask]:
        """One `TaskMask` per row, which nobody keeps: the next one's W * m then takes the memory of the one before."""
        for task, a, limits in zip(self.tasks, self.logits, self.thresholds, strict=True):
            yield TaskMask(task, self.layout, a, limits, self.weights)

    def ids(self) -> Tensor:
        """(T,) int64 `tasks` on the device."""
        if isinstance(self.tasks, Tensor):
            return self.tasks
        first, count = self.tasks[0] if self.tasks else 0, len(self.tasks)
        if list(self.tasks) == list(range(first, first + count)):
            return torch.arange(first, first + count, device=self.logits.device)
        return self._once("ids", lambda: torch.tensor(list(self.tasks), device=self.logits.device))

    def of(self, segment: int) -> tuple[Tensor, Tensor]:
        """Logits (T, *weight shape) and thresholds (T,) of a layer's weight, by its segment's number."""
        views = self._once("views", lambda: self.layout.views(self.logits))
        return views[segment], self.thresholds[:, segment]

    def bias(self, layer: Layer) -> Tensor | None:
        """(T, out) masked biases of a layer; (out,) where the bias is used as it is."""
        segment, bias = layer.segment("bias"), parameter_of(layer, "bias")
        if segment is None or not self.layout.segments[segment].selected:
            return bias
        views = self._once("views", lambda: self.layout.views(self.logits))
        limits = self.thresholds[:, segment, None]

        def make() -> Tensor:
            assert bias is not None, "it has a segment"
            return bias * ops.semi_binary_mask(views[segment], limits)

        return self._once(f"bias {segment}", make)


@dataclass(frozen=True, eq=False)
class TaskBatch:
    """A forward pass under many masks. Every masked layer must see one row per sample, along its first dimension.

    Attributes:
        masks: of T tasks.
        rows: which mask each of B samples runs under; None: every sample runs under every mask, as T blocks
            of samples one after another.
        count: rows that a layer sees, B or T * B.
        shared: without `rows`, the samples (B, ...) and the same repeated (T * B, ...), which the network is given.
    """

    masks: TaskMasks
    rows: TaskRows | None
    count: int
    shared: tuple[Tensor, Tensor] | None = None

    @classmethod
    def mixed(cls, masks: TaskMasks, rows: Tensor) -> "TaskBatch":
        """Each sample under the mask whose number `rows` (B,) says; they are sorted here, once for all layers."""
        return cls(masks, TaskRows.of(rows, len(masks)), rows.shape[0])

    @classmethod
    def every(cls, masks: TaskMasks, x: Tensor, repeated: Tensor) -> "TaskBatch":
        """Samples x (B, ...) under all masks; repeated (T * B, ...): the same once per mask, for the network."""
        return cls(masks, None, repeated.shape[0], (x, repeated))

    def linear(self, layer: Layer, x: Tensor) -> Tensor:
        """Each row of x (rows, ..., in) times its own (W * m_t)^T, plus its bias."""
        self._check(x, layer)
        segment, weight = layer.segment("weight"), parameter_of(layer, "weight")
        if segment is None:
            return F.linear(x, weight, parameter_of(layer, "bias"))
        self._check_weights(layer)
        logits, thresholds = self.masks.of(segment)
        if self.shared is not None and x is self.shared[1] and x.dim() == 2:  # the first layer: x is read once
            call = (self.shared[0], weight, logits, thresholds, None, self.masks.bias(layer))
            return ops.task_batched_linear(*call).flatten(0, 1)
        return self._product(x, weight, logits, thresholds, self.masks.bias(layer))

    def conv2d(self, layer: Convolution, x: Tensor) -> Tensor:
        """Each row of x (rows, in, h, w) convolved with its own W * m_t.

        Windows of x as rows of the linear op; with groups, whose weights are small, a convolution of more groups.
        """
        self._check(x, layer)
        segment, weight = layer.segment("weight"), parameter_of(layer, "weight")
        if segment is None:
            return layer.convolve(x, weight, parameter_of(layer, "bias"))
        self._check_weights(layer)
        x, padding = layer.padded(x)
        logits, thresholds = self.masks.of(segment)
        if layer.groups > 1:
            return self._grouped(layer, x, padding, logits, thresholds)
        windows = F.unfold(x, layer.kernel_size, layer.dilation, padding, layer.stride).transpose(1, 2)
        weight, logits = weight.flatten(1), logits.flatten(2)
        y = self._product(windows, weight, logits, thresholds, self.masks.bias(layer)).transpose(1, 2)
        return y.unflatten(2, _output_size(layer, x, padding))

    def batch_norm(self, layer: TaskNorm, x: Tensor, *args: Any) -> Tensor:
        """Each row with its own task's statistics."""
        self._check(x, layer)
        return layer.forward_rows(x, self.tasks())

    def tasks(self) -> Tensor:
        """(rows,) int64 id of each row's task."""
        return self.masks.ids().index_select(0, self._of_rows(1))

    def parameter(self, segment: int, plain: Tensor) -> Tensor:
        """A module that reads a parameter, instead of being called, can't get the values of several tasks."""
        raise _only_by_calls(self.masks.layout.segments[segment].name)

    def own(self, values: nn.ParameterList, plain: Tensor) -> Tensor:
        raise _only_by_calls("a parameter of each task's own")

    def statistic(self, module: nn.Module, name: str, stacked: Tensor, plain: Tensor) -> Tensor | None:
        raise _only_by_calls(name)

    def _product(self, x: Tensor, weight: Tensor, logits: Tensor, thresholds: Tensor, bias: Tensor | None) -> Tensor:
        """(rows, ..., out) of x (rows, ..., in) by the op over many tasks."""
        rows = x.flatten(0, -2)
        if self.rows is None:
            rows = rows.unflatten(0, (len(self.masks), rows.shape[0] // len(self.masks)))
            y = ops.task_batched_linear(rows, weight, logits, thresholds, None, bias)
        else:
            mine = self.rows.repeated(prod(x.shape[1:-1]))
            y = ops.task_batched_linear(rows, weight, logits, thresholds, mine, bias)
        return y.view(*x.shape[:-1], weight.shape[0])

    def _of_rows(self, each: int) -> Tensor:
        """Which mask each row runs under, for `each` rows per sample; int64."""
        if self.rows is not None:
            return self.rows.repeated(each).ids
        tasks = len(self.masks)
        return torch.arange(tasks, device=self.masks.logits.device).repeat_interleave(each * (self.count // tasks))

    def _grouped(
        self, layer: Convolution, x: Tensor, padding: tuple[int, ...], logits: Tensor, thresholds: Tensor
    ) -> Tensor:
        plain = parameter_of(layer, "weight")
        weight = plain * ops.semi_binary_mask(logits, thresholds[:, None, None, None, None])
        if self.rows is not None:
            weight = weight.index_select(0, self.rows.ids)
        sets = weight.shape[0]  # of weights, each for as many rows as there are per set
        if sets == 0:
            return layer.convolve(x, plain, parameter_of(layer, "bias"))
        across = x.unflatten(0, (sets, x.shape[0] // sets)).transpose(0, 1).flatten(1, 2)
        groups = sets * layer.groups
        y = F.conv2d(across, weight.flatten(0, 1), None, layer.stride, padding, layer.dilation, groups)
        y = y.unflatten(1, (sets, layer.out_channels)).transpose(0, 1).flatten(0, 1)
        bias = self.masks.bias(layer)
        if bias is None:
            return y
        if bias.dim() == 2:
            bias = bias.index_select(0, self._of_rows(1))
        return y + bias.to(y.dtype)[..., None, None]

    def _check_weights(self, layer: Layer) -> None:
        for name, segment in () if torch.compiler.is_compiling() else layer.mask_segments.items():
            check_exchanged(self.masks, segment, parameter_of(layer, name))

    def _check(self, x: Tensor, layer: Layer | TaskNorm) -> None:
        if x.shape[0] != self.count:
            raise InputError(
                f"{type(layer).__name__} sees {x.shape[0]} rows where {self.count} samples pass under several tasks: "
                "such a network needs one task per batch"
            )


def _only_by_calls(name: str) -> InputError:
    return InputError(
        f"{name} is read by a module while several tasks pass together: such a network needs one task per batch"
    )


def _output_size(layer: Convolution, x: Tensor, padding: tuple[int, ...]) -> tuple[int, ...]:
    geometry = zip(x.shape[-2:], padding, layer.dilation, layer.kernel_size, layer.stride, strict=True)
    return tuple(
        (size + 2 * pad - spread * (kernel - 1) - 1) // step + 1 for size, pad, spread, kernel, step in geometry
    )


# -- which networks it serves -----------------------------------------------------------------------------------------


def serves(net: nn.Module, x: Tensor, tasks: int | None = None) -> bool:
    """Whether samples x of several tasks may pass through `net` together; with `tasks`, each under all of them.

    Not where samples of a batch meet: batch norm with the batch's own statistics. Not where a masked parameter is read
    otherwise than by a call of MaskedLinear or MaskedConv2d. Not where some layer sees other rows than one per sample,
    which `_row_per_sample` finds out (a compiled graph relies on the check in each layer).
    """
    for module in net.modules():
        if isinstance(module, TrackingNorm):
            if not isinstance(module, TaskStatistics) or not isinstance(module, _BY_ROWS) or module.training:
                return False
            if module.batch_statistics or module.mask_own:
                return False
        elif isinstance(module, (MaskedLinear, MaskedConv2d)):
            if module.mask_own or (module.segment("weight") is None and module.segment("bias") is not None):
                return False
            rows = x.shape[0] * (tasks if isinstance(module, nn.Conv2d) else 1) if tasks else 0
            if rows > _MOST_ROWS:
                return False
        elif is_attached(module) and (module.mask_segments or module.mask_own):
            return False
    return torch.compiler.is_compiling() or _row_per_sample(net, x)


_BY_ROWS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def _row_per_sample(net: nn.Module, x: Tensor) -> bool:
    """Runs the network on the meta device with 3 and with 5 samples: do all masked layers see 3, and 5, rows?"""
    known = _row_per_sample_of.setdefault(net, {})
    key = (tuple(x.shape[1:]), x.dtype, net.training)
    if key not in known:
        known[key] = all(_sees_rows(net, x, samples) for samples in (3, 5))
    return known[key]


def _sees_rows(net: nn.Module, x: Tensor, samples: int) -> bool:
    probe = _Probe(samples)
    state = {name: torch.empty_like(t, device="meta") for name, t in (*net.named_parameters(), *net.named_buffers())}
    try:
        with scope_of(net).use(probe), torch.no_grad():
            y = functional_call(net, state, (x.new_empty((samples, *x.shape[1:]), device="meta"),))
    except Exception:  # whatever a network does that meta tensors can't: its tasks pass one after another
        return False
    return probe.fits and isinstance(y, Tensor) and y.dim() > 0 and y.shape[0] == samples


@dataclass
class _Probe:
    """Stands in for a mask and notes whether layers see `samples` rows."""

    samples: int
    fits: bool = True

    def linear(self, layer: Layer, x: Tensor) -> Tensor:
        self.fits &= x.dim() > 1 and x.shape[0] == self.samples
        return F.linear(x, parameter_of(layer, "weight"), parameter_of(layer, "bias"))

    def conv2d(self, layer: Convolution, x: Tensor) -> Tensor:
        self.fits &= x.dim() == 4 and x.shape[0] == self.samples
        return layer.convolve(x, parameter_of(layer, "weight"), parameter_of(layer, "bias"))

    def batch_norm(self, layer: TaskNorm, x: Tensor, *args: Any) -> Tensor:
        self.fits &= x.shape[0] == self.samples
        return x

    def parameter(self, segment: int, plain: Tensor) -> Tensor:
        self.fits = False
        return plain

    def own(self, values: nn.ParameterList, plain: Tensor) -> Tensor:
        self.fits = False
        return plain

    def tasks(self) -> None:
        return None

    def statistic(self, module: nn.Module, name: str, stacked: Tensor, plain: Tensor) -> Tensor | None:
        self.fits = False
        return plain
