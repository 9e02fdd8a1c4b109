"""AutoAugment's policy for CIFAR-10, on batches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from .image_operations import Operation, Operations


class Step(NamedTuple):
    """Operation `name` at magnitude `level`, 0 .. 9, with this probability."""

    name: str
    probability: float
    level: int


# Cubuk et al. 2019, appendix, "AutoAugment policy found on reduced CIFAR-10"; operations without a magnitude have the
# level that is printed there, and ignore it.
CIFAR10_POLICY: tuple[tuple[Step, Step], ...] = (
    (Step("invert", 0.1, 7), Step("contrast", 0.2, 6)),
    (Step("rotate", 0.7, 2), Step("translate_x", 0.3, 9)),
    (Step("sharpness", 0.8, 1), Step("sharpness", 0.9, 3)),
    (Step("shear_y", 0.5, 8), Step("translate_y", 0.7, 9)),
    (Step("autocontrast", 0.5, 8), Step("equalize", 0.9, 2)),
    (Step("shear_y", 0.2, 7), Step("posterize", 0.3, 7)),
    (Step("color", 0.4, 3), Step("brightness", 0.6, 7)),
    (Step("sharpness", 0.3, 9), Step("brightness", 0.7, 9)),
    (Step("equalize", 0.6, 5), Step("equalize", 0.5, 1)),
    (Step("contrast", 0.6, 7), Step("sharpness", 0.6, 5)),
    (Step("color", 0.7, 7), Step("translate_x", 0.5, 8)),
    (Step("equalize", 0.3, 7), Step("autocontrast", 0.4, 8)),
    (Step("translate_y", 0.4, 3), Step("sharpness", 0.2, 6)),
    (Step("brightness", 0.9, 6), Step("color", 0.2, 8)),
    (Step("solarize", 0.5, 2), Step("invert", 0.0, 3)),
    (Step("equalize", 0.2, 0), Step("autocontrast", 0.6, 0)),
    (Step("equalize", 0.2, 8), Step("equalize", 0.6, 4)),
    (Step("color", 0.9, 9), Step("equalize", 0.6, 6)),
    (Step("autocontrast", 0.8, 4), Step("solarize", 0.2, 8)),
    (Step("brightness", 0.1, 3), Step("color", 0.7, 0)),
    (Step("solarize", 0.4, 5), Step("autocontrast", 0.9, 3)),
    (Step("translate_y", 0.9, 9), Step("translate_y", 0.7, 9)),
    (Step("autocontrast", 0.9, 2), Step("solarize", 0.8, 3)),
    (Step("equalize", 0.8, 8), Step("invert", 0.1, 3)),
    (Step("translate_y", 0.7, 9), Step("autocontrast", 0.9, 1)),
)


def operation(name: str, level: int, sign: int, side: int) -> Operation:
    """A policy's operation on images of that many pixels a side, as the paper ranges it, in ten levels 0 .. 9.

    Shears to 0.3, translations to 150 / 331 of a side, rotations to 30 degrees, each to either side (sign -1 or 1);
    brightness, color, contrast and sharpness by factors of 1 - 0.9 to 1 + 0.9; posterize from 8 to 4 bits; solarize
    from 256 to 0.
    """
    part = level / 9
    match name:
        case "shear_x" | "shear_y":
            return Operation(name, sign * 0.3 * part)
        case "translate_x" | "translate_y":
            return Operation(name, sign * 150 / 331 * part * side)
        case "rotate":
            return Operation(name, sign * 30 * part)
        case "brightness" | "color" | "contrast" | "sharpness":
            return Operation(name, 1 + sign * 0.9 * part)
        case "posterize":
            return Operation(name, round(8 - 4 * part))
        case "solarize":
            return Operation(name, 256 - 256 * part)
    return Operation(name)


@dataclass(frozen=True)
class AutoAugment:
    """Each image gets one of the policy's 25 pairs of operations, each of which it gets by its probability.

    Called with (B, 3, size, size) uint8, returns the same. Draws B pairs, then (B, 2) uniform numbers that decide
    whether an operation is done, then (B, 2) signs, from the default generator of x's device. Operations are Pillow's,
    with the nearest pixel, and 128 for pixels from outside of the image.

    Args:
        size: pixels on a side.
        device: where the batches will be.

    Raises:
        InputError: a batch of another kind.

    Source: Cubuk et al. 2019, AutoAugment: Learning Augmentation Strategies from Data.
    """

    size: int
    device: torch.device | str = "cpu"

    def to(self, device: torch.device | str) -> AutoAugment:
        return replace(self, device=device)

    def __call__(self, x: Tensor) -> Tensor:
        for which in self.draw(len(x)):
            x = self.operations(x, which)
        return x

    def draw(self, images: int) -> tuple[Tensor, Tensor]:
        """Which of `operations` so many images get first, and which then; (images,) int64 each, 0 for none."""
        choices, probabilities = self._policy
        pair = torch.randint(len(choices), (images,), device=self.device)
        done = torch.rand(images, 2, device=self.device) < probabilities[pair]
        sign = torch.randint(2, (images, 2, 1), device=self.device)
        first, then = (choices[pair].gather(2, sign).squeeze(2) * done).unbind(1)
        return first, then

    @cached_property
    def operations(self) -> Operations:
        """What the policy chooses from, on the device."""
        return Operations(self._listed, self.size, self.size, device=self.device)

    @cached_property
    def _listed(self) -> tuple[Operation, ...]:
        """Every operation of the policy at its level and sign, once."""
        steps = [step for pair in CIFAR10_POLICY for step in pair]
        each = [operation(step.name, step.level, sign, self.size) for step in steps for sign in (-1, 1)]
        return tuple(dict.fromkeys(each))

    @cached_property
    def _policy(self) -> tuple[Tensor, Tensor]:
        """(25, 2, 2) int64 of `operations` by pair, place and sign; (25, 2) probabilities. Kept like `Normalize`'s."""

        def choice(step: Step, sign: int) -> int:
            return 1 + self._listed.index(operation(step.name, step.level, sign, self.size))

        choices = [[[choice(step, sign) for sign in (-1, 1)] for step in pair] for pair in CIFAR10_POLICY]
        probabilities = [[step.probability for step in pair] for pair in CIFAR10_POLICY]
        return torch.tensor(choices, device=self.device), torch.tensor(probabilities, device=self.device)
