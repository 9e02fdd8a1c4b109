"""MNIST, and whatever comes in its four IDX files (Fashion-MNIST, KMNIST)."""

from __future__ import annotations

import gzip
import math
import os
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...checks import one_line
from ...errors import InputError
from .images import RawImages, find

_FOLDERS = ("mnist", "MNIST/raw")
_SIDE = 28
_LARGEST = 2**40  # bytes


def read_mnist(directory: str | Path) -> RawImages:
    """The four IDX files, plain or gzip, in `directory`, its `mnist` or its `MNIST/raw`.

    Returns:
        images (n, 1, 28, 28) uint8 and labels 0 to 9, training and test, in the files' order.

    Raises:
        InputError: a file is missing, damaged, truncated or too long, of another kind or image size; images
            and labels differ in number; a label above 9.
    """
    return RawImages(*_read_part(directory, "train", "training"), *_read_part(directory, "t10k", "test"))


def read_idx(path: str | Path, dimensions: int) -> Tensor:
    """An IDX file of bytes: magic 0, 0, 8, dimensions; each size as big-endian uint32; then the bytes.

    Args:
        path: plain or gzip, told apart by its first bytes, not its name.
        dimensions: that it must have: 3 for images, 1 for labels.

    Returns:
        uint8 of the shape the file says.

    Raises:
        InputError: it is not that; the message names the file.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            zipped = file.read(2) == b"\x1f\x8b"
        with gzip.open(path) if zipped else open(path, "rb") as file:
            header = file.read(4 + 4 * dimensions)
            shape = _shape(path, header, dimensions)
            size = math.prod(shape)
            if not zipped:  # before memory is asked for
                _check_size(path, size, os.fstat(file.fileno()).st_size - len(header))
            # One byte more than there should be: enough to see a file that is too long, however long it is.
            data = file.read(size + 1)
    except (OSError, EOFError, zlib.error, OverflowError, MemoryError) as error:
        reason = one_line(getattr(error, "strerror", None) or error)
        raise InputError(f"{path} cannot be read as an IDX file, plain or .gz: {reason}") from error
    _check_size(path, size, len(data))
    return torch.from_numpy(np.frombuffer(data, np.uint8).reshape(shape).copy())


def _check_size(path: Path, promised: int, found: int) -> None:
    if found != promised:
        has = "more" if found > promised else f"only {found}"
        raise InputError(f"{path} is damaged: its header promises {promised} bytes of data, it has {has}")


def _shape(path: Path, header: bytes, dimensions: int) -> tuple[int, ...]:
    magic = bytes((0, 0, 8, dimensions))
    if header[:4] != magic:
        raise InputError(
            f"{path} is not an IDX file of bytes in {dimensions} dimensions: it begins with bytes"
            f" '{header[:4].hex(' ')}', expected '{magic.hex(' ')}'"
        )
    if len(header) != 4 + 4 * dimensions:
        raise InputError(f"{path} is damaged: it ends within its header")
    shape = tuple(int(n) for n in np.frombuffer(header, ">u4", offset=4))
    if math.prod(n for n in shape if n) > _LARGEST:
        raise InputError(f"{path} cannot be read: its header promises {' x '.join(map(str, shape))} bytes of data")
    return shape


def _read_part(directory: str | Path, prefix: str, part: str) -> tuple[Tensor, Tensor]:
    """Images (n, 1, 28, 28) and labels (n,) of "train" or "t10k"."""
    paths = []
    for kind, ending in (("images", "idx3-ubyte"), ("labels", "idx1-ubyte")):
        stems = (f"{prefix}-{kind}-{ending}", f"{prefix}-{kind}.{ending}")
        names = [stem + suffix for stem in stems for suffix in (".gz", "")]
        paths.append(find(directory, _FOLDERS, names, f"MNIST {part} {kind}"))
    images, labels = read_idx(paths[0], 3), read_idx(paths[1], 1)
    if images.shape[1:] != (_SIDE, _SIDE):
        raise InputError(f"{paths[0]} has {tuple(images.shape[1:])} images, expected {_SIDE} x {_SIDE}")
    if len(images) != len(labels):
        raise InputError(f"{paths[0]} has {len(images)} images but {paths[1]} {len(labels)} labels")
    if len(labels) and labels.max() > 9:
        raise InputError(f"{paths[1]} has label {labels.max().item()}, expected 0 to 9")
    return images.unsqueeze(1), labels.long()
