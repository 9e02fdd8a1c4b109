"""The scenarios known by name, and how to load one."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from ..checks import check_whole
from ..errors import InputError
from .autoaugment import AutoAugment
from .scenario import HoldOut, Scenario, TaskData, sample_shape, split_by_class
from .sources import MissingFiles, RawImages, read_cifar10, read_cifar100, read_digits, read_mnist, read_tiny_imagenet
from .splits import TensorSplit
from .transforms import (
    BrightnessJitter,
    Compose,
    HorizontalFlip,
    Normalize,
    PadCrop,
    PermutePixels,
    Scale,
    Transform,
)

Build = Callable[[str, Path, int, HoldOut, int], Scenario]


@dataclass(frozen=True)
class ScenarioInfo:
    """What is known of a named scenario before its data is read.

    Attributes:
        summary: one line.
        classes: how many each task has.
        task_names: seed to names of its tasks, for people.
        validation: which training samples are held out, unless another number of them is asked for.
        files: what data_dir must hold; None where no files are needed.
        dataset: what `download` calls these files; None where none are needed.
        build: (name, data_dir, seed, held out, tasks) to the scenario; data_dir is not looked at without files.
        edition: counts from 1 how often its data have become others under the same name.
        before: how the edition before differed.
    """

    summary: str
    classes: tuple[int, ...]
    task_names: Callable[[int], tuple[str, ...]]
    validation: HoldOut
    files: str | None
    build: Build
    dataset: str | None = None
    edition: int = 1
    before: str = ""

    @property
    def tasks(self) -> int:
        """How many there are."""
        return len(self.classes)

    @property
    def num_classes(self) -> int:
        """Classes per task, or of the task that has most."""
        return max(self.classes)


def load_scenario(
    name: str,
    data_dir: str | Path | None = None,
    *,
    seed: int = 0,
    validation: int | None = None,
    validation_per_class: int | None = None,
    tasks: int | None = None,
    edition: int | None = None,
) -> Scenario:
    """The scenario of that name, on the CPU.

    Args:
        name: a key of `SCENARIOS`.
        data_dir: where its files are, see `SCENARIOS[name].files`, itself or in a usual subfolder.
        seed: of permuted-mnist's permutations and of tiny-imagenet's order of classes, 0 .. 2**63 - 1; no other
            scenario draws anything.
        validation: each task's first so many training samples become its validation set.
        validation_per_class: the first so many of each of its classes do. None for both is the scenario's default.
        tasks: only the first so many tasks; None is all.
        edition: of the scenario's data that is meant; None for the one there is.

    Raises:
        InputError: unknown name; data_dir missing, or its files missing or damaged; tasks not 1 .. all;
            validation that leaves a task, or a class, no training samples, or both kinds of it; seed out of range; an
            edition that is no longer there.
    """
    if name not in SCENARIOS:
        close = difflib.get_close_matches(str(name), SCENARIOS, n=1)
        hint = f", did you mean {close[0]}?" if close else "."
        raise InputError(f"unknown scenario {name!r}{hint} There are: {', '.join(SCENARIOS)}")
    info = SCENARIOS[name]
    tasks = info.tasks if tasks is None else tasks
    held_out = HoldOut.asked(validation, validation_per_class) or info.validation
    check_whole(f"tasks of {name}", tasks, 1, info.tasks)
    check_whole("seed", seed, 0, 2**63 - 1)
    check_edition(name, edition)
    if info.files is not None and data_dir is None:
        raise InputError(
            f"{name} needs its data: give the folder (--data-dir) that holds {info.files}; "
            f"`hypermask-fast data {info.dataset} --to DIR` downloads them"
        )
    try:
        return _named(info.build(name, Path(data_dir or "."), seed, held_out, tasks), info.task_names(seed))
    except MissingFiles as error:
        command = shlex.join(["hypermask-fast", "data", str(info.dataset), "--to", str(data_dir)])
        raise InputError(f"{error}; `{command}` downloads it") from error


def check_edition(name: str, edition: int | None) -> None:
    """Raises InputError where another edition of a named scenario's data is meant than the one there is."""
    info = SCENARIOS[name]
    if edition is None or edition == info.edition:
        return
    if edition == info.edition - 1:
        raise InputError(
            f"edition {edition} of {name}'s data, which {info.before}, is no longer there: start a new run, or go on "
            "with the version of hypermask_fast that began it"
        )
    raise InputError(f"there is no edition {edition} of {name}'s data, only {info.edition}")


