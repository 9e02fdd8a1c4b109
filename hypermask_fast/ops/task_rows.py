"""Which task each row of a batch has, sorted once for all layers of a pass."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InputError


class TaskRows(NamedTuple):
    """Rows grouped by task; `task_batched_linear` takes it in place of the ids and does not sort them again.

    Attributes:
        ids: (B,) int64, the task of each row.
        order: (B,) int64, the rows sorted by task, each task's in their own order, those whose id is no task's last.
        begins: (T + 2,) int64: order[begins[t] : begins[t + 1]] are task t's rows, those from begins[T] on nobody's.
    """

    ids: Tensor
    order: Tensor
    begins: Tensor

    @classmethod
    def of(cls, ids: "Tensor | TaskRows", tasks: int) -> "TaskRows":
        """Sorts ids (B,) of `tasks` tasks, on their device and without a wait; sorted ones are returned as they are.

        Raises:
            InputError: ids sorted for another number of tasks.
        """
        if isinstance(ids, TaskRows):
            if len(ids.begins) != tasks + 2:
                raise InputError(f"these rows are sorted for {len(ids.begins) - 2} tasks, not for {tasks}")
            return ids
        known = (ids >= 0) & (ids < tasks)
        in_order, order = torch.sort(torch.where(known, ids, tasks), stable=True)
        tasks_and_ends = torch.arange(tasks + 2, device=ids.device)
        return cls(ids, order, torch.searchsorted(in_order, tasks_and_ends))

    def repeated(self, times: int) -> "TaskRows":
        """For `times` rows in place of each, one after another."""
        if times == 1:
            return self
        within = torch.arange(times, device=self.order.device)
        ids = self.ids[:, None].expand(-1, times).flatten()
        return TaskRows(ids, (self.order[:, None] * times + within).flatten(), self.begins * times)


def rows_of_tasks(y: Tensor, ids: Tensor | TaskRows) -> Tensor:
    """Row b of task ids[b] out of every task's, y (T, B, out): (B, out). See `task_batched_linear`."""
    task_ids = ids.ids if isinstance(ids, TaskRows) else ids
    known, row = (task_ids >= 0) & (task_ids < len(y)), torch.arange(len(task_ids), device=y.device)
    if torch.compiler.is_compiling():
        return y[task_ids.where(known, 0), row].where(known[:, None], math.nan)
    if not known.all():
        raise InputError(f"task_ids must be 0 to {len(y) - 1}")
    return y[task_ids, row]
