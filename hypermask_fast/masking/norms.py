"""Normalisation with running statistics per task."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase  # noqa: PLC2701 # pyright: ignore[reportPrivateUsage]

from ..errors import InputError
from ..ranks import Ranks
from .access import MaskedModule, exchange_class, is_attached
from .scope import PLAIN, Scope
from .synchronised import Synchronised

BatchNorm = _BatchNorm  # what all of PyTorch's are, nn.SyncBatchNorm too, and users' own; it has no public name
TrackingNorm = _NormBase  # the same with nn.InstanceNorm, which can have running statistics too

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
OWN = "plain_"  # before the name of the buffer that holds the network's own statistics


class TaskNorm(Protocol):
    """What a pass needs of a `TaskStatistics`, which says what each method does."""

    training: bool
    frozen: tuple[int, ...]

    def normalise(self, x: Tensor, *args: Any) -> Tensor: ...

    def forward_rows(self, x: Tensor, tasks: Tensor) -> Tensor: ...

    def stacked(self) -> dict[str, Tensor]: ...


def _statistic(name: str) -> property:
    def get(self: Any) -> Tensor | None:
        stacked = self._buffers[name]
        scope: Scope | None = self.mask_scope
        running = None if scope is None else scope.running
        if running is None or stacked is None:
            return stacked
        if running is not PLAIN and self.batch_statistics:
            return None
        return running.statistic(self, name, stacked, self._buffers[OWN + name])

    def put(self: Any, value: Any) -> None:  # nn.Module has taken every tensor before
        raise InputError(f"{name} of {type(self).__name__} is a buffer: a tensor, not {value!r}")

    return property(get, put)


def _tracking() -> property:
    """Some of PyTorch's forward passes ask whether statistics are kept, and not whether there are any."""
    name = "track_running_stats"

    def get(self: Any) -> bool:
        scope: Scope | None = self.mask_scope
        running = scope.running if self.batch_statistics and scope is not None else None
        return vars(self)[name] and (running is None or running is PLAIN)

    def put(self: Any, value: bool) -> None:
        vars(self)[name] = value

    return property(get, put)


class BatchStatistics(MaskedModule):
    """A batch norm whose batches can be shares of one; a mixin before nn.BatchNorm2d and its like.

    Attributes:
        ranks: the processes that have the other shares; None: a batch is whole.
        ranks_in_evaluation: whether it is a share in evaluation mode, too.
    """

    training: bool
    ranks: Ranks | None = None
    ranks_in_evaluation: bool = False

    def forward(self, input: Tensor, *args: Any) -> Tensor:
        return self.normalise(input, *args)

    def normalise(self, x: Tensor, *args: Any) -> Tensor:
        """The forward pass of the class itself, on the statistics that the running pass sees."""
        if self.ranks is None or not self._has_a_share():
            return super().forward(x, *args)  # pyright: ignore[reportAttributeAccessIssue]
        with Synchronised(self.ranks, type(self).__name__):
            if isinstance(self, nn.SyncBatchNorm):  # its own exchange needs a GPU
                return super(nn.SyncBatchNorm, self).forward(x)
            return super().forward(x, *args)  # pyright: ignore[reportAttributeAccessIssue]

    def _has_a_share(self) -> bool:
        running = None if self.mask_scope is None else self.mask_scope.running
        return self.training or (self.ranks_in_evaluation and running is not PLAIN)


def synchronise(net: nn.Module, scope: Scope, ranks: Ranks, evaluation: bool) -> int:
    """Has every batch norm of a masked network take the ranks' batches as shares of one; returns how many there are.

    evaluation: in evaluation mode, too.

    Raises:
        InputError: a module that Python can't give another class.
    """
    count = 0
    for path, module in net.named_modules():
        if not isinstance(module, BatchNorm):
            continue
        one: Any = module
        if not isinstance(module, BatchStatistics):
            if not is_attached(one):
                one.mask_scope, one.mask_segments, one.mask_own, one.mask_plain = scope, {}, {}, type(one)
            parts: Any = getattr(type(one), "mask_parts", (type(one), frozenset()))
            exchange_class(one, path, parts[0], parts[1], BatchStatistics)
        one.ranks, one.ranks_in_evaluation = ranks, evaluation
        count += 1
    return count


def uses_batches(net: nn.Module) -> bool:
    """Whether some batch norm of a masked network takes the batch's own statistics in evaluation mode, too."""
    norms: list[Any] = [module for module in net.modules() if isinstance(module, BatchNorm)]
    return any(not isinstance(norm, TaskStatistics) or norm.batch_statistics for norm in norms)


