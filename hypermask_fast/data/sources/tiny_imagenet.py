"""Tiny ImageNet (200 classes, 64 x 64) from its folders."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ...errors import InputError
from .images import RawImages, decode_jpegs, find, is_file, read_bytes

_FOLDERS = ("tiny-imagenet-200", "tiny-imagenet", "tiny_imagenet")
_SIDE = 64


def read_tiny_imagenet(directory: str | Path, classes: Sequence[int] = range(200)) -> RawImages:
    """train/<class>/images/*.JPEG for training and val/ for testing (the archive's own test images have no
    labels).

    Args:
        directory: that folder, or one with it below under a usual name.
        classes: only these are read; a class's number, and the label of its images, is its line in wnids.txt, from 0.

    Returns:
        images (n, 3, 64, 64) uint8 and labels: training by class, as they are given, then file name; test in
        val_annotations.txt's order.

    Raises:
        InputError: a file or folder is missing or damaged; wnids.txt has fewer classes.
    """
    ids = find(directory, _FOLDERS, ["wnids.txt"], "Tiny ImageNet")
    root = ids.parent
    wnids = _lines(ids)
    if len(wnids) <= max(classes) or len(set(wnids)) != len(wnids):
        raise InputError(f"{ids} must list {max(classes) + 1} or more distinct classes, it has {len(set(wnids))}")
    for wnid in wnids:
        if not re.fullmatch(r"\w{1,100}", wnid, re.ASCII):  # it names a folder
            raise InputError(f"{ids} has {wnid[:100]!r} where the name of a class belongs")
    labels = {wnids[c]: c for c in classes}
    return RawImages(*_read_train(root / "train", labels), *_read_val(root / "val", labels))


def _read_train(folder: Path, labels: dict[str, int]) -> tuple[Tensor, Tensor]:
    paths, found = [], []
    for wnid, c in labels.items():
        try:
            images = sorted((folder / wnid / "images").glob("*.JPEG"))
        except OSError as error:
            raise InputError(f"{folder / wnid / 'images'} cannot be read: {error.strerror}") from error
        if not images:
            raise InputError(f"{folder / wnid / 'images'} has no .JPEG files: expected the training images of {wnid}")
        paths += images
        found += [c] * len(images)
    return _decode(paths), torch.tensor(found)


def _read_val(folder: Path, labels: dict[str, int]) -> tuple[Tensor, Tensor]:
    annotations = folder / "val_annotations.txt"
    paths, found = [], []
    for number, line in enumerate(_lines(annotations), 1):
        fields = line.split("\t")
        if len(fields) < 2:
            raise InputError(f"{annotations}, line {number}: expected a file name, a tab and a class")
        # Only the name: a path in the annotations must not lead out of the folder.
        name = Path(fields[0]).name
        if name in ("", "..") or not name.isprintable():
            raise InputError(f"{annotations}, line {number}: {fields[0][:100]!r} is not a file's name")
        if fields[1] in labels:
            paths.append(folder / "images" / name)
            found.append(labels[fields[1]])
    if not paths:
        raise InputError(f"{annotations} names no validation images of these classes: {', '.join([*labels][:5])}")
    return _decode(paths), torch.tensor(found, dtype=torch.int64)


def _decode(paths: list[Path]) -> Tensor:
    return decode_jpegs([read_bytes(path) for path in paths], _SIDE, lambda i: str(paths[i]))


def _lines(path: Path) -> list[str]:
    """The lines of a text file that are not empty."""
    if not is_file(path):
        raise InputError(f"{path} is missing: expected a text file of one entry per line")
    try:
        return [line for line in read_bytes(path).decode().splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not a text file: expected one entry per line") from error
