"""Scenarios of image files in folders: a subfolder per class, or per task and class."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checks import check_whole, one_line
from ..errors import InputError
from ..extras import needed_for
from .scenario import Scenario, TaskData
from .splits import DatasetSplit, Split, TensorSplit
from .transforms import UNIT_SCALE, Normalize, Transform

IMAGES = "images"  # what the scenario is called
COLOURS = ("rgb", "grey")
NORMALISATIONS = ("none", "imagenet", "first-task")
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
IN_MEMORY = 2**30  # bytes of pixels up to which all of them are read at the start
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")  # Pillow's names of these
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_SYSTEM_FILES = ("thumbs.db", "desktop.ini")  # besides hidden ones
_THREADS = 8  # that decode; Pillow lets go of the interpreter meanwhile

_Classes = dict[str, list[Path]]  # images of each class, by its name


def image_folders(
    folder: str | Path,
    classes_per_task: int | None = None,
    *,
    image_size: Sequence[int] | None = None,
    colour: str = "rgb",
    normalise: str = "none",
    validation: int = 0,
    tasks: int | None = None,
    in_memory: bool | None = None,
) -> Scenario:
    """A scenario of the images in folder/train and folder/test.

    Either train/CLASS/* and test/CLASS/*, cut into tasks of `classes_per_task` classes each, or train/TASK/CLASS/* and
    test/TASK/CLASS/*, where tasks may have different numbers of classes. Tasks and classes are in the order of their
    names, numbers in names by value (task2 before task10). A task's i-th class has label i.

    Args:
        folder: holds train and test.
        classes_per_task: 2 or more, and a divisor of the number of classes; for folders of classes only.
        image_size: (height, width) in pixels: every image is scaled until it covers that, and what stands over is cut
            off evenly. None: images stay as they are, and must all have one size.
        colour: "rgb" (3 channels) or "grey" (1); images of the other kind are converted. Transparency is dropped.
        normalise: of the values, which are 0 to 1: "none"; "imagenet": by ImageNet's mean and standard deviation of
            each channel (rgb only); "first-task": by those of the first task's training images.
        validation: training samples of each task that are held out to validate, evenly from all of its classes.
        tasks: only the first so many; None is all.
        in_memory: whether all images are read now (uint8), or each one whenever it is asked for. None: now where they
            take `IN_MEMORY` bytes or less. The numbers are the same.

    Raises:
        InputError: no such folders, files among them that are no images, fewer than two classes, a class that is
            missing in one of train and test, images that can't be read (where not in_memory, whose beginning can't
            be), of different sizes, or with more than 8 bits a channel.
    """
    for what, value, known in (("colour", colour, COLOURS), ("normalise", normalise, NORMALISATIONS)):
        if value not in known:
            raise InputError(f"{what} must be {' or '.join(known)}, not {value!r}")
    if colour == "grey" and normalise == "imagenet":
        raise InputError("normalise = imagenet has numbers for three channels: with colour = grey take first-task")
    check_whole("validation", validation, 0)
    train, test = _tasks_of(Path(folder), classes_per_task)
    check_whole(f"tasks of {folder}", len(train) if tasks is None else tasks, 1, len(train))
    names = list(train)[:tasks]
    rows = [(_in_turn(train[name]), _in_turn(test[name])) for name in names]
    for t, (of_task, _) in enumerate(rows):
        if validation >= len(of_task):
            raise InputError(
                f"validation {validation} leaves task {t} ({names[t]}) no training samples: it has {len(of_task)}"
            )
    reader = _Reader(None if image_size is None else _size(image_size), colour)
    paths = [path for pair in rows for part in pair for path, _ in part]
    shape = reader.shape(paths[0])
    if in_memory is None:
        in_memory = len(paths) * prod(shape) <= IN_MEMORY
    if not in_memory:
        reader.check(paths, shape)
    prepare = _prepare(normalise, reader, [path for path, _ in rows[0][0][validation:]], shape)
    counts = [len(train[name]) for name in names]
    made = []
    for name, (training, testing), count in zip(names, rows, counts, strict=True):
        parts = (training[validation:], training[:validation], testing)
        first, second, third = (_split(part, reader, shape, prepare, in_memory, count) for part in parts)
        own = None if len(set(counts)) == 1 else count
        made.append(TaskData(name, first, second, third, tuple(train[name]), own))
    return Scenario(IMAGES, tuple(made), shape, max(counts))


def folder_fingerprint(folder: str | Path) -> str:
    """The first digits of the SHA-256 of the images' paths within the folder and their sizes in bytes.

    Raises:
        InputError: no such folders.
    """
    root, found = Path(folder), hashlib.sha256()
    for part in ("train", "test"):
        files = (path for path in _below(root / part) if path.suffix.lower() in SUFFIXES)
        for name, size in sorted((path.relative_to(root).as_posix(), path.stat().st_size) for path in files):
            found.update(f"{name}\0{size}\n".encode(errors="surrogateescape"))
    return found.hexdigest()[:16]


# -- folders ----------------------------------------------------------------------------------------------------------


def _tasks_of(folder: Path, classes_per_task: int | None) -> tuple[dict[str, _Classes], dict[str, _Classes]]:
    """Images of each task's classes, by the task's name, to train and to test."""
    train, test = (_by_task(folder / part) for part in ("train", "test"))
    if isinstance(train, tuple) or isinstance(test, tuple):
        if not (isinstance(train, tuple) and isinstance(test, tuple)):
            raise InputError(f"{folder}: train and test must both have folders of classes, or both folders of tasks")
        return _grouped(folder, train[0], test[0], classes_per_task)
    if classes_per_task is not None:
        raise InputError(f"{folder} has a folder per task, which says what its classes are: leave classes_per_task out")
    _check_alike(folder, "task", train, test)
    for name in train:
        _check_alike(folder, f"class of task {name}", train[name], test[name])
        _check_several(folder / "train" / name, train[name])
    return train, test


def _grouped(
    folder: Path, train: _Classes, test: _Classes, per_task: int | None
) -> tuple[dict[str, _Classes], dict[str, _Classes]]:
    """Classes cut into tasks of so many each."""
    _check_several(folder / "train", train)
    _check_alike(folder, "class", train, test)
    if per_task is None:
        raise InputError(f"{folder} has {len(train)} classes: say how many a task has (--classes-per-task)")
    check_whole("classes_per_task", per_task, 2)
    if len(train) % per_task:
        raise InputError(
            f"the {len(train)} classes of {folder} can't be cut into tasks of {per_task}: take a divisor of "
            f"{len(train)}, or a folder per task (train/TASK/CLASS)"
        )
    classes = list(train)
    groups = [classes[start : start + per_task] for start in range(0, len(classes), per_task)]
    named = {", ".join(group[:3]) + (", ..." if len(group) > 3 else ""): group for group in groups}
    if len(named) < len(groups):  # the same first three can't be: names are different
        raise InputError(f"{folder}: two tasks would have the same name; rename classes that have commas in theirs")
    first, second = ({name: {c: part[c] for c in group} for name, group in named.items()} for part in (train, test))
    return first, second


def _by_task(part: Path) -> dict[str, _Classes] | tuple[_Classes]:
    """Images by task and class; of a folder of classes alone, a tuple of one: images by class."""
    folders = _folders(part, "a folder per class, or per task")
    deep = [name for name, path in folders.items() if any(entry.is_dir() for entry in _entries(path))]
    if not deep:
        return ({name: _images(path) for name, path in folders.items()},)
    if len(deep) < len(folders):
        flat = next(name for name in folders if name not in deep)
        raise InputError(f"{part}: {deep[0]} has folders in it, as a task has, and {flat} has none, as a class has")
    found = {name: _folders(path, "a folder per class") for name, path in folders.items()}
    return {name: {c: _images(path) for c, path in classes.items()} for name, classes in found.items()}


def _folders(folder: Path, expected: str) -> dict[str, Path]:
    """Its subfolders by name, in order, and nothing else."""
    entries = _entries(folder)
    for entry in entries:
        if not entry.is_dir():
            raise InputError(f"{entry} is a file: {folder} should hold {expected}, and nothing else")
    if not entries:
        raise InputError(f"{folder} is empty: it should hold {expected}")
    return {entry.name: entry for entry in entries}


def _images(folder: Path) -> list[Path]:
    """Its images, in order."""
    entries = _entries(folder)
    for entry in entries:
        if entry.is_dir():
            raise InputError(f"{entry} is a folder among images: classes have no folders in them")
        if not entry.is_file():
            raise InputError(f"{entry} is no file that can be read: take it out")
        if entry.suffix.lower() not in SUFFIXES:
            raise InputError(f"{entry} is no image of a known kind ({', '.join(SUFFIXES)}): take it out")
    if not entries:
        raise InputError(f"{folder} has no images: leave the class out of train and test, or add some")
    return entries


def _entries(folder: Path) -> list[Path]:
    """What is in a folder, in order, without hidden files."""
    if not folder.is_dir():
        wrong = "is no folder" if folder.exists() else "is missing"
        raise InputError(f"{folder} {wrong}: images lie in train/CLASS and test/CLASS, or train/TASK/CLASS and so on")
    try:
        found = [each for each in folder.iterdir() if not each.name.startswith(".")]
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror}") from error
    return sorted(
        (each for each in found if each.name.lower() not in _SYSTEM_FILES), key=lambda each: _order(each.name)
    )


def _below(folder: Path, depth: int = 3) -> Iterator[Path]:
    """Files in a folder and in the folders in it, as deep as images lie: links are followed, and may lead back."""
    for entry in _entries(folder):
        if not entry.is_dir():
            yield entry
        elif depth > 1:
            yield from _below(entry, depth - 1)


def _order(name: str) -> tuple[list[Any], str]:
    """Sorts names with their numbers by value: task2 before task10."""
    parts = re.split(r"([0-9]+)", name)
    return [(int(part), "") if i % 2 else (-1, part) for i, part in enumerate(parts)], name


def _check_alike(folder: Path, what: str, train: dict[str, Any], test: dict[str, Any]) -> None:
    for here, there, names in (("train", "test", train.keys() - test), ("test", "train", test.keys() - train)):
        if names:
            raise InputError(
                f"{what} {min(names)!r} is in {folder / here} and not in {folder / there}: add it, or "
                "leave it out of both"
            )


def _check_several(folder: Path, classes: _Classes) -> None:
    if len(classes) < 2:
        raise InputError(f"{folder} has one class only ({', '.join(classes)}): to tell classes apart takes two or more")


def _in_turn(classes: _Classes) -> list[tuple[Path, int]]:
    """Images with labels: the first of each class, then the second of each, and so on."""
    longest = max(map(len, classes.values()))
    return [(files[i], c) for i in range(longest) for c, files in enumerate(classes.values()) if i < len(files)]


# -- images -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Reader:
    """Reads image files. size: (height, width) that each gets; None: as they are."""

    size: tuple[int, int] | None
    colour: str

    @property
    def channels(self) -> int:
        return 1 if self.colour == "grey" else 3

    def shape(self, path: Path) -> tuple[int, ...]:
        """(channels, height, width) of the image, and so of all of them."""
        return (self.channels, *(self._opened(path, _oriented) if self.size is None else self.size))

    def check(self, paths: Sequence[Path], shape: tuple[int, ...]) -> None:
        """Opens each of the files, without reading its pixels. Raises InputError for one that is wrong."""

        def check(path: Path) -> None:
            if self.size is None:
                self._check_size(path, self._opened(path, _oriented), shape)
            else:
                self._opened(path, lambda image: image.size)

        _each(check, paths)

    def read(self, path: Path, shape: tuple[int, ...]) -> Tensor:
        """uint8 (channels, height, width)."""
        from PIL import Image, ImageOps

        def decode(image: Any) -> np.ndarray:
            upright = ImageOps.exif_transpose(image).convert("L" if self.colour == "grey" else "RGB")
            if self.size is not None:
                height, width = self.size
                upright = ImageOps.fit(upright, (width, height), Image.Resampling.BILINEAR)
            return np.array(upright, dtype=np.uint8).reshape(upright.height, upright.width, self.channels)

        pixels = self._opened(path, decode)
        self._check_size(path, pixels.shape[:2], shape)
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()

    def read_all(self, paths: Sequence[Path], shape: tuple[int, ...]) -> Tensor:
        """uint8 (n, channels, height, width)."""
        pixels = torch.empty(len(paths), *shape, dtype=torch.uint8)

        def read(i: int) -> None:
            pixels[i] = self.read(paths[i], shape)

        _each(read, range(len(paths)))
        return pixels

    @staticmethod
    def _check_size(path: Path, size: Sequence[int], shape: tuple[int, ...]) -> None:
        if tuple(size) != shape[1:]:
            found, first = (f"{height} x {width}" for height, width in (size, shape[1:]))
            raise InputError(
                f"{path} is {found} pixels, the first image {first}: give one size for all (data.image_size)"
            )

    @staticmethod
    def _opened(path: Path, use: Callable[[Any], Any]) -> Any:
        with needed_for("reading images"):
            from PIL import Image, UnidentifiedImageError
        try:
            with Image.open(path, formats=_FORMATS) as image:
                if image.mode == "F" or image.mode.startswith("I"):
                    raise InputError(f"{path} has more than 8 bits a channel (Pillow: {image.mode}): convert it first")
                return use(image)
        except InputError:
            raise
        except UnidentifiedImageError as error:  # its text says the path only
            raise InputError(f"{path} is not a readable image") from error
        except Exception as error:  # a damaged one can fail in any way at all
            raise InputError(f"{path} is not a readable image ({one_line(error)})") from error


def _oriented(image: Any) -> tuple[int, int]:
    """(height, width) as the image is meant to be looked at."""
    turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # EXIF's orientation
    return image.size if turned else image.size[::-1]


def _each(action: Callable[[Any], None], items: Sequence[Any]) -> None:
    with ThreadPoolExecutor(_THREADS) as pool:
        for _ in pool.map(action, items):
            pass


@dataclass(frozen=True)
class _Files:
    """Images and labels as a map-style Dataset that reads a file whenever it is asked for it."""

    rows: list[tuple[Path, int]]
    reader: _Reader
    shape: tuple[int, ...]
    prepare: Transform

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.rows[index]
        return self.prepare(self.reader.read(path, self.shape)[None])[0], label

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, int]]:
        """A batch's, decoded side by side: what DataLoader calls."""
        with ThreadPoolExecutor(_THREADS) as pool:
            return list(pool.map(self.__getitem__, indices))


def _split(
    rows: list[tuple[Path, int]],
    reader: _Reader,
    shape: tuple[int, ...],
    prepare: Transform,
    in_memory: bool,
    classes: int,
) -> Split:
    if not in_memory and rows:
        return DatasetSplit(_Files(rows, reader, shape, prepare), num_classes=classes)
    labels = torch.tensor([label for _, label in rows], dtype=torch.int64)
    return TensorSplit(reader.read_all([path for path, _ in rows], shape), labels, prepare)


def _prepare(normalise: str, reader: _Reader, paths: Sequence[Path], shape: tuple[int, ...]) -> Transform:
    """From pixels to what the model gets; paths: training images of the first task."""
    if normalise == "none":
        return UNIT_SCALE
    if normalise == "imagenet":
        return Normalize(*_IMAGENET)
    sums = np.zeros((2, shape[0]), dtype=np.int64)  # of values and of their squares: exact
    for start in range(0, len(paths), 256):
        values = reader.read_all(paths[start : start + 256], shape).long().numpy()
        sums += np.stack([values.sum((0, 2, 3)), (values**2).sum((0, 2, 3))])
    mean, square = sums / (len(paths) * prod(shape[1:]) * np.array([[255.0], [255.0**2]]))
    std = np.sqrt(np.maximum(square - mean**2, 0))
    return Normalize(tuple(mean.tolist()), tuple(np.where(std > 0, std, 1.0).tolist()))


def _size(size: Sequence[int]) -> tuple[int, int]:
    if len(size) != 2:
        raise InputError(f"image_size is (height, width), not {list(size)}")
    for value in size:
        check_whole("image_size", value, 1, 10_000)
    return size[0], size[1]
