"""Pillow's image operations on batches of uint8 images, another one for every image, to the last bit.

Everything is a gather by a table, or a blend of two images, so that a batch takes the same few calls whatever its
images get, on whichever device, without waiting for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError

GEOMETRIC = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
_CHANGING = ("contrast", "autocontrast", "equalize")  # value to value, by a table that depends on the image
_ENHANCED = ("color", "sharpness")  # pixels that look at others
NAMES = (*GEOMETRIC, "brightness", "invert", "posterize", "solarize", *_CHANGING, *_ENHANCED)


class Operation(NamedTuple):
    """One operation and what it takes.

    Attributes:
        name: of `NAMES`.
        amount: rotate: degrees, counterclockwise. shear_x, shear_y: pixels that a row (a column) moves more than the
            one before it. translate_x, translate_y: pixels to the left (upwards), rounded to whole ones. brightness,
            contrast, color, sharpness: Pillow's factor, 1 for the image as it is. posterize: bits that are kept.
            solarize: the least value that is inverted. Others take none.
    """

    name: str
    amount: float = 0.0


@dataclass(frozen=True)
class Operations:
    """Image i gets operation which[i], in Pillow's numbers: ImageOps, ImageEnhance, Image.rotate, Image.transform.

    Called with images (B, 3, H, W) uint8 and which (B,) int64 on the same device: 0 leaves an image as it is, k is
    operations[k - 1]. Returns (B, 3, H, W) uint8. Geometric ones take the nearest pixel.

    Args:
        operations: to choose from.
        height, width: of the images.
        fill: the value of pixels that come in from outside of the image, 0 .. 255.
        device: where the batches will be.

    Raises:
        InputError: an unknown operation; a batch other than the above.
    """

    operations: tuple[Operation, ...]
    height: int
    width: int
    fill: int = 128
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        for operation in self.operations:
            if operation.name not in NAMES:
                raise InputError(f"no image operation is called {operation.name!r}: there are {', '.join(NAMES)}")

    def to(self, device: torch.device | str) -> Operations:
        return replace(self, device=device)

    def __call__(self, x: Tensor, which: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1:] != (3, self.height, self.width) or x.dtype != torch.uint8:
            raise InputError(
                f"these operations take uint8 images (B, 3, {self.height}, {self.width}), not "
                f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"
            )
        tables, names = self._tables, {operation.name for operation in self.operations}
        if names.intersection(GEOMETRIC):
            x = _moved(x, tables.sources[which], self.fill)
        if names.difference(GEOMETRIC, _ENHANCED):
            x = _mapped(x, self._values(x, which, names))
        if names.intersection(_ENHANCED):
            is_color = (tables.kinds[which] == NAMES.index("color")).view(-1, 1, 1, 1)
            x = _blend(torch.where(is_color, grey(x), smoothed(x)), x, tables.blends[which].view(-1, 1, 1, 1))
        return x

    def _values(self, x: Tensor, which: Tensor, names: set[str]) -> Tensor:
        """(B, 3 or 1, 256) uint8: the value that each value of each channel becomes."""
        tables = self._tables
        values, kinds = tables.values[which].unsqueeze(1), tables.kinds[which].view(-1, 1, 1)
        if "contrast" in names:
            of_all = contrast_values(x, tables.contrasts[which])
            values = torch.where(kinds == NAMES.index("contrast"), of_all, values)
        if names.intersection(("autocontrast", "equalize")):
            counts = histograms(x)
            values = torch.where(kinds == NAMES.index("autocontrast"), autocontrast_values(counts), values)
            values = torch.where(kinds == NAMES.index("equalize"), equalize_values(counts), values)
        return values

    @cached_property
    def _tables(self) -> _Tables:
        """Kept: making them in each call would copy to the device, which waits and cannot be captured."""
        each = (Operation("identity"), *self.operations)
        tables = _Tables(
            torch.from_numpy(np.stack([_source(o, self.height, self.width) for o in each])),
            torch.stack([_fixed_values(o) for o in each]),
            torch.tensor([NAMES.index(o.name) if o.name in NAMES else -1 for o in each]),
            torch.tensor([o.amount if o.name == "contrast" else 1.0 for o in each]),
            torch.tensor([o.amount if o.name in _ENHANCED else 1.0 for o in each]),
        )
        return _Tables(*(table.to(self.device) for table in tables))


class _Tables(NamedTuple):
    """A row for every choice, of which 0 leaves an image as it is."""

    sources: Tensor  # (choices, H W) int64: which pixel comes where; -1 for none
    values: Tensor  # (choices, 256) uint8
    kinds: Tensor  # (choices,) int64, of NAMES; -1 for none
    contrasts: Tensor  # (choices,) float32, factors
    blends: Tensor  # (choices,) float32, factors of color and sharpness


def _moved(x: Tensor, sources: Tensor, fill: int) -> Tensor:
    """Pixel i of an image is its pixel sources[i]; sources (B, H W), -1 for `fill`."""
    sources = sources.unsqueeze(1)
    moved = x.flatten(2).gather(2, sources.clamp(min=0).expand(-1, x.shape[1], -1))
    return moved.masked_fill_(sources < 0, fill).view_as(x)


def _mapped(x: Tensor, values: Tensor) -> Tensor:
    """Value v becomes values[v]; values (B, 3 or 1, 256)."""
    return values.expand(-1, x.shape[1], -1).gather(2, x.flatten(2).long()).view_as(x)


def _blend(degenerate: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    """degenerate + factor (x - degenerate) in float32, cut to 0 .. 255 and to whole numbers: Image.blend."""
    start = degenerate.float()
    return (start + factor * (x.float() - start)).clamp_(0, 255).to(torch.uint8)


def grey(x: Tensor) -> Tensor:
    """(B, 1, H, W) uint8 of (B, 3, H, W): Image.convert("L"), ITU-R 601 luma in 16 bits of fraction."""
    red, green, blue = x.int().unbind(1)
    return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16).to(torch.uint8).unsqueeze(1)


def smoothed(x: Tensor) -> Tensor:
    """(B, C, H, W) uint8: ImageFilter.SMOOTH, (sum of the 3 x 3 pixels + 4 times the middle one) / 13, rounded; pixels
    at the border stay as they are."""
    values = x.float()
    columns = values[..., :-2, :] + values[..., 1:-1, :] + values[..., 2:, :]
    total = columns[..., :-2] + columns[..., 1:-1] + columns[..., 2:] + 4 * values[..., 1:-1, 1:-1]
    result = x.clone()
    # A half is at least 1 / 26 away from every sum / 13, so float32 rounds like whole numbers.
    result[..., 1:-1, 1:-1] = (total / 13 + 0.5).to(torch.uint8)
    return result


def histograms(x: Tensor) -> Tensor:
    """(B, C, 256) int32: how many pixels of each channel have each value."""
    flat = x.flatten(2).long()
    counts = torch.zeros(*flat.shape[:2], 256, dtype=torch.int32, device=x.device)
    return counts.scatter_add_(2, flat, torch.ones((), dtype=torch.int32, device=x.device).expand_as(flat))


def contrast_values(x: Tensor, factors: Tensor) -> Tensor:
    """(B, 1, 256) uint8: ImageEnhance.Contrast, a blend with the mean of the grey image, rounded; factors (B,)."""
    light, pixels = grey(x).flatten(1).long().sum(1), x.shape[2] * x.shape[3]
    mean = ((2 * light + pixels) // (2 * pixels)).view(-1, 1, 1)
    return _blend(mean, torch.arange(256, device=x.device), factors.view(-1, 1, 1))


def autocontrast_values(counts: Tensor) -> Tensor:
    """(B, C, 256) uint8 of counts like that: ImageOps.autocontrast, which stretches the values to 0 .. 255."""
    there = (counts > 0).to(torch.uint8)
    low = there.argmax(-1, keepdim=True)
    high = 255 - there.flip(-1).argmax(-1, keepdim=True)
    # float64 and a true division, like Pillow: the last bit decides where a product is a whole number.
    span = (high - low).double()
    scale = torch.full_like(span, 255) / span
    every = torch.arange(256, device=counts.device)
    stretched = (every * scale + -low * scale).clamp_(0, 255)
    return torch.where(high > low, stretched, every.double()).to(torch.uint8)


def equalize_values(counts: Tensor) -> Tensor:
    """(B, C, 256) uint8 of counts like that: ImageOps.equalize, which makes all values about as frequent."""
    every = torch.arange(256, device=counts.device)
    last = (every * (counts > 0)).argmax(-1, keepdim=True)
    step = (counts.sum(-1, keepdim=True) - counts.gather(-1, last)) // 255
    before = counts.cumsum(-1) - counts
    spread = (step // 2 + before) // step.clamp(min=1)
    # No step: too few pixels, or all of one value.
    return torch.where(step > 0, spread, every).clamp_(max=255).to(torch.uint8)


def _fixed_values(operation: Operation) -> Tensor:
    """(256,) uint8: what each value becomes, whatever the image."""
    name, amount = operation
    every = torch.arange(256)
    if name == "brightness":
        every = _blend(torch.zeros(()), every, torch.tensor(amount))
    elif name == "invert":
        every = 255 - every
    elif name == "posterize":
        every = every & ~(2 ** (8 - round(amount)) - 1)
    elif name == "solarize":
        every = torch.where(every < amount, every, 255 - every)
    return every.to(torch.uint8)


def _source(operation: Operation, height: int, width: int) -> np.ndarray:
    """(H W,) int64: of each pixel the place in the image that it comes from, -1 from outside."""
    name, amount = operation
    a, b, c, d, e, f = {
        "rotate": _rotation(amount, height, width) if name == "rotate" else (),
        "shear_x": (1, amount, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, amount, 1, 0),
        "translate_x": (1, 0, amount, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, amount),
    }.get(name, (1, 0, 0, 0, 1, 0))
    # Pixel (x, y) comes from (a x + b y + c, d x + e y + f), at the pixels' middles, in 16 bits of fraction.
    x, y = np.arange(width)[None, :], np.arange(height)[:, None]
    column = (_fixed(c + a / 2 + b / 2) + _fixed(a) * x + _fixed(b) * y) >> 16
    row = (_fixed(f + d / 2 + e / 2) + _fixed(d) * x + _fixed(e) * y) >> 16
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    return np.where(inside, row * width + column, -1).reshape(-1)


def _fixed(value: float) -> int:
    return math.floor(value * 65536 + 0.5)


def _rotation(degrees: float, height: int, width: int) -> Sequence[float]:
    """Image.rotate's matrix: from a pixel's place to where it comes from, about the image's middle."""
    angle = -math.radians(degrees % 360)
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    x, y = width / 2, height / 2
    return cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y
