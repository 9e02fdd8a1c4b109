"""The scenarios known by name, and how to load one."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from ..errors import InputError
from .checks import check_whole
from .scenario import Scenario, TaskData, hold_out_first, sample_shape, split_by_class
from .sources import MissingFiles, RawImages, read_cifar10, read_cifar100, read_digits, read_mnist, read_tiny_imagenet
from .splits import TensorSplit
from .transforms import Compose, HorizontalFlip, Normalize, PadCrop, PermutePixels, Scale, Transform

# hypnettorch, which the published runs read CIFAR with, normalises it by ImageNet's statistics.
_RGB = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class ScenarioInfo:
    """What is known of a named scenario before its data is read.

    Attributes:
        summary: one line.
        tasks: how many it has.
        num_classes: classes per task.
        names: of its tasks, for people.
        validation: default size of each task's validation set.
        files: what data_dir must hold; None where no files are needed.
        dataset: what `download` calls these files; None where none are needed.
        build: (name, data_dir, seed, validation, tasks) to the scenario; data_dir is not looked at without files.
    """

    summary: str
    tasks: int
    num_classes: int
    names: tuple[str, ...]
    validation: int
    files: str | None
    build: Callable[[str, Path, int, int, int], Scenario]
    dataset: str | None = None


def load_scenario(
    name: str,
    data_dir: str | Path | None = None,
    *,
    seed: int = 0,
    validation: int | None = None,
    tasks: int | None = None,
) -> Scenario:
    """The scenario of that name, on the CPU.

    Args:
        name: a key of `SCENARIOS`.
        data_dir: where its files are, see `SCENARIOS[name].files`, itself or in a usual subfolder.
        seed: of permuted-mnist's permutations, 0 .. 2**63 - 1; no other scenario draws anything.
        validation: each task's first so many training samples become its validation set; None is the
            scenario's default.
        tasks: only the first so many tasks; None is all.

    Raises:
        InputError: unknown name; data_dir missing, or its files missing or damaged; tasks not 1 .. all;
            validation that leaves a task no training samples; seed out of range.
    """
    if name not in SCENARIOS:
        close = difflib.get_close_matches(str(name), SCENARIOS, n=1)
        hint = f", did you mean {close[0]}?" if close else "."
        raise InputError(f"unknown scenario {name!r}{hint} There are: {', '.join(SCENARIOS)}")
    info = SCENARIOS[name]
    tasks = info.tasks if tasks is None else tasks
    validation = info.validation if validation is None else validation
    check_whole(f"tasks of {name}", tasks, 1, info.tasks)
    check_whole("validation", validation, 0)
    check_whole("seed", seed, 0, 2**63 - 1)
    if info.files is not None and data_dir is None:
        raise InputError(
            f"{name} needs its data: give the folder (--data-dir) that holds {info.files}; "
            f"`hypermask-fast data {info.dataset} --to DIR` downloads them"
        )
    try:
        return _named(info.build(name, Path(data_dir or "."), seed, validation, tasks), info.names)
    except MissingFiles as error:
        command = shlex.join(["hypermask-fast", "data", str(info.dataset), "--to", str(data_dir)])
        raise InputError(f"{error}; `{command}` downloads it") from error


def _named(scenario: Scenario, names: Sequence[str]) -> Scenario:
    tasks = zip(scenario.tasks, names, strict=False)  # the first so many tasks
    return replace(scenario, tasks=tuple(replace(task, name=name) for task, name in tasks))


def _by_number(kind: str, classes: Sequence[int], per_task: int) -> tuple[str, ...]:
    """ "digits 2, 3", "classes 10 to 19", "classes 68, 56, 78, ...": names of tasks of so many classes each."""
    names = []
    for start in range(0, len(classes), per_task):
        group = list(classes[start : start + per_task])
        if len(group) <= 5:
            names.append(f"{kind} {', '.join(map(str, group))}")
        elif group == list(range(group[0], group[-1] + 1)):
            names.append(f"{kind} {group[0]} to {group[-1]}")
        else:
            names.append(f"{kind} {', '.join(map(str, group[:3]))}, ...")
    return tuple(names)


def _by_class(
    read: Callable[[Path, int], RawImages],
    classes_per_task: int,
    prepare: Transform,
    augment: Transform | None = None,
    order: Sequence[int] | None = None,
) -> Callable[[str, Path, int, int, int], Scenario]:
    """Builder of a scenario whose task t has the classes order[t k] .. order[t k + k - 1].

    Args:
        read: (data_dir, classes needed) to the images; it may return more classes than that.
        classes_per_task: k.
        prepare, augment: as in `TensorSplit`.
        order: of all classes; None is 0, 1, 2, ...
    """

    def build(name: str, data_dir: Path, seed: int, validation: int, tasks: int) -> Scenario:
        needed = tasks * classes_per_task
        chosen = range(needed) if order is None else order[:needed]
        groups = [chosen[i : i + classes_per_task] for i in range(0, needed, classes_per_task)]
        return split_by_class(*read(data_dir, needed), groups, validation, prepare, augment, name=name)

    return build


def _permuted_mnist(name: str, data_dir: Path, seed: int, validation: int, tasks: int) -> Scenario:
    """All ten digits in every task, their 32 x 32 padded pixels in an order of the task's own.

    The images are stored once: every task's splits are the same tensors with another `prepare`. Task t's
    permutation is draw t of the generator, so it does not depend on how many tasks there are.
    """
    raw = read_mnist(data_dir)
    train, held_out = hold_out_first(TensorSplit(raw.inputs, raw.labels), validation, "every task")
    test = TensorSplit(raw.test_inputs, raw.test_labels)
    generator = torch.Generator().manual_seed(seed)
    task_data, digits = [], tuple(map(str, range(10)))
    for t in range(tasks):
        permute = PermutePixels(torch.randperm(32 * 32, generator=generator), pad=2)
        splits = [replace(split, prepare=permute) for split in (train, held_out, test)]
        task_data.append(TaskData(f"permutation {t}", splits[0], splits[1], splits[2], digits))
    return Scenario(name, tuple(task_data), sample_shape(task_data[0].train), 10)


_MNIST_FILES = "MNIST's IDX files: train-images-idx3-ubyte and train-labels-idx1-ubyte, the same for t10k, .gz or not"
_CIFAR10_FILES = "cifar-10-batches-py (data_batch_1 to 5, test_batch) or train.npz and test.npz of JPEGs"
_CIFAR100_FILES = "cifar-100-python (train, test)"
_TINY_FILES = "tiny-imagenet-200 (wnids.txt, train/<class>/images/*.JPEG, val)"
# The class order of FeCAM and of much other work on CIFAR-100: it begins 68, 56, 78, 8, 23.
_FECAM_ORDER = np.random.RandomState(1993).permutation(100).tolist()
_CIFAR_AUGMENT = Compose(HorizontalFlip(), PadCrop(32, 4))

SCENARIOS: dict[str, ScenarioInfo] = {
    "split-digits": ScenarioInfo(
        "scikit-learn's 8 x 8 digits, two classes a task; needs no files",
        tasks=5,
        num_classes=2,
        names=_by_number("digits", range(10), 2),
        validation=40,
        files=None,
        build=_by_class(lambda _dir, _n: read_digits(), 2, Scale()),
    ),
    "split-mnist": ScenarioInfo(
        "MNIST, two classes a task, normalised, random crops",
        tasks=5,
        num_classes=2,
        names=_by_number("digits", range(10), 2),
        validation=1000,
        files=_MNIST_FILES,
        build=_by_class(lambda path, _n: read_mnist(path), 2, Normalize((0.1307,), (0.3081,)), PadCrop(28, 4)),
        dataset="mnist",
    ),
    "permuted-mnist": ScenarioInfo(
        "MNIST padded to 1024 pixels, another order of them in each task",
        tasks=10,
        num_classes=10,
        names=tuple(f"permutation {t}" for t in range(10)),
        validation=5000,
        files=_MNIST_FILES,
        build=_permuted_mnist,
        dataset="mnist",
    ),
    "split-cifar10": ScenarioInfo(
        "CIFAR-10, two classes a task, normalised, random crops and flips",
        tasks=5,
        num_classes=2,
        names=_by_number("classes", range(10), 2),
        validation=500,
        files=_CIFAR10_FILES,
        build=_by_class(lambda path, _n: read_cifar10(path), 2, _RGB, _CIFAR_AUGMENT),
        dataset="cifar10",
    ),
    "split-cifar100": ScenarioInfo(
        "CIFAR-100, ten classes a task, normalised, random crops and flips",
        tasks=10,
        num_classes=10,
        names=_by_number("classes", range(100), 10),
        validation=500,
        files=_CIFAR100_FILES,
        build=_by_class(lambda path, _n: read_cifar100(path), 10, _RGB, _CIFAR_AUGMENT),
        dataset="cifar100",
    ),
    "cifar100-5x20": ScenarioInfo(
        "CIFAR-100, twenty classes a task in FeCAM's order",
        tasks=5,
        num_classes=20,
        names=_by_number("classes", _FECAM_ORDER, 20),
        validation=500,
        files=_CIFAR100_FILES,
        build=_by_class(lambda path, _n: read_cifar100(path), 20, _RGB, _CIFAR_AUGMENT, _FECAM_ORDER),
        dataset="cifar100",
    ),
    "tiny-imagenet": ScenarioInfo(
        "Tiny ImageNet, five classes a task in wnids.txt's order",
        tasks=40,
        num_classes=5,
        names=_by_number("classes", range(200), 5),
        validation=250,
        files=_TINY_FILES,
        build=_by_class(read_tiny_imagenet, 5, _RGB, Compose(HorizontalFlip(), PadCrop(64, 4))),
        dataset="tiny-imagenet",
    ),
}