class TaskStatistics(BatchStatistics):
    """A normalisation whose running statistics are per task; a mixin before nn.BatchNorm2d and its like.

    running_mean, running_var: (tasks, features); num_batches_tracked: (tasks,). Within a pass they read as the running
    task's row, so the class's own forward serves. With `batch_statistics` (the official fidelity) the batch's own
    statistics are used, always. The statistics that the network came with stay beside them, for `model.disabled()`.
    """

    batch_statistics: bool = False
    frozen: tuple[int, ...] = ()  # tasks whose statistics training no longer moves
    running_mean: Any = _statistic("running_mean")
    running_var: Any = _statistic("running_var")
    num_batches_tracked: Any = _statistic("num_batches_tracked")
    track_running_stats: Any = _tracking()

    def forward(self, input: Tensor, *args: Any) -> Tensor:
        running: Any = None if self.mask_scope is None else self.mask_scope.running
        if running is None:
            raise InputError(
                f"{type(self).__name__} has statistics per task and is called outside of a forward pass: call "
                "model(x, task), or work inside `with model.use_task(task):` or `with model.disabled():`"
            )
        return self.normalise(input, *args) if running is PLAIN else running.batch_norm(self, input, *args)

    def forward_rows(self, x: Tensor, tasks: Tensor) -> Tensor:
        """Evaluation with each row's own task's statistics: x (rows, features, ...), tasks (rows,) int64."""
        module: Any = self
        stacked = self.stacked()
        mean, var = (stacked[name].index_select(0, tasks) for name in ("running_mean", "running_var"))
        scale = (var + module.eps).rsqrt()
        if module.weight is not None:
            scale = scale * module.weight
        shift = -mean * scale if module.bias is None else module.bias - mean * scale
        shape = (*scale.shape, *(1,) * (x.dim() - 2))
        return (x * scale.view(shape) + shift.view(shape)).to(x.dtype)

    def stacked(self) -> dict[str, Tensor]:
        """The statistics of all tasks, by name."""
        buffers: dict[str, Tensor] = self._buffers  # pyright: ignore
        return {name: buffers[name] for name in STATISTICS}

    # -- the life of a task ---------------------------------------------------------------------------------------

    def begin(self, num_tasks: int, batch_statistics: bool) -> None:
        """Every task begins with the network's own statistics, which stay beside them."""
        module: Any = self
        plain = {name: module._buffers[name] for name in STATISTICS}
        of_tasks = {name: own.expand(num_tasks, *own.shape).clone() for name, own in plain.items()}
        for name, own in plain.items():
            module.register_buffer(OWN + name, own, persistent=False)
            module._buffers[name] = of_tasks[name]
        self.batch_statistics = batch_statistics

    def end(self, task: int | None) -> None:
        """Leaves one task's statistics (None: the network's own) in a module of its own class."""
        module: Any = self
        for name in STATISTICS if OWN + STATISTICS[0] in module._buffers else ():  # it has begun
            stacked, own = module._buffers[name], module._buffers.pop(OWN + name)
            module._non_persistent_buffers_set.discard(OWN + name)
            module._buffers[name] = own if task is None else stacked[task].clone()
        if task is not None and self.batch_statistics:
            module.track_running_stats = False
            for name in STATISTICS:
                module._buffers[name] = None
        for name in ("batch_statistics", "frozen"):
            vars(module).pop(name, None)

    def add_task(self, like: int | None = None) -> None:
        """Statistics for one more task: the network's own, as at construction, or those of the task `like`."""
        for name, buffer in self.stacked().items():
            row = self._own(name) if like is None else buffer[like]
            self._buffers[name] = torch.cat([buffer, row[None]])  # pyright: ignore

    def reset(self, task: int) -> None:
        """Puts the network's own statistics in the place of a task's."""
        for name, buffer in self.stacked().items():
            buffer[task] = self._own(name)

    def _own(self, name: str) -> Tensor:
        return self._buffers[OWN + name]  # pyright: ignore

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        # A plain network's statistics serve every task.
        for name, own in self.stacked().items():
            value = state_dict.get(prefix + name)
            if value is not None and value.dim() == own.dim() - 1:
                state_dict[prefix + name] = value.expand_as(own).clone()
        super()._load_from_state_dict(  # pyright: ignore
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


@contextmanager
def with_one_sample(net: nn.Module) -> Iterator[None]:
    """For a training pass over one sample, which batch norm can't take where it has one value per channel.

    Raises:
        InputError: in place of PyTorch's error; all statistics are as they were.
    """
    before = [
        (buffer, buffer.clone())
        for module in net.modules()
        if isinstance(module, TaskStatistics) and module.training
        for buffer in module.stacked().values()
    ]
    try:
        yield
    except Exception as error:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)
        if not str(error).startswith("Expected more than 1 value per channel"):
            raise
        raise InputError(
            "batch norm in training mode can't take a single value per channel, as one sample of a task gives it: "
            "give every task two samples or more (such as by drop_last=True), or train without batch norm"
        ) from error


def tracks(module: nn.Module) -> bool:
    """Whether the module keeps running statistics, so that each task is to have its own."""
    return isinstance(module, TrackingNorm) and module.track_running_stats and module.running_mean is not None
