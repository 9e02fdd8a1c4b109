"""A scenario: the sequence of classification tasks that a continual learner meets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..checks import check_whole, one_line
from ..errors import InputError
from .splits import DatasetSplit, Split, TensorSplit, empty_split
from .transforms import UNIT_SCALE, Transform

PARTS = ("training", "validation", "test")


@dataclass(frozen=True, eq=False)
class TaskData:
    """One task: its three splits, labels 0 .. num_classes - 1 in each. The validation split may be empty.

    validation: None is an empty split.
    class_names: what the data set calls label 0, 1, ...; () where they have no other names.
    num_classes: of this task, where tasks differ in it; None: the scenario's.

    Raises:
        InputError: training, validation or test data that are no split.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    class_names: tuple[str, ...] = ()
    num_classes: int | None = None

    def __post_init__(self) -> None:
        if self.validation is None:
            object.__setattr__(self, "validation", empty_split())
        for part, split in zip(PARTS, self.splits, strict=True):
            if not isinstance(split, Split):
                raise InputError(
                    f"the {part} data of task {self.name!r} must be a split, such as TensorSplit(x, y) or "
                    f"DatasetSplit(dataset), not {type(split).__name__}"
                )

    @property
    def splits(self) -> tuple[Split, Split, Split]:
        """In the order of `PARTS`."""
        return self.train, self.validation, self.test

    def map(self, change: Callable[[Split], Split]) -> TaskData:
        """The task with each of its splits changed."""
        train, validation, test = map(change, self.splits)
        return replace(self, train=train, validation=validation, test=test)


@dataclass(frozen=True, eq=False)
class Scenario:
    """Tasks that share one input shape and one output layer.

    Args:
        name: for reports and checkpoints.
        tasks: in the order they are learnt; at least one. The labels of a `DatasetSplit` are checked as they are read.
        input_shape: of one sample as the model gets it, without the batch.
        num_classes: outputs of the network: classes per task, or of the task that has most. A task's are labelled
            0 .. its number - 1.

    Raises:
        InputError: no tasks, or something else among them; an input shape that is none; a task without training or
            test samples; labels of a `TensorSplit` on the CPU outside of 0 .. num_classes - 1 (on a GPU looking at them
            would mean to wait for it); a task of more classes than num_classes.
    """

    name: str
    tasks: tuple[TaskData, ...]
    input_shape: tuple[int, ...]
    num_classes: int

    def __post_init__(self) -> None:
        if not isinstance(self.tasks, Sequence):  # a generator would be empty when it is read the second time
            raise InputError(f"tasks of {self.name} must be a tuple of TaskData, not {type(self.tasks).__name__}")
        check_filled(self.name, self.tasks)
        shape = self.input_shape
        sized = isinstance(shape, Sequence) and shape and all(type(size) is int and size > 0 for size in shape)
        if not sized:
            raise InputError(f"input_shape of {self.name} must list positive sizes, such as (1, 28, 28), not {shape!r}")
        object.__setattr__(self, "input_shape", tuple(shape))
        check_whole(f"num_classes of {self.name}", self.num_classes, 1)
        for t, (task, classes) in enumerate(zip(self.tasks, self.classes, strict=True)):
            check_whole(f"num_classes of {self.label(t)}", classes, 1, self.num_classes)
            for part, split in zip(PARTS, task.splits, strict=True):
                if isinstance(split, TensorSplit) and split.device.type == "cpu" and len(split):
                    _check_labels(f"{self.label(t)}, {part} set", split.labels, classes)
        restricted = (_restricted(task, classes) for task, classes in zip(self.tasks, self.classes, strict=True))
        object.__setattr__(self, "tasks", tuple(restricted))

    @property
    def classes(self) -> tuple[int, ...]:
        """How many classes each task has: what `HyperMask` takes as `classes`, where they differ."""
        return tuple(self.num_classes if task.num_classes is None else task.num_classes for task in self.tasks)

    def label(self, task: int) -> str:
        """ "task 1 (digits 2, 3)": what a task is called, to people, everywhere."""
        return task_label(task, self.tasks[task].name)

    def to(self, device: torch.device | str) -> Scenario:
        """The scenario with every batch on `device`; tensors that tasks share stay shared."""
        moved: dict[int, Tensor] = {}

        def move_split(split: Split) -> Split:
            return split.to(device, moved) if isinstance(split, TensorSplit) else split.to(device)

        return replace(self, tasks=tuple(task.map(move_split) for task in self.tasks))


