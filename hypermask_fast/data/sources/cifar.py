"""CIFAR-10 and CIFAR-100, from the published Python pickles or (CIFAR-10) from .npz files of JPEGs."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...checks import one_line
from ...errors import InputError
from .images import RawImages, decode_jpegs, find, is_file, read_bytes
from .safe_pickle import read_pickle

_SIDE = 32
_PIXELS = 3 * _SIDE * _SIDE
_FOLDERS_10 = ("cifar-10-batches-py", "cifar10", "cifar10/cifar-10-batches-py")
_FOLDERS_100 = ("cifar-100-python", "cifar100", "cifar100/cifar-100-python")


def read_cifar10(directory: str | Path) -> RawImages:
    """data_batch_1 to 5 and test_batch, or train.npz and test.npz, in `directory` or a usual folder below it.

    The pickles go first where both are there: they hold the original bytes. See `read_jpeg_npz` for the other
    format.

    Returns:
        images (n, 3, 32, 32) uint8 and labels 0 to 9, training and test, in the files' order.

    Raises:
        InputError: neither is there, or a file is damaged or of another kind.
    """
    first = find(directory, _FOLDERS_10, ["data_batch_1", "train.npz"], "CIFAR-10")
    if first.suffix == ".npz":
        return RawImages(*read_jpeg_npz(first, 10), *read_jpeg_npz(_beside(first, "test.npz"), 10))
    batches = [_read_batch(_beside(first, f"data_batch_{i}"), "labels", 10) for i in range(1, 6)]
    inputs, labels = (torch.cat(tensors) for tensors in zip(*batches, strict=True))
    return RawImages(inputs, labels, *_read_batch(_beside(first, "test_batch"), "labels", 10))


def read_cifar100(directory: str | Path) -> RawImages:
    """The pickles `train` and `test` (fine labels), in `directory` or a usual folder below it.

    Returns:
        images (n, 3, 32, 32) uint8 and labels 0 to 99, training and test, in the files' order.

    Raises:
        InputError: a file is missing, damaged or of another kind.
    """
    train = find(directory, _FOLDERS_100, ["train"], "CIFAR-100 training images")
    test = _beside(train, "test")
    return RawImages(*_read_batch(train, "fine_labels", 100), *_read_batch(test, "fine_labels", 100))


def read_jpeg_npz(path: str | Path, num_classes: int) -> tuple[Tensor, Tensor]:
    """An .npz file of 32 x 32 JPEGs: `jpeg` (uint8, all files one after the other), `offsets` (int64, n + 1:
    where each begins, and the end), `labels` (n, integers).

    Returns:
        images (n, 3, 32, 32) uint8 and labels (n,) int64.

    Raises:
        InputError: the file cannot be read or is not that; a label is not 0 .. num_classes - 1.
    """
    path = Path(path)
    content = io.BytesIO(read_bytes(path))
    if not zipfile.is_zipfile(content):  # numpy would take it for a pickle, and advise to trust it
        raise InputError(f"{path} is not an .npz file, or is cut off: get it anew")
    try:
        with np.load(content, allow_pickle=False) as file:
            jpeg, offsets, labels = (_array(file, key) for key in ("jpeg", "offsets", "labels"))
    # Damaged, it can fail in any way at all: as a zip file, as one of its ways to compress, as an array's header.
    except Exception as error:
        reason = one_line(error)
        raise InputError(f"{path} cannot be read as an .npz of jpeg, offsets and labels: {reason}") from error
    if jpeg.dtype != np.uint8 or jpeg.ndim != 1 or offsets.dtype.kind not in "iu" or offsets.ndim != 1:
        raise InputError(f"{path}: jpeg must be 1-d uint8 and offsets 1-d integers")
    steps = np.diff(offsets.astype(np.int64))
    inside = len(offsets) and offsets.min() == offsets[0] == 0 and offsets.max() == offsets[-1] == len(jpeg)
    if not inside or (steps < 0).any():
        raise InputError(f"{path}: offsets must rise from 0 to the length of jpeg, {len(jpeg)}")
    data = jpeg.tobytes()
    files = [data[a:b] for a, b in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)]
    images = decode_jpegs(files, _SIDE, lambda i: f"{path}: image {i}")
    return images, _labels(path, labels, len(files), num_classes)


def _array(file: Any, key: str) -> np.ndarray:
    """An array of an .npz file, which gives the bytes of what is none."""
    array = file[key]
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{key} is not an array")
    return array


def _read_batch(path: Path, label_key: str, num_classes: int) -> tuple[Tensor, Tensor]:
    """One CIFAR pickle: `data` (n, 3072) uint8 and a list of labels."""
    batch = read_pickle(path)
    for key in ("data", label_key):
        if key not in batch:
            found = one_line(", ".join(sorted(batch)))
            raise InputError(f"{path} is not a CIFAR pickle: it has no {key!r}, only {found}")
    data = batch["data"]
    if not isinstance(data, np.ndarray) or data.ndim != 2 or data.shape[1] != _PIXELS:
        raise InputError(f"{path}: data must be a (n, {_PIXELS}) array of bytes")
    inputs = torch.from_numpy(data.reshape(-1, 3, _SIDE, _SIDE).copy())
    return inputs, _labels(path, batch[label_key], len(inputs), num_classes)


def _labels(path: Path, labels: object, count: int, num_classes: int) -> Tensor:
    """The labels as (count,) int64, checked."""
    try:
        array = np.asarray(labels)
    except (ValueError, RecursionError, MemoryError):  # a ragged list, or a deep one
        array = np.empty(0)
    if array.shape != (count,) or (count and array.dtype.kind not in "iu"):
        raise InputError(f"{path}: labels must be {count} integers, one per image")
    if count and (array.min() < 0 or array.max() >= num_classes):
        raise InputError(f"{path}: labels must be 0 .. {num_classes - 1}, found {array.min()} to {array.max()}")
    return torch.from_numpy(array.astype(np.int64))


def _beside(path: Path, name: str) -> Path:
    """The file of that name in the same folder; InputError if it is not there."""
    if not is_file(path.parent / name):
        raise InputError(f"{path.parent} has {path.name} but no {name}: it should hold both")
    return path.parent / name
