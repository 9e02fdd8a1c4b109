"""Batched image transforms: one call per batch, on the batch's own device, without waiting for it.

Deterministic ones (`Scale`, `Normalize`, `PermutePixels`) turn stored pixels into the float32 model input;
random ones (`PadCrop`, `HorizontalFlip`, `BrightnessJitter`) turn stored pixels into stored pixels and draw one
decision per sample from torch's default generator of the batch's device, so a checkpoint of that generator resumes
them bit for bit. Nothing here reads a value back to the host: every transform can be captured in a CUDA graph.

Those that hold tensors have `.to(device)`, which returns a copy there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError

Transform = Callable[[Tensor], Tensor]


def move(transform: Transform | None, device: torch.device | str) -> Transform | None:
    """`transform.to(device)` where it has that method, else the transform itself."""
    to = getattr(transform, "to", None)
    return transform if to is None else to(device)


def unit_range(x: Tensor) -> Tensor:
    """x / 255 as float32 for uint8 pixels; any other dtype is taken as scaled already and only made float32.

    Args:
        x: any shape, uint8 0 to 255 or a float dtype.
    """
    return x.float() / 255 if x.dtype == torch.uint8 else x.float()


@dataclass(frozen=True)
class Scale:
    """x / 255: uint8 pixels (B, ...) to float32 in [0, 1], same shape. float32 passes through unchanged."""

    def __call__(self, x: Tensor) -> Tensor:
        return unit_range(x)


UNIT_SCALE = Scale()  # the default `prepare`


@dataclass(frozen=True)
class Normalize:
    """(x / 255 - mean) / std per channel; x is not divided where it is float already.

    Called with (B, C, ...) uint8 or float32, returns float32 of the same shape.

    Args:
        mean: C numbers, in units of the [0, 1] range.
        std: C positive numbers, likewise.
        device: where the batches will be.

    Raises:
        InputError: mean and std differ in length, are empty or std is not positive; a batch with other than C
            channels.
    """

    mean: Sequence[float]
    std: Sequence[float]
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not self.mean:
            raise InputError(f"mean and std need one number per channel: {self.mean} and {self.std} do not fit")
        if not all(s > 0 for s in self.std):
            raise InputError(f"std must be positive, not {tuple(self.std)}")

    @cached_property
    def _mean_and_std(self) -> tuple[Tensor, Tensor]:
        """Kept: making them in each call would copy to the device, which waits and cannot be captured."""
        mean, std = (torch.tensor(x, dtype=torch.float32, device=self.device) for x in (self.mean, self.std))
        return mean, std

    def to(self, device: torch.device | str) -> Normalize:
        return replace(self, device=device)

    def __call__(self, x: Tensor) -> Tensor:
        # Without this check one channel would silently broadcast to three.
        if x.dim() < 2 or x.shape[1] != len(self.mean):
            raise InputError(f"Normalize has {len(self.mean)} channels, the batch has shape {tuple(x.shape)}")
        shape = (-1,) + (1,) * (x.dim() - 2)
        mean, std = (values.view(shape) for values in self._mean_and_std)
        return (unit_range(x) - mean) / std


@dataclass(frozen=True, eq=False)
class PermutePixels:
    """out[:, i] = flat[:, permutation[i]] in [0, 1], where flat is the zero-padded image flattened in C, H, W
    order.

    Called with (B, C, H, W) uint8 or float32, returns (B, n) float32, n = C (H + 2 pad) (W + 2 pad).

    Args:
        permutation: (n,) int64, each of 0 .. n - 1 once.
        pad: zero pixels added on each of the four sides.

    Raises:
        InputError: not a permutation; pad negative; a batch whose padded images do not have n pixels.
    """

    permutation: Tensor
    pad: int = 0

    def __post_init__(self) -> None:
        permutation = self.permutation
        if permutation.dtype != torch.int64 or permutation.dim() != 1:
            raise InputError(
                f"permutation must be (n,) int64, not {tuple(permutation.shape)} {str(permutation.dtype)[6:]}"
            )
        # Checked where it is made; once on a device, looking at it would mean waiting for it.
        if permutation.device.type == "cpu" and not torch.equal(
            permutation.sort().values, torch.arange(permutation.numel())
        ):
            raise InputError(f"permutation must hold each of 0 .. {permutation.numel() - 1} exactly once")
        if self.pad < 0:
            raise InputError(f"pad must be 0 or more pixels, not {self.pad}")

    def to(self, device: torch.device | str) -> PermutePixels:
        return replace(self, permutation=self.permutation.to(device))

    def __call__(self, x: Tensor) -> Tensor:
        flat = _zero_pad(x, self.pad).flatten(1)
        if flat.shape[1] != self.permutation.numel():
            pixels = self.permutation.numel()
            raise InputError(f"the permutation has {pixels} pixels, a padded image of this batch {flat.shape[1]}")
        # The bytes are permuted before they become floats: a quarter of the traffic.
        return unit_range(flat.index_select(1, self.permutation))


@dataclass(frozen=True)
class PadCrop:
    """A size x size window of each zero-padded image, at its own uniformly random place.

    Called with (B, C, H, W) of any dtype, returns (B, C, size, size) of that dtype. Draws B row offsets, then
    B column offsets, from the default generator of x's device.

    Args:
        size: pixels on a side of the result.
        pad: zero pixels added on each of the four sides before cropping.

    Raises:
        InputError: size < 1 or pad < 0; a batch whose padded images are smaller than the window.
    """

    size: int
    pad: int

    def __post_init__(self) -> None:
        if self.size < 1 or self.pad < 0:
            raise InputError(f"PadCrop needs size >= 1 and pad >= 0, not size {self.size} and pad {self.pad}")

    def __call__(self, x: Tensor) -> Tensor:
        batch, _, height, width = _image_shape(x)
        free_rows = height + 2 * self.pad - self.size
        free_columns = width + 2 * self.pad - self.size
        if free_rows < 0 or free_columns < 0:
            raise InputError(
                f"a crop of {self.size} x {self.size} does not fit in {height} x {width} images padded by {self.pad}"
            )
        row = torch.randint(free_rows + 1, (batch,), device=x.device)
        column = torch.randint(free_columns + 1, (batch,), device=x.device)
        # A view of every window there is, (B, C, rows, columns, size, size), of which each sample takes one:
        # runs of pixels are copied, six times faster on the CPU than an index per pixel.
        windows = _zero_pad(x, self.pad).unfold(2, self.size, 1).unfold(3, self.size, 1)
        return windows[torch.arange(batch, device=x.device), :, row, column]


@dataclass(frozen=True)
class HorizontalFlip:
    """Each image mirrored left to right with probability 1/2.

    Called with (B, C, H, W) of any dtype, returns the same shape and dtype. Draws B uniform numbers from the
    default generator of x's device.

    Raises:
        InputError: a batch that is not (B, C, H, W).
    """

    def __call__(self, x: Tensor) -> Tensor:
        batch = _image_shape(x)[0]
        flip = torch.rand(batch, 1, 1, 1, device=x.device) < 0.5
        return torch.where(flip, x.flip(-1), x)


@dataclass(frozen=True)
class BrightnessJitter:
    """Each image with its values multiplied by a factor of its own, 1 - amount to 1 + amount: torchvision's
    ColorJitter(brightness=amount) in Pillow's numbers, v factor in float32, cut to 0 .. 255 and to whole numbers.

    Called with (B, C, H, W) uint8, returns the same. Draws B uniform numbers from the default generator of x's device.

    Raises:
        InputError: amount is not 0 .. 1; a batch that is not uint8 (B, C, H, W).
    """

    amount: float

    def __post_init__(self) -> None:
        if not 0 <= self.amount <= 1:
            raise InputError(f"BrightnessJitter needs an amount of 0 .. 1, not {self.amount}")

    def __call__(self, x: Tensor) -> Tensor:
        batch = _image_shape(x)[0]
        if x.dtype != torch.uint8:
            raise InputError(f"BrightnessJitter takes uint8 images, not {str(x.dtype).removeprefix('torch.')}")
        factor = 1 + self.amount * (2 * torch.rand(batch, 1, 1, 1, device=x.device) - 1)
        return (x.float() * factor).clamp_(max=255).to(torch.uint8)


@dataclass(frozen=True, init=False)
class Compose:
    """The transforms one after the other: Compose(f, g)(x) = g(f(x)). None among them is left out."""

    transforms: tuple[Transform, ...]

    def __init__(self, *transforms: Transform | None) -> None:
        object.__setattr__(self, "transforms", tuple(t for t in transforms if t is not None))

    def to(self, device: torch.device | str) -> Compose:
        return Compose(*(move(t, device) for t in self.transforms))

    def __call__(self, x: Tensor) -> Tensor:
        for transform in self.transforms:
            x = transform(x)
        return x


def _zero_pad(x: Tensor, pad: int) -> Tensor:
    """(B, C, H, W) with `pad` zero pixels on each side of every image."""
    _image_shape(x)
    return F.pad(x, (pad, pad, pad, pad)) if pad else x


def _image_shape(x: Tensor) -> tuple[int, int, int, int]:
    """B, C, H, W of a batch of images; InputError for any other number of dimensions."""
    if x.dim() != 4:
        raise InputError(f"expected a batch of images (B, C, H, W), not shape {tuple(x.shape)}")
    batch, channels, height, width = x.shape
    return batch, channels, height, width