def task_label(number: int, name: str) -> str:
    """ "task 1 (digits 2, 3)"; "task 1" where the name says no more."""
    return f"task {number}" if name in ("", str(number)) else f"task {number} ({one_line(name)})"


def check_filled(name: str, tasks: Sequence[TaskData]) -> None:
    """Raises InputError unless there are tasks, each with training and test samples."""
    if not tasks:
        raise InputError(f"scenario {name} has no tasks: give it at least one")
    for t, task in enumerate(tasks):
        if not isinstance(task, TaskData):
            raise InputError(f"task {t} of {name} must be a TaskData, not {type(task).__name__}")
        for part, split in zip(PARTS, task.splits, strict=True):
            if len(split) == 0 and part != "validation":
                raise InputError(f"{task_label(t, task.name)} of {name} has no {part} samples; it needs some")


def _restricted(task: TaskData, classes: int) -> TaskData:
    """The task with labels that are read later checked to be 0 .. classes - 1 as they are read."""

    def restrict(split: Split) -> Split:
        if not isinstance(split, DatasetSplit) or (split.num_classes or classes + 1) <= classes:
            return split
        return replace(split, num_classes=classes)

    return task.map(restrict) if any(isinstance(split, DatasetSplit) for split in task.splits) else task


def _check_labels(where: str, labels: Tensor, classes: int) -> None:
    low, high = labels.aminmax()
    if low < 0 or high >= classes:
        found = low.item() if low < 0 else high.item()
        raise InputError(f"{where}: labels must be 0 .. {classes - 1}, found {found}")


def split_by_class(
    inputs: Tensor,
    labels: Tensor,
    test_inputs: Tensor,
    test_labels: Tensor,
    class_groups: Sequence[Sequence[int]],
    validation: int = 0,
    prepare: Transform = UNIT_SCALE,
    augment: Transform | None = None,
    *,
    name: str = "split",
    unequal: bool = False,
    validation_per_class: int | None = None,
) -> Scenario:
    """One task per group of classes: label i of a task is the i-th class of its group.

    Args:
        inputs: (n, ...) uint8 or float32, the training samples.
        labels: (n,) int64.
        test_inputs: (m, ...), like inputs.
        test_labels: (m,) int64.
        class_groups: the labels of each task's classes, in order; groups of one size (unless `unequal`), no class
            twice.
        validation: each task's first `validation` training samples, in the order given, are its validation
            set and leave its training set.
        prepare: stored form to model input, see `TensorSplit`.
        augment: random transform of training batches as stored.
        name: the scenario's.
        unequal: groups may differ in size.
        validation_per_class: in place of validation: of each class of a task, the first so many training samples.

    Raises:
        InputError: groups of different size or none, a class in two of them or without samples; validation
            negative or so large that a task, or one of its classes, has no training samples left, or both kinds of it;
            tensors that `TensorSplit` refuses.
    """
    groups = [tuple(group) for group in class_groups]
    _check_groups(groups, unequal)
    held_out = HoldOut.asked(validation or None, validation_per_class) or HoldOut(validation)
    train = TensorSplit(inputs, labels, prepare, augment)
    test = TensorSplit(test_inputs, test_labels, prepare)
    tasks = []
    for t, group in enumerate(groups):
        task_train = _of_classes(train, group, "training")
        rest, validating = held_out.split(task_train, f"task {t}")
        names, of_task = tuple(map(str, group)), len(group) if unequal else None
        tasks.append(TaskData(",".join(names), rest, validating, _of_classes(test, group, "test"), names, of_task))
    return Scenario(name, tuple(tasks), sample_shape(train), max(map(len, groups)))


