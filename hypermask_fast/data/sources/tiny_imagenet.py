"""Tiny ImageNet (200 classes, 64 x 64) from its folders."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ...errors import InputError
from .images import RawImages, decode_jpegs, find

_FOLDERS = ("tiny-imagenet-200", "tiny-imagenet", "tiny_imagenet")
_SIDE = 64


def read_tiny_imagenet(directory: str | Path, num_classes: int = 200) -> RawImages:
    """train/<class>/images/*.JPEG for training and val/ for testing (the archive's own test images have no
    labels).

    Args:
        directory: that folder, or one with it below under a usual name.
        num_classes: only the first so many classes of wnids.txt are read; a class's label is its line there.

    Returns:
        images (n, 3, 64, 64) uint8 and labels: training by class, then file name; test in
        val_annotations.txt's order.

    Raises:
        InputError: a file or folder is missing or damaged; wnids.txt has fewer classes.
    """
    ids = find(directory, _FOLDERS, ["wnids.txt"], "Tiny ImageNet")
    root = ids.parent
    wnids = _lines(ids)
    if len(wnids) < num_classes or len(set(wnids)) != len(wnids):
        raise InputError(f"{ids} must list {num_classes} or more distinct classes, it has {len(set(wnids))}")
    labels = {wnid: c for c, wnid in enumerate(wnids[:num_classes])}
    return RawImages(*_read_train(root / "train", labels), *_read_val(root / "val", labels))


def _read_train(folder: Path, labels: dict[str, int]) -> tuple[Tensor, Tensor]:
    paths, found = [], []
    for wnid, c in labels.items():
        images = sorted((folder / wnid / "images").glob("*.JPEG"))
        if not images:
            raise InputError(f"{folder / wnid / 'images'} has no .JPEG files: expected the training images of {wnid}")
        paths += images
        found += [c] * len(images)
    return _decode(paths, folder), torch.tensor(found)


def _read_val(folder: Path, labels: dict[str, int]) -> tuple[Tensor, Tensor]:
    annotations = folder / "val_annotations.txt"
    paths, found = [], []
    for number, line in enumerate(_lines(annotations), 1):
        fields = line.split("\t")
        if len(fields) < 2:
            raise InputError(f"{annotations}, line {number}: expected a file name, a tab and a class")
        if fields[1] in labels:
            # Only the name: a path in the annotations must not lead out of the folder.
            paths.append(folder / "images" / Path(fields[0]).name)
            found.append(labels[fields[1]])
    return _decode(paths, folder), torch.tensor(found, dtype=torch.int64)


def _decode(paths: list[Path], folder: Path) -> Tensor:
    try:
        files = [path.read_bytes() for path in paths]
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read: {error.strerror}") from error
    return decode_jpegs(files, _SIDE, str(folder))


def _lines(path: Path) -> list[str]:
    """The lines of a text file that are not empty."""
    try:
        return [line for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is missing or not a text file: expected one entry per line") from error
