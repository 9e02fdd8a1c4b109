"""Accuracy of a model on data: with the task known, and with the task inferred."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from ..data import Scenario, Split
from ..errors import InputError
from ..inference import predict
from ..masking.norms import uses_batches
from ..model import HyperMask
from .processes import ALONE, Processes


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


def check_tasks(model: HyperMask, scenario: Scenario) -> None:
    """Raises InputError unless the model has the scenario's tasks, and as many classes in each."""
    numbers = range(len(scenario.tasks))
    missing = [str(number) for number in numbers if number not in model.tasks]
    if missing:
        raise InputError(f"the scenario has {len(numbers)} tasks, of which the model lacks {', '.join(missing)}")
    mine = scenario.classes if model.classes is None else model.classes[: len(numbers)]
    if mine != scenario.classes:
        raise InputError(
            f"the scenario's tasks have {list(scenario.classes)} classes, the model's {list(mine)}: give it "
            f"HyperMask(..., classes=scenario.classes)"
        )
    if model.classes is None and len(set(scenario.classes)) > 1:
        raise InputError(
            f"the scenario's tasks differ in their number of classes, {list(scenario.classes)}: tell the model, "
            "HyperMask(..., classes=scenario.classes)"
        )


@torch.no_grad()
def check_outputs(model: HyperMask, scenario: Scenario) -> None:
    """Shows the network two test samples, in evaluation mode, so that nothing of it changes.

    Raises:
        InputError: it does not take them, or does not give (2, outputs) with an output for each of the classes.
    """
    check_tasks(model, scenario)
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
def accuracy(
    model: HyperMask,
    split: Split,
    task: int,
    batch_size: int,
    sparsity: float | None = None,
    processes: Processes = ALONE,
) -> float:
    """Percent of the split's samples whose argmax is their label, under task's mask; one host sync in all.

    Where batch norm uses the batch's own statistics (the official fidelity), the whole split is one batch. Several
    processes share the split, or one of them has all of it where a sample's output depends on its batch. Their counts
    are added up: the percentage is that of one process.

    Args:
        sparsity: percent, in place of the model's own (validation during the ramp).
        processes: which all call this.

    Returns:
        Percent, 0 to 100; NaN for an empty split.
    """
    with _evaluating(model):
        mask = model.mask(task, sparsity)
        correct = torch.zeros((), dtype=torch.int64, device=mask.logits.device)
        whole = task if uses_batches(model.net) else None
        for x, y in processes.chunks(split, _batch_size(model, split, batch_size), whole):
            correct += (model(x, mask).argmax(-1) == y).sum()
        correct = processes.total(correct)
    return 100.0 * correct.item() / len(split) if len(split) else float("nan")


@torch.no_grad()
def entropy_accuracy(model: HyperMask, scenario: Scenario, batch_size: int) -> EntropyAccuracy:
    """Accuracy on every task's test split with the task unknown, inferred by lowest entropy; see `predict`.

    A task that was removed from the model is not among those to choose from, and has NaN.
    """
    with _evaluating(model):
        masks = model.all_masks([number for number in model.tasks if number < len(scenario.tasks)])
        rows = []
        for number, task in enumerate(scenario.tasks):
            if number not in model.tasks:
                rows.append(torch.full((2,), float("nan"), dtype=torch.float64, device=masks.logits.device))
                continue
            correct = torch.zeros(2, dtype=torch.int64, device=masks.logits.device)
            for x, y in task.test.chunks(_batch_size(model, task.test, batch_size)):
                found = predict(model, x, masks)
                right = found.task == number
                correct += torch.stack([right.sum(), (right & (found.label == y)).sum()])
            rows.append(100.0 * correct.double() / max(len(task.test), 1))
    return EntropyAccuracy(*torch.stack(rows, dim=1).cpu())


def _batch_size(model: HyperMask, split: Split, batch_size: int) -> int:
    whole = any(getattr(module, "batch_statistics", False) for module in model.net.modules())
    return max(len(split), 1) if whole else batch_size
