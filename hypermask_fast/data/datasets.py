"""Scenarios of anybody's torch Datasets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..checks import check_whole
from ..errors import InputError
from .items import stack_items
from .scenario import PARTS, Scenario, TaskData, check_filled
from .splits import DatasetSplit, Split, TensorSplit, empty_split
from .transforms import Transform


def from_datasets(
    datasets: Iterable[tuple[Any, Any | None, Any]],
    *,
    name: str = "custom",
    in_memory: bool = True,
    num_workers: int = 0,
    num_classes: int | Sequence[int] | None = None,
    augment: Transform | None = None,
) -> Scenario:
    """A scenario of one (train, validation, test) triple of map-style torch Datasets per task.

    Args:
        datasets: the triples; validation None means none. Items are (input, label): inputs tensors or arrays
            of one shape, float (taken as they are) or uint8 with channels first (scaled to [0, 1]); labels
            integers 0 .. C - 1, with the same C in every task.
        name: the scenario's.
        in_memory: read every item once, now, and keep it: fast, but the randomness of a dataset's transform
            is then frozen. Otherwise items are read each time they are asked for, see `DatasetSplit`.
        num_workers: DataLoader's processes, where not in_memory.
        num_classes: C, or one number per task, where they differ. None takes it from the training labels, of which
            every task must have all; where not in_memory that reads all training data once.
        augment: random transform of training batches as stored, see `TensorSplit`; in_memory only.

    Raises:
        InputError: no tasks; an empty training or test set; items not as above; shapes or classes that differ
            between tasks; augment without in_memory. Where not in_memory, labels outside 0 .. C - 1 of
            validation and test data are found when they are read.
    """
    if augment is not None and not in_memory:
        raise InputError("augment works on data in memory: leave it out, or use in_memory=True")
    tasks = []
    for t, triple in enumerate(datasets):
        if not isinstance(triple, (tuple, list)) or len(triple) != 3:
            raise InputError(f"task {t} must be (train, validation, test), validation None for none")
        splits = []
        for part, dataset in zip(PARTS, triple, strict=True):
            with _naming(t, part):
                splits.append(_split(dataset, in_memory, num_workers))
        if in_memory:
            splits[0] = replace(splits[0], augment=augment)
        tasks.append(TaskData(str(t), *splits))
    check_filled(name, tasks)  # before samples are looked at
    shape = _common_shape(tasks)
    if isinstance(num_classes, Sequence):
        if len(num_classes) != len(tasks):
            raise InputError(f"num_classes must be one number, or one per task: {len(tasks)}, not {len(num_classes)}")
        for t, classes in enumerate(num_classes):
            check_whole(f"num_classes of task {t}", classes, 1)
        most = max(num_classes)
        tasks = [replace(task, num_classes=classes) for task, classes in zip(tasks, num_classes, strict=True)]
    else:
        most = _common_classes(tasks, num_classes)
    return Scenario(name, tuple(tasks), shape, most)


def _split(dataset: Any, in_memory: bool, num_workers: int) -> Split:
    """The dataset as a split on the CPU; None as an empty one."""
    if dataset is None:
        return empty_split()
    split = DatasetSplit(dataset, num_workers=num_workers)
    if not in_memory:
        return split
    # By index up to len, not by iterating: a map-style dataset need not raise IndexError at its end.
    items = [dataset[i] for i in range(len(dataset))]
    return TensorSplit(*stack_items(items)) if items else empty_split()


def _common_shape(tasks: list[TaskData]) -> tuple[int, ...]:
    """The shape of one sample, the same in every split."""
    shapes: list[tuple[int, ...]] = []
    for t, part, split in _parts(tasks):
        if len(split) == 0:
            continue
        with _naming(t, part):
            shapes.append(_peek(split))
            if shapes[-1] != shapes[0]:
                raise InputError(f"inputs have shape {shapes[-1]}, those before {shapes[0]}: all need one shape")
    return shapes[0]


def _common_classes(tasks: list[TaskData], num_classes: int | None) -> int:
    """C: as given, else the largest training label of all tasks + 1.

    Raises:
        InputError: C is given as less than 1; or not given, and a task's training labels are not all of
            0 .. C - 1.
    """
    if num_classes is not None:
        check_whole("num_classes", num_classes, 1)
        return num_classes
    found = []
    for t, task in enumerate(tasks):
        with _naming(t, "training"):
            found.append(_labels(task.train).unique().tolist())
    classes = max(1, max(labels[-1] for labels in found) + 1)
    for t, labels in enumerate(found):
        if labels != list(range(classes)):
            listed = ", ".join(map(str, labels[:8])) + (", ..." if len(labels) > 8 else "")
            raise InputError(
                f"task {t}: training labels are {listed}; every task needs all of 0 .. {classes - 1}:"
                " map each task's classes to 0, 1, ..., the same number in every task"
            )
    return classes


def _labels(split: Split) -> Tensor:
    """All labels of a split that is not empty, (n,) int64."""
    if isinstance(split, TensorSplit):
        return split.labels
    with torch.random.fork_rng(devices=[]):  # looking must not change the draws that follow
        return torch.cat([y for _, y in split.chunks(256)])


def _peek(split: Split) -> tuple[int, ...]:
    """Shape of the first sample."""
    with torch.random.fork_rng(devices=[]):
        return tuple(split.batch(torch.zeros(1, dtype=torch.int64))[0].shape[1:])


def _parts(tasks: list[TaskData]) -> Iterator[tuple[int, str, Split]]:
    """Every split with its task's number and its part's name."""
    for t, task in enumerate(tasks):
        for part, split in zip(PARTS, task.splits, strict=True):
            yield t, part, split


@contextmanager
def _naming(t: int, part: str) -> Iterator[None]:
    """Puts the task and the part before the message of an InputError raised inside."""
    try:
        yield
    except InputError as error:
        raise InputError(f"task {t}, {part} set: {error}") from error
