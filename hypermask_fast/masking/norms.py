"""Batch norm with running statistics per task."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # noqa: PLC2701 # pyright: ignore[reportPrivateUsage]

from .masks import active_mask

BatchNorm = _BatchNorm  # what all of PyTorch's are, nn.SyncBatchNorm too, and users' own; it has no public name


class TaskBatchNorm(BatchNorm):
    """Batch norm whose affine parameters all tasks share and whose running statistics are per task.

    running_mean, running_var: (tasks, features); num_batches_tracked: (tasks,). With `batch_statistics` (the
    official fidelity), and outside of a HyperMask forward pass, the batch's own statistics are used, always.
    """

    batch_statistics: bool = False
    # Tensors, always: nn.BatchNorm's are declared as Tensor | None.
    running_mean: Any
    running_var: Any
    num_batches_tracked: Any

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        running = active_mask()
        if self.batch_statistics or running is None:
            return F.batch_norm(input, None, None, self.weight, self.bias, True, 0.0, self.eps)
        return running.batch_norm(self, input)

    def forward_task(self, x: Tensor, task: int | Tensor) -> Tensor:
        """The whole batch with one task's statistics, which training moves."""
        if isinstance(task, Tensor):
            return self._forward_at(x, task.reshape(1))
        return self._normalise(x, *self.statistics(task))

    def forward_rows(self, x: Tensor, tasks: Tensor) -> Tensor:
        """Evaluation with each row's own task's statistics: x (rows, features, ...), tasks (rows,) int64."""
        mean, var = (buffer.index_select(0, tasks) for buffer in (self.running_mean, self.running_var))
        scale = (var + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight
        shift = -mean * scale if self.bias is None else self.bias - mean * scale
        shape = (*scale.shape, *(1,) * (x.dim() - 2))
        return (x * scale.view(shape) + shift.view(shape)).to(x.dtype)

    def statistics(self, task: int) -> tuple[Tensor, Tensor, Tensor]:
        """Views of one task's running mean (features,), variance (features,) and batch count ()."""
        return self.running_mean[task], self.running_var[task], self.num_batches_tracked[task]

    def _forward_at(self, x: Tensor, row: Tensor) -> Tensor:
        """The same with the task as a tensor: rows are gathered and put back, without a host sync."""
        buffers = (self.running_mean, self.running_var, self.num_batches_tracked)
        mean, var, count = (buffer.index_select(0, row)[0] for buffer in buffers)
        y = self._normalise(x, mean, var, count)
        if self.training:
            for buffer, value in zip(buffers, (mean, var, count), strict=True):
                buffer.index_copy_(0, row, value[None])
        return y

    def _normalise(self, x: Tensor, mean: Tensor, var: Tensor, count: Tensor) -> Tensor:
        factor = self.momentum
        if self.training:
            count.add_(1)
            if factor is None:  # cumulative average, as in nn.BatchNorm
                factor = 1.0 / float(count)
        return F.batch_norm(x, mean, var, self.weight, self.bias, self.training, factor or 0.0, self.eps)

    def add_task(self) -> None:
        """Fresh statistics (mean 0, variance 1) for one more task."""
        fresh = {"running_mean": 0.0, "running_var": 1.0, "num_batches_tracked": 0}
        for name, value in fresh.items():
            buffer = getattr(self, name)
            setattr(self, name, torch.cat([buffer, buffer.new_full((1, *buffer.shape[1:]), value)]))

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        # A plain network's statistics serve every task.
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            value, own = state_dict.get(prefix + name), getattr(self, name)
            if value is not None and value.dim() == own.dim() - 1:
                state_dict[prefix + name] = value.expand_as(own).clone()
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


class TaskBatchNorm1d(TaskBatchNorm, nn.BatchNorm1d):
    __doc__ = TaskBatchNorm.__doc__


class TaskBatchNorm2d(TaskBatchNorm, nn.BatchNorm2d):
    __doc__ = TaskBatchNorm.__doc__


class TaskBatchNorm3d(TaskBatchNorm, nn.BatchNorm3d):
    __doc__ = TaskBatchNorm.__doc__


TASK_NORM_OF = {
    nn.BatchNorm1d: TaskBatchNorm1d,
    nn.BatchNorm2d: TaskBatchNorm2d,
    nn.BatchNorm3d: TaskBatchNorm3d,
}
