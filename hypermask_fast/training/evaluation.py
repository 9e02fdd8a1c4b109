"""Accuracy of a model on data: with the task known, and with the task inferred."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..data import Scenario, Split
from ..errors import InputError
from ..inference import FITTED, Mahalanobis, evaluating, predict
from ..masking.norms import uses_batches
from ..model import HyperMask
from .world import ALONE, World


class EntropyAccuracy(NamedTuple):
    """Per task of a scenario, percent: samples whose task was found, and whose task and class were; (T,) each."""

    task: Tensor
    label: Tensor


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
    with evaluating(model):
        given = tuple(model(split.batch(torch.arange(samples))[0], task=0).shape)
    if len(given) != 2 or given[0] != samples or given[1] < scenario.num_classes:
        most = "" if len(set(scenario.classes)) == 1 else "up to "
        raise InputError(
            f"the target network's output for {samples} samples has shape {given}: scenario {scenario.name} has "
            f"{most}{scenario.num_classes} classes per task and needs ({samples}, {scenario.num_classes} or more)"
        )


@torch.no_grad()
def accuracy(
    model: HyperMask,
    split: Split,
    task: int,
    batch_size: int,
    sparsity: float | None = None,
    world: World = ALONE,
) -> float:
    """Percent of the split's samples whose argmax is their label, under task's mask; one host sync in all.

    Where batch norm uses the batch's own statistics (the official fidelity, or no running statistics), the whole split
    is one batch, which one process takes; otherwise several processes share the split. Their counts are added up: the
    percentage is that of one process.

    Args:
        sparsity: percent, in place of the model's own (validation during the ramp).
        world: the processes that all call this.

    Returns:
        Percent, 0 to 100; NaN for an empty split.
    """
    with evaluating(model):
        mask = model.mask(task, sparsity)
        correct = torch.zeros((), dtype=torch.int64, device=mask.logits.device)
        whole = task if uses_batches(model.net) else None
        for x, y in world.chunks(split, _batch_size(model, split, batch_size), whole):
            correct += (model(x, mask).argmax(-1) == y).sum()
        correct = world.total(correct)
    return 100.0 * correct.item() / len(split) if len(split) else float("nan")


@dataclass
class Inferred:
    """How well a method finds the task, and the class within it, on the tasks' test samples.

    Attributes:
        method: of `inference.METHODS`, or "known".
        confusion: (T, T) int64 samples of task i (row) that were taken for task j (column).
        right: (T,) int64 samples of each task whose task and class were found.
        seconds: spent in predictions, masks not included: they are made once.
    """

    method: str
    confusion: Tensor
    right: Tensor
    seconds: float

    @property
    def samples(self) -> Tensor:
        """(T,) of each task."""
        return self.confusion.sum(1)

    @property
    def task(self) -> Tensor:
        """(T,) float64 percent of samples whose task was found; NaN of no samples."""
        return 100.0 * self.confusion.diagonal() / self.samples

    @property
    def label(self) -> Tensor:
        """(T,) float64 percent of samples whose task and class were found; NaN of no samples."""
        return 100.0 * self.right / self.samples

    @property
    def seconds_per_1000(self) -> float:
        """Of samples."""
        return 1000.0 * self.seconds / max(int(self.samples.sum()), 1)


@torch.no_grad()
def inferred(
    model: HyperMask, scenario: Scenario, method: str, batch_size: int, shuffled: bool = False, seed: int = 0
) -> Inferred:
    """Accuracy on every task's test split with the task unknown; only the scenario's tasks are to choose from.

    Args:
        method: of `inference.METHODS`, fitted where it has to be; or "known", which chooses nothing.
        batch_size: samples per batch. Where batch norm uses a batch's own statistics (the official fidelity), a batch
            is as large as the largest test split instead.
        shuffled: samples of all tasks are mixed, by a permutation of this seed. Otherwise every batch is of one task,
            which gives the task away where samples of a batch meet.

    Raises:
        InputError: what `predict` raises; shuffled with the task known.
    """
    if method == "known" and shuffled:
        raise InputError("shuffled is for unknown tasks: a known task is not given away by its batch")
    with evaluating(model):
        tasks = [number for number in range(len(scenario.tasks)) if number in model.tasks]
        masks = model.all_masks(tasks)
        device = masks.logits.device
        confusion = torch.zeros(len(scenario.tasks), len(scenario.tasks), dtype=torch.int64, device=device)
        right, seconds = torch.zeros(len(scenario.tasks), dtype=torch.int64, device=device), 0.0
        for x, y, task in _test_batches(model, scenario, tasks, batch_size, shuffled, seed):
            started = _now(device)
            if method == "known":
                found, label = task, model(x, masks[tasks.index(int(task[0]))]).argmax(-1)
            else:
                found, label, _ = predict(model, x, masks, method=method, k=min(2, len(tasks)))
            seconds += _now(device) - started
            confusion.index_put_((task, found), torch.ones_like(task), accumulate=True)
            right.index_put_((task,), ((found == task) & (label == y)).to(torch.int64), accumulate=True)
    return Inferred(method, confusion.cpu(), right.cpu(), seconds)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _test_batches(
    model: HyperMask, scenario: Scenario, tasks: list[int], batch_size: int, shuffled: bool, seed: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(x, y, task (B,) int64) over the test samples of these tasks."""
    splits = [scenario.tasks[task].test for task in tasks]
    if not shuffled:
        for task, split in zip(tasks, splits, strict=True):
            for x, y in split.chunks(_batch_size(model, split, batch_size)):
                yield x, y, torch.full_like(y, task)
        return
    size = max(_batch_size(model, split, batch_size) for split in splits)
    whose = torch.cat([torch.full((len(split),), row) for row, split in enumerate(splits)])
    place = torch.cat([torch.arange(len(split)) for split in splits])
    for chosen in torch.randperm(len(whose), generator=torch.Generator().manual_seed(seed)).split(size):
        parts = []
        for row in whose[chosen].unique().tolist():
            x, y = splits[row].batch(place[chosen[whose[chosen] == row]])
            parts.append((x, y, torch.full_like(y, tasks[row])))
        x, y, task = (torch.cat(each) for each in zip(*parts, strict=True))
        yield x, y, task


