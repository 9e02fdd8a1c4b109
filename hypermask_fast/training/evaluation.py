"""Accuracy of a model on data: with the task known, and with the task inferred."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from ..data import Scenario, Split
from ..errors import InputError
from ..inference import predict
from ..model import HyperMask


class EntropyAccuracy(NamedTuple):
    """Per task of a scenario, percent: samples whose task was found, and whose task and class were; (T,) each."""

    task: Tensor
    label: Tensor


@contextmanager
def _evaluating(model: HyperMask) -> Iterator[None]:
    """In evaluation mode; afterwards, after an error too, every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@torch.no_grad()
def check_outputs(model: HyperMask, scenario: Scenario) -> None:
    """Shows the network two test samples, in evaluation mode, so that nothing of it changes.

    Raises:
        InputError: it does not take them, or does not give (2, outputs) with an output for each of the classes.
    """
    split = scenario.tasks[0].test
    samples = min(2, len(split))  # batch norm that uses a batch's own statistics needs more than one
    with _evaluating(model):
        given = tuple(model(split.batch(torch.arange(samples))[0], task=0).shape)
    if len(given) != 2 or given[0] != samples or given[1] < scenario.num_classes:
        raise InputError(
            f"the target network's output for {samples} samples has shape {given}: scenario {scenario.name} has "
            f"{scenario.num_classes} classes per task and needs ({samples}, {scenario.num_classes} or more)"
        )


@torch.no_grad()
def accuracy(model: HyperMask, split: Split, task: int, batch_size: int, sparsity: float | None = None) -> float:
    """Percent of the split's samples whose argmax is their label, under task's mask; one host sync in all.

    Where batch norm uses the batch's own statistics (the official fidelity), the whole split is one batch.

    Args:
        sparsity: percent, in place of the model's own (validation during the ramp).

    Returns:
        Percent, 0 to 100; NaN for an empty split.
    """
    with _evaluating(model):
        mask = model.mask(task, sparsity)
        correct = torch.zeros((), dtype=torch.int64, device=mask.logits.device)
        for x, y in split.chunks(_batch_size(model, split, batch_size)):
            correct += (model(x, mask).argmax(-1) == y).sum()
    return 100.0 * correct.item() / len(split) if len(split) else float("nan")


@torch.no_grad()
def entropy_accuracy(model: HyperMask, scenario: Scenario, batch_size: int) -> EntropyAccuracy:
    """Accuracy on every task's test split with the task unknown, inferred by lowest entropy; see `predict`."""
    with _evaluating(model):
        masks = model.all_masks()[: len(scenario.tasks)]
        rows = []
        for number, task in enumerate(scenario.tasks):
            correct = torch.zeros(2, dtype=torch.int64, device=masks[0].logits.device)
            for x, y in task.test.chunks(_batch_size(model, task.test, batch_size)):
                found = predict(model, x, masks)
                right = found.task == number
                correct += torch.stack([right.sum(), (right & (found.label == y)).sum()])
            rows.append(100.0 * correct.double() / max(len(task.test), 1))
    return EntropyAccuracy(*torch.stack(rows, dim=1).cpu())


def _batch_size(model: HyperMask, split: Split, batch_size: int) -> int:
    whole = any(getattr(module, "batch_statistics", False) for module in model.net.modules())
    return max(len(split), 1) if whole else batch_size