def _named(scenario: Scenario, names: Sequence[str]) -> Scenario:
    tasks = zip(scenario.tasks, names, strict=False)  # the first so many tasks
    return replace(scenario, tasks=tuple(replace(task, name=name) for task, name in tasks))


def _group_name(kind: str, group: list[int]) -> str:
    """ "digits 2, 3", "classes 10 to 19", "classes 68, 56, 78, ...": a task's name."""
    if len(group) <= 5:
        return f"{kind} {', '.join(map(str, group))}"
    if group == list(range(group[0], group[-1] + 1)):
        return f"{kind} {group[0]} to {group[-1]}"
    return f"{kind} {', '.join(map(str, group[:3]))}, ..."


def _by_class(
    summary: str,
    read: Callable[[Path, Sequence[int]], RawImages],
    classes: tuple[int, ...],
    prepare: Transform,
    augment: Transform | None = None,
    *,
    validation: HoldOut,
    files: str | None = None,
    dataset: str | None = None,
    order: Callable[[int], Sequence[int]] = lambda _: range(200),
    kind: str = "classes",
    edition: int = 1,
    before: str = "",
) -> ScenarioInfo:
    """A scenario whose task t has the next classes[t] classes of an order. See `ScenarioInfo` for what is not below.

    Args:
        read: (data_dir, classes needed) to the images; it may return more classes than these.
        prepare, augment: as in `TensorSplit`.
        order: seed to all classes.
        kind: what classes are called in the tasks' names.
    """

    def groups(seed: int) -> list[list[int]]:
        ends = np.cumsum(classes).tolist()
        return [list(order(seed)[end - size : end]) for end, size in zip(ends, classes, strict=True)]

    def task_names(seed: int) -> tuple[str, ...]:
        return tuple(_group_name(kind, group) for group in groups(seed))

    def build(name: str, data_dir: Path, seed: int, held_out: HoldOut, tasks: int) -> Scenario:
        chosen = groups(seed)[:tasks]
        raw = read(data_dir, [c for group in chosen for c in group])
        of_task, of_class = (0, held_out.samples) if held_out.per_class else (held_out.samples, None)
        unequal = len(set(classes)) > 1
        return split_by_class(
            *raw, chosen, of_task, prepare, augment, name=name, unequal=unequal, validation_per_class=of_class
        )

    return ScenarioInfo(summary, classes, task_names, validation, files, build, dataset, edition, before)


def _permuted_mnist(name: str, data_dir: Path, seed: int, held_out: HoldOut, tasks: int) -> Scenario:
    """All ten digits in every task, their 32 x 32 padded pixels in an order of the task's own.

    The images are stored once: every task's splits are the same tensors with another `prepare`. Task t's
    permutation is draw t of the generator, so it does not depend on how many tasks there are.
    """
    raw = read_mnist(data_dir)
    train, validation = held_out.split(TensorSplit(raw.inputs, raw.labels), "every task")
    test = TensorSplit(raw.test_inputs, raw.test_labels)
    generator = torch.Generator().manual_seed(seed)
    task_data, digits = [], tuple(map(str, range(10)))
    for t in range(tasks):
        permute = PermutePixels(torch.randperm(32 * 32, generator=generator), pad=2)
        splits = [replace(split, prepare=permute) for split in (train, validation, test)]
        task_data.append(TaskData(f"permutation {t}", splits[0], splits[1], splits[2], digits))
    return Scenario(name, tuple(task_data), sample_shape(task_data[0].train), 10)