def entropy_accuracy(model: HyperMask, scenario: Scenario, batch_size: int) -> EntropyAccuracy:
    """Accuracy on every task's test split with the task unknown, inferred by lowest entropy; see `inferred`.

    A task that was removed from the model is not among those to choose from, and has NaN.
    """
    found = inferred(model, scenario, "entropy", batch_size)
    return EntropyAccuracy(found.task, found.label)


def fit(model: HyperMask, scenario: Scenario, method: str, layer: str | None = None) -> None:
    """Fits what a method needs to the scenario's training splits, unless the model has it, of these weights.

    Mahalanobis' shrinkage is chosen on the validation splits, where every task has one.

    Args:
        layer: see `FeCAM.fit`. One that is given is fitted in any case.

    Raises:
        InputError: what `FeCAM.fit` raises; a layer for a method that looks at none.
    """
    kind = FITTED.get(method)
    if kind is None:
        if layer is not None:
            raise InputError(f"{method} looks at no layer's features: a layer is for {', '.join(FITTED)}")
        return
    tasks = [number for number in range(len(scenario.tasks)) if number in model.tasks]
    there = model.fitted.get(kind.name)
    if layer is None and there is not None and there.is_of(model, tasks):
        return
    if kind is Mahalanobis:
        validated = all(len(scenario.tasks[task].validation) for task in tasks)
        Mahalanobis.fit(model, scenario, layer=layer, validation=scenario if validated else None)
    else:
        kind.fit(model, scenario, layer=layer)


def gives_away(model: HyperMask, method: str, shuffled: bool) -> str | None:
    """What makes batches of one task easier than single samples; None where nothing does."""
    if shuffled or method == "known":
        return None
    if uses_batches(model.net):
        return "batch norm uses the batch's own statistics, and every batch is of one task: that gives the task away"
    if method.startswith("gradient"):
        return f"{method} looks at a batch as a whole, and every batch is of one task: that helps it"
    return None


def _batch_size(model: HyperMask, split: Split, batch_size: int) -> int:
    return max(len(split), 1) if uses_batches(model.net) else batch_size
