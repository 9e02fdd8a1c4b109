"""Which task is this? Predictions where the task of a sample is unknown."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import ops
from .masking.masks import TaskMask
from .model import HyperMask


class Prediction(NamedTuple):
    """Per sample: the task chosen and that task's class, both (batch,) int64."""

    task: Tensor
    label: Tensor

    def absolute(self, classes_per_task: int) -> Tensor:
        """(batch,) int64 class among all tasks' classes: classes_per_task * task + label."""
        return classes_per_task * self.task + self.label


@torch.no_grad()
def predict(model: HyperMask, x: Tensor, masks: Sequence[TaskMask] | None = None) -> Prediction:
    """Runs every task's mask; the task of lowest softmax entropy wins and its argmax is the class.

    Args:
        model: in evaluation mode, as is usual for predictions.
        x: a batch for the target network, whose outputs are (batch, classes).
        masks: from `model.all_masks()`, which spares making them for each batch.

    Source: HyperMask, arXiv 2310.00113, task inference by entropy.
    """
    logits = model.forward_all_tasks(x, masks=masks)
    task = ops.entropy_select(logits)
    chosen = logits[task, torch.arange(len(task), device=task.device)]
    return Prediction(task, chosen.argmax(-1))
