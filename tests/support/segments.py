"""Weights of several segments with their logits, thresholds, offsets and previous weights, in awkward sizes."""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from support.comparing import INF, NAN, randn, sized_offsets

SPECIAL = [0.0, -0.0, 1e-45, -1e-45, 1e-40, -1e-40, 3e-39, 0.3, -0.3, 0.4, -0.4, 0.6249999, 0.625, 9.0, 20.0, -88.0,
           3e38, NAN, -NAN, INF, -INF]  # fmt: skip


def special_logits(size: int) -> Tensor:
    """Random over many magnitudes; the first ones are on the edges of the float32 format and of the formulas."""
    a = torch.randn(size) * torch.randn(size).exp()
    a[: min(size, len(SPECIAL))] = torch.tensor(SPECIAL)[:size]
    return a


class Segments(NamedTuple):
    weights: list[Tensor]
    logits: Tensor  # they go on behind the last weight's
    thresholds: Tensor
    offsets: list[int]  # one segment more than there are weights
    previous: Tensor  # flat; one of the weights has not moved

    @property
    def leaves(self) -> list[Tensor]:
        return [*self.weights, self.logits]


def odd_shapes() -> Segments:
    """Of odd shapes, one of them strided and one of a single entry."""
    weights = [torch.randn(30, 7), torch.randn(5, 300).t(), torch.randn(1), torch.randn(17, 3, 3, 3)]
    weights.append(torch.randn(20000))
    offsets = sized_offsets([*(w.numel() for w in weights), 11])
    logits = torch.randn(offsets[-1]) * torch.randn(offsets[-1]).exp()
    previous = torch.randn(offsets[-1])
    previous[offsets[2] : offsets[3]] = weights[2]  # the 2-norm's corner
    return Segments(weights, logits, torch.tensor([0.2, 0.0, 0.1, 3.0, 0.7, 0.0]), offsets, previous)


def many(count: int) -> Segments:
    """Odd sizes, every fifth empty, special logits, some of them before and behind all segments; the first one's logits
    begin on 16 bytes like itself where `count` is even."""
    sizes = [(13 * i) % 31 * (i % 5 != 4) for i in range(count)]
    sizes[0], sizes[count // 2] = 9001, 4096
    offsets = sized_offsets([*sizes, 8], 3 if count % 2 else 4)
    weights = [torch.randn(size) for size in sizes]
    logits = special_logits(offsets[-1] + 5)
    thresholds = torch.rand(count + 1)
    thresholds[::3] = 0
    previous = torch.randn(len(logits))
    previous[offsets[0] : offsets[1]] = weights[0]
    return Segments(weights, logits, thresholds, offsets, previous)


def a_few() -> Segments:
    """Segments of thousands of entries, and no logit within rounding of the thresholds."""
    weights = [torch.randn(shape) for shape in ((1,), (63, 7), (1000, 1), (37, 33, 5))]
    offsets = sized_offsets([*(w.numel() for w in weights), 20])
    logits = torch.randn(offsets[-1])
    logits[(logits.abs() - 0.5).abs() < 1e-3] = 0.7
    previous = 0.1 * torch.randn(offsets[-1])
    previous[: offsets[4]] += torch.cat([w.flatten() for w in weights])
    previous[offsets[1] : offsets[2]] = weights[1].flatten()
    return Segments(weights, logits, torch.full((5,), 0.5), offsets, previous)


# Beyond 64 the CUDA kernels need more than one launch.
PROBLEMS: dict[str, Callable[[], Segments]] = {
    "odd shapes": odd_shapes,
    "a few": a_few,
    **{f"{count} segments": lambda count=count: many(count) for count in (1, 6, 64, 65, 130)},
}


def each_problem(*backends: str, triton: Sequence[str] = ()) -> pytest.MarkDecorator:
    """Runs a test that takes `backend` and `problem` with every problem; Triton, whose interpreter is slow, with
    those named."""
    cases = [*itertools.product(backends, PROBLEMS), *(("triton", problem) for problem in triton)]
    return pytest.mark.parametrize(("backend", "problem"), cases, indirect=["backend"])


# A block of Triton's kernels holds 2048 entries.
SHAPES = ((50, 61), (7,), (0, 3), (1,), (), (3, 2, 3, 3), (2048,), (2049,))


def of_shapes(dtype: torch.dtype = torch.float32, shapes=SHAPES, first: int = 3, rest: int = 70) -> Segments:
    """Weights of these shapes where Triton runs, each threshold the magnitude of a logit."""
    weights = [randn(*shape, dtype=dtype) for shape in shapes]
    offsets = [first, *itertools.accumulate((w.numel() for w in weights), initial=first)][1:]
    logits, previous = randn(offsets[-1] + rest, dtype=dtype), randn(offsets[-1] + rest, dtype=dtype)
    thresholds = torch.stack(
        [logits[at].abs() if end > at else logits.new_zeros(()) for at, end in itertools.pairwise(offsets)]
    )
    thresholds = torch.cat([thresholds, thresholds.new_zeros(1)])
    return Segments(weights, logits, thresholds, [*offsets, offsets[-1] + rest], previous)