@dataclass(frozen=True)
class HoldOut:
    """Which training samples of a task validate: the first `samples` of the task, or of each of its classes.

    Raises:
        InputError: a number that is none, or negative.
    """

    samples: int
    per_class: bool = False

    def __post_init__(self) -> None:
        check_whole("validation_per_class" if self.per_class else "validation", self.samples, 0)

    @classmethod
    def asked(cls, validation: int | None, validation_per_class: int | None) -> HoldOut | None:
        """What one of the two numbers says; None where neither is given. Raises InputError where both are."""
        if validation is not None and validation_per_class is not None:
            raise InputError(
                "validation counts samples of a task, validation_per_class of each class: give one of them"
            )
        if validation_per_class is not None:
            return cls(validation_per_class, per_class=True)
        return None if validation is None else cls(validation)

    def split(self, train: TensorSplit, task: str) -> tuple[TensorSplit, TensorSplit]:
        """The training set without these samples, and these, not augmented; order kept. Views of train, but per class.

        Raises:
            InputError: nothing would be left to train on, of the task or of a class; `task` names it in the message.
        """
        if not self.per_class:
            _check_left("validation", self.samples, len(train), f"{task} no training samples: it has")
            parts = slice(self.samples, None), slice(self.samples)
        else:
            one_hot = torch.nn.functional.one_hot(train.labels)
            counts = one_hot.sum(0)
            least = int(counts[counts > 0].min())
            _check_left("validation_per_class", self.samples, least, f"a class of {task} no training samples: one has")
            place = one_hot.cumsum(0).gather(1, train.labels[:, None]).squeeze(1)  # among those of its class, from 1
            parts = place > self.samples, place <= self.samples
        rest, held_out = (replace(train, inputs=train.inputs[part], labels=train.labels[part]) for part in parts)
        return rest, replace(held_out, augment=None)


def _check_left(name: str, held_out: int, there: int, whom: str) -> None:
    if held_out >= there:
        raise InputError(f"{name} {held_out} leaves {whom} {there}, so at most {there - 1}")


def sample_shape(split: TensorSplit) -> tuple[int, ...]:
    """Shape of one sample as the model gets it."""
    x, _ = split.batch(torch.arange(min(1, len(split))))
    return tuple(x.shape[1:])


def _of_classes(split: TensorSplit, group: Sequence[int], part: str) -> TensorSplit:
    """The samples of the group's classes, order kept, labelled by the class's place in the group."""
    # (n, classes): which of the group's classes each sample is.
    member = split.labels[:, None] == torch.tensor(group, device=split.device)
    missing = [c for c, found in zip(group, member.any(0).tolist(), strict=True) if not found]
    if missing:
        raise InputError(f"class {missing[0]} has no {part} samples: leave it out of the tasks or add some")
    chosen = member.any(1).nonzero().squeeze(1)
    return replace(split, inputs=split.inputs[chosen], labels=member[chosen].int().argmax(1))


def _check_groups(groups: Sequence[Sequence[int]], unequal: bool) -> None:
    sizes = sorted({len(group) for group in groups})
    if not sizes or sizes[0] == 0 or (len(sizes) > 1 and not unequal):
        raise InputError(
            f"class_groups must be one or more groups of one size (unequal=True: or of several), "
            f"not {len(groups)} of sizes {sizes}"
        )
    seen: set[int] = set()
    for c in (c for group in groups for c in group):
        if c in seen:
            raise InputError(f"class {c} is in class_groups twice: each class belongs to one task")
        seen.add(c)