def _cifar100(summary: str, classes: tuple[int, ...], edition: int = 1, before: str = "") -> ScenarioInfo:
    """Tasks of these sizes as the runs of 5 x 20 have them: class order, augmentation, normalisation, validation."""
    return _by_class(
        summary,
        lambda path, _: read_cifar100(path),
        classes,
        Normalize((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
        Compose(PadCrop(32, 4), HorizontalFlip(), BrightnessJitter(63 / 255), AutoAugment(32)),
        validation=HoldOut(50, per_class=True),
        files=_CIFAR100_FILES,
        dataset="cifar100",
        order=lambda _: _CIFAR100_ORDER,
        edition=edition,
        before=before,
    )


def _permuted_classes(seed: int) -> list[int]:
    """The order of Tiny ImageNet's classes."""
    return np.random.default_rng(seed).permutation(200).tolist()


_MNIST_FILES = "MNIST's IDX files: train-images-idx3-ubyte and train-labels-idx1-ubyte, the same for t10k, .gz or not"
_CIFAR10_FILES = "cifar-10-batches-py (data_batch_1 to 5, test_batch) or train.npz and test.npz of JPEGs"
_CIFAR100_FILES = "cifar-100-python (train, test)"
_TINY_FILES = "tiny-imagenet-200 (wnids.txt, train/<class>/images/*.JPEG, val)"
# The class order of the published runs of 5 x 20.
_ORDER = """
    87 0 52 58 44 91 68 97 51 15 94 92 10 72 49 78 61 14 8 86 84 96 18 24 32 45 88 11 4 67 69 66 77 47 79 93 29 50 57 83
    17 81 41 12 37 59 25 20 80 73 1 28 6 46 62 82 53 9 31 75 38 63 33 74 27 22 36 3 16 21 60 19 70 90 89 43 5 42 65 76
    40 30 23 85 2 95 56 48 71 64 98 13 99 7 34 55 54 26 35 39
"""
_CIFAR100_ORDER = [int(c) for c in _ORDER.split()]
_LARGER_FIRST = "CIFAR-100, {} classes, then {} tasks of {}, in the order and with the augmentation of cifar100-5x20"
# hypnettorch, which the other published runs read their images with, normalises them by ImageNet's statistics.
_RGB = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CIFAR_AUGMENT = Compose(HorizontalFlip(), PadCrop(32, 4))

SCENARIOS: dict[str, ScenarioInfo] = {
    "split-digits": _by_class(
        "scikit-learn's 8 x 8 digits, two classes a task; needs no files",
        lambda _dir, _: read_digits(),
        (2,) * 5,
        Scale(),
        validation=HoldOut(40),
        kind="digits",
    ),
    "split-mnist": _by_class(
        "MNIST, two classes a task, normalised, random crops",
        lambda path, _: read_mnist(path),
        (2,) * 5,
        Normalize((0.1307,), (0.3081,)),
        PadCrop(28, 4),
        validation=HoldOut(1000),
        files=_MNIST_FILES,
        dataset="mnist",
        kind="digits",
    ),
    "permuted-mnist": ScenarioInfo(
        "MNIST padded to 1024 pixels, another order of them in each task",
        classes=(10,) * 10,
        task_names=lambda _: tuple(f"permutation {t}" for t in range(10)),
        validation=HoldOut(5000),
        files=_MNIST_FILES,
        build=_permuted_mnist,
        dataset="mnist",
    ),
    "split-cifar10": _by_class(
        "CIFAR-10, two classes a task, normalised, random crops and flips",
        lambda path, _: read_cifar10(path),
        (2,) * 5,
        _RGB,
        _CIFAR_AUGMENT,
        validation=HoldOut(500),
        files=_CIFAR10_FILES,
        dataset="cifar10",
    ),
    "split-cifar100": _by_class(
        "CIFAR-100, ten classes a task, normalised, random crops and flips",
        lambda path, _: read_cifar100(path),
        (10,) * 10,
        _RGB,
        _CIFAR_AUGMENT,
        validation=HoldOut(500),
        files=_CIFAR100_FILES,
        dataset="cifar100",
    ),
    "cifar100-5x20": _cifar100(
        "CIFAR-100, twenty classes a task in the published order, with crops, flips, brightness and AutoAugment",
        (20,) * 5,
        edition=2,
        before="had another order of classes, another normalisation, and crops and flips alone",
    ),
    "cifar100-50-5x10": _cifar100(_LARGER_FIRST.format(50, 5, 10), (50, *(10,) * 5)),
    "cifar100-50-10x5": _cifar100(_LARGER_FIRST.format(50, 10, 5), (50, *(5,) * 10)),
    "cifar100-40-20x3": _cifar100(_LARGER_FIRST.format(40, 20, 3), (40, *(3,) * 20)),
    "tiny-imagenet": _by_class(
        "Tiny ImageNet, five classes a task in an order that the seed decides, random crops and flips",
        read_tiny_imagenet,
        (5,) * 40,
        _RGB,
        Compose(PadCrop(64, 4), HorizontalFlip()),
        validation=HoldOut(50, per_class=True),
        files=_TINY_FILES,
        dataset="tiny-imagenet",
        order=_permuted_classes,
        edition=2,
        before="had the classes in the order of wnids.txt and validated on the first class of a task alone",
    ),
}
