"""What every reader shares: the raw images it returns, finding files, decoding JPEG."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...checks import one_line
from ...errors import InputError
from ...extras import needed_for


class MissingFiles(InputError):
    """A folder, or the first file of a data set that was looked for in it, is not there."""


class RawImages(NamedTuple):
    """A data set as read: pixels uint8 (n, C, H, W), labels int64 (n,), in the file's order."""

    inputs: Tensor
    labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor


def find(directory: str | Path, subfolders: Sequence[str], names: Sequence[str], what: str) -> Path:
    """The first of `names` that exists in the directory itself or in one of the subfolders.

    Args:
        directory: as the user gave it.
        subfolders: usual places below it, looked at after it.
        names: alternatives for one file.
        what: what it is, for the message, e.g. "MNIST's training images".

    Raises:
        MissingFiles: the directory does not exist, or none of the names is there as a file.
        InputError: the directory is none, or may not be looked into.
    """
    directory = Path(directory)
    if not _is(Path.is_dir, directory):
        error, wrong = (InputError, "is not a folder") if directory.exists() else (MissingFiles, "does not exist")
        raise error(f"data directory {directory} {wrong}; it should hold {what} ({names[0]})")
    for folder in (".", *subfolders):
        for name in names:
            if is_file(directory / folder / name):
                return directory / folder / name
    below = f" (or {', '.join(subfolders)} below it)" if subfolders else ""
    raise MissingFiles(f"{directory}{below} has no {what}: expected {' or '.join(names)}")


def is_file(path: Path) -> bool:
    """Whether a file is there. Raises InputError where that may not be known."""
    return _is(Path.is_file, path)


def _is(kind: Callable[[Path], bool], path: Path) -> bool:
    try:
        return kind(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def read_bytes(path: Path) -> bytes:
    """All of a file. Raises InputError, which names it."""
    try:
        return path.read_bytes()
    except (OSError, MemoryError) as error:
        raise InputError(f"{path} cannot be read: {getattr(error, 'strerror', None) or 'it is too large'}") from error


def decode_jpegs(files: Sequence[bytes], side: int, name: Callable[[int], str]) -> Tensor:
    """JPEG files to uint8 (n, 3, side, side); grey ones are made RGB.

    Args:
        files: each one JPEG file's bytes.
        side: pixels on a side that each must have.
        name: what to call the i-th of them in a message.

    Raises:
        InputError: Pillow is missing; a file is damaged or of another size.
    """
    with needed_for("reading JPEG images"):
        from PIL import Image, UnidentifiedImageError
    pixels = np.empty((len(files), side, side, 3), dtype=np.uint8)

    def decode(i: int) -> None:
        try:
            with Image.open(io.BytesIO(files[i]), formats=["JPEG"]) as image:
                # The size is known before the pixels are decoded, so a forged huge one costs nothing.
                if image.size != (side, side):
                    raise InputError(f"{name(i)} is {image.size}, expected {side} x {side}")
                pixels[i] = np.asarray(image.convert("RGB"))
        except InputError:
            raise
        except UnidentifiedImageError as error:  # its text names an object in memory
            raise InputError(f"{name(i)} is not a JPEG") from error
        except Exception as error:  # a damaged one can fail in any way at all
            raise InputError(f"{name(i)} is not a readable JPEG ({one_line(error)})") from error

    with ThreadPoolExecutor() as pool:  # Pillow lets go of the interpreter while it decodes
        for _ in pool.map(decode, range(len(files))):
            pass
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
