"""Which task is this? Predictions where the task of a sample is unknown."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..masking.masks import TaskMask
from ..masking.task_batch import TaskMasks
from ..model import HyperMask


class Prediction(NamedTuple):
    """Per sample: the task chosen and that task's class, both (batch,) int64."""

    task: Tensor
    label: Tensor

    def absolute(self, classes_per_task: int | Sequence[int]) -> Tensor:
        """(batch,) int64 class among all tasks' classes: classes_per_task * task + label.

        classes_per_task: or the number of classes of each task, removed ones included, where tasks differ in it.
        """
        if isinstance(classes_per_task, int):
            return classes_per_task * self.task + self.label
        before = torch.tensor([0, *classes_per_task], device=self.task.device).cumsum(0)
        return before[self.task] + self.label


@torch.no_grad()
def predict(model: HyperMask, x: Tensor, masks: Sequence[TaskMask] | None = None) -> Prediction:
    """Runs every task's mask; the task of lowest softmax entropy wins and its argmax is the class.

    Args:
        model: in evaluation mode, as is usual for predictions.
        x: a batch for the target network, whose outputs are (batch, classes).
        masks: from `model.all_masks()`, which spares making them for each batch; or of the tasks to choose from.

    Returns:
        Ids of tasks, whichever masks are given.

    Source: HyperMask, arXiv 2310.00113, task inference by entropy.
    """
    logits = model.forward_all_tasks(x, masks=masks)
    row = ops.entropy_select(logits)
    label = logits[row, torch.arange(len(row), device=row.device)].argmax(-1)
    if masks is None:
        return Prediction(row, label)
    ids = masks.ids() if isinstance(masks, TaskMasks) else torch.tensor([int(m.task) for m in masks], device=row.device)
    return Prediction(ids[row], label)
