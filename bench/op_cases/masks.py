"""Ops over the masks of a whole network."""

from collections.abc import Sequence
from itertools import accumulate
from math import prod

import torch
from torch import Tensor

from hypermask_fast.ops import kept_rank

from ..op_case import BOTH, FORWARD, Draw, OpCase, Work
from .common import OF_SUMS, THRESHOLD, Shapes, offsets_of, threshold_of


def mask_thresholds(sizes: Sequence[int], sparsity: float) -> OpCase:
    """Exact selection over segments of these sizes."""
    offsets = tuple(accumulate(sizes, initial=0))
    ranks = [kept_rank(sparsity, size) for size in sizes]

    def arguments(draw: Draw) -> tuple:
        return draw(offsets[-1], low=-3, high=3), offsets, torch.tensor(ranks, device=draw.device)

    segments = f" in {len(sizes)} segments" if len(sizes) > 1 else ""
    return OpCase(
        "mask_thresholds",
        f"{offsets[-1]} entries{segments}, p {sparsity:g}",
        arguments,
        {FORWARD: Work(offsets[-1])},
        results=("threshold",),
        tolerance=1e-6,
    )


def semi_binary_mask(size: int) -> OpCase:
    # Logits read, mask written; backward: gradient and logits read, gradient written.
    work = {FORWARD: Work(2 * size), BOTH: Work(5 * size)}
    return OpCase("semi_binary_mask", f"N {size}", lambda draw: (draw.leaf(size, reach=2), threshold_of(draw)), work)


def _network(draw: Draw, shapes: Shapes) -> tuple[list[Tensor], Tensor, Tensor, tuple[int, ...]]:
    """Weights, flat logits, thresholds and offsets of a whole network."""
    weights = [draw.leaf(*shape, reach=0.1) for shape in shapes]
    offsets = offsets_of(shapes)
    return weights, draw.leaf(offsets[-1], reach=2), draw.full(len(shapes), value=THRESHOLD), offsets


def masked_weights(shapes: Shapes) -> OpCase:
    """W * m of a whole network."""
    size = sum(map(prod, shapes))
    # W and logits read, product written; backward: gradient, W and logits read, both gradients written.
    work = {FORWARD: Work(3 * size), BOTH: Work(8 * size)}
    sizes = f"N {size} in {len(shapes)} tensors"
    return OpCase("masked_weights", sizes, lambda draw: _network(draw, shapes), work, results=("masked",))


def _previous(draw: Draw, weights: list[Tensor]) -> Tensor:
    """Weights as the task began, a tenth of their range away."""
    old = torch.cat([weight.detach().flatten() for weight in weights]).float()
    return draw.rounded(old + draw(old.numel(), low=-0.01, high=0.01).float())


def mask_overlap(shapes: Shapes, tasks: int) -> OpCase:
    """Entries that the masks of every two tasks share, per tensor of a network."""
    size = sum(map(prod, shapes))

    def arguments(draw: Draw) -> tuple:
        return draw(tasks, size, low=-2, high=2), draw.full(tasks, len(shapes), value=THRESHOLD), offsets_of(shapes)

    # Logits read, counts of 8 bytes written; an entry's bit is compared with those of all tasks behind.
    work = {FORWARD: Work(tasks * size + 2 * len(shapes) * tasks**2, size * tasks * (tasks + 1) / 64)}
    return OpCase("mask_overlap", f"N {size} in {len(shapes)} tensors, {tasks} tasks", arguments, work, tolerance=0.0)


def of_network(shapes: Shapes, tasks: int) -> list[OpCase]:
    """The ops over the masks of a network of tensors of these shapes."""
    sizes = [prod(shape) for shape in shapes]
    return [
        mask_thresholds(sizes, 30),
        semi_binary_mask(sum(sizes)),
        masked_weights(shapes),
        weight_drift(shapes),
        masked_weights_drift(shapes),
        mask_overlap(shapes, tasks),
    ]


def weight_drift(shapes: Shapes) -> OpCase:
    """D, 1-norm with the mask."""
    size = sum(map(prod, shapes))

    def arguments(draw: Draw) -> tuple:
        weights, logits, thresholds, offsets = _network(draw, shapes)
        return weights, _previous(draw, weights), offsets, 1, logits, thresholds

    # W, W_prev and logits read; backward: the same, both gradients written.
    work = {FORWARD: Work(3 * size), BOTH: Work(8 * size)}
    sizes = f"N {size} in {len(shapes)} tensors, 1-norm, masked"
    return OpCase("weight_drift", sizes, arguments, work, results=("drift",), loose=OF_SUMS)


def masked_weights_drift(shapes: Shapes) -> OpCase:
    """W * m and D in one pass."""
    size = sum(map(prod, shapes))

    def arguments(draw: Draw) -> tuple:
        weights, logits, thresholds, offsets = _network(draw, shapes)
        return weights, logits, thresholds, offsets, _previous(draw, weights), 1

    # W, W_prev and logits read, product written; backward: these and the gradient read, both gradients written.
    work = {FORWARD: Work(4 * size), BOTH: Work(10 * size)}
    sizes = f"N {size} in {len(shapes)} tensors, 1-norm"
    return OpCase("masked_weights_drift", sizes, arguments, work, results=("masked", "drift"), loose=OF_SUMS)
