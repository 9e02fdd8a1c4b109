"""Masks, W * m, how far the masked weights have drifted, and what masks have in common."""

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError


def kept_rank(sparsity: float, size: int) -> int:
    """Rank from which entries are kept: ceil(p (n - 1) / 100), the linear-interpolated percentile's upper neighbour.

    An entry survives the p-th percentile of n magnitudes exactly when its rank (0 the smallest) is at least this.

    Args:
        sparsity: p in percent, 0 to 100.
        size: n, entries of the tensor.

    Raises:
        InputError: sparsity is not a number from 0 to 100.
    """
    number = isinstance(sparsity, Real) and not isinstance(sparsity, bool)
    if not number or not 0 <= sparsity <= 100:
        raise InputError(f"sparsity is a percentage from 0 to 100, not {sparsity!r}")
    return math.ceil(sparsity * max(size - 1, 0) / 100)


def mask_thresholds(logits: Tensor, offsets: Sequence[int], ranks: Tensor) -> Tensor:
    """thr[..., s] = the magnitude |a| of rank ranks[s] within segment s; 0 where the rank is 0 or the segment empty.

    Rank 0 keeps every entry, so no selection is made. NaN ranks above Inf. No gradient flows through a threshold.

    Args:
        logits: (..., N) float.
        offsets: S + 1 ascending segment borders, the last at most N.
        ranks: (S,) int64, see `kept_rank`.

    Returns:
        (..., S) thresholds on |a|, dtype of logits.
    """
    magnitude = logits.detach().abs()
    thresholds = magnitude.new_zeros(*logits.shape[:-1], len(offsets) - 1)
    compiling = torch.compiler.is_compiling()  # where ranks have no values yet: kthvalue needs them, a sort does not
    # Where a GPU has to be deterministic kthvalue is refused for the sake of its indices, which are not used here.
    sorting = logits.is_cuda and torch.are_deterministic_algorithms_enabled()
    each: Any = ranks if compiling else ranks.tolist()
    for s, rank in enumerate(each):
        segment = magnitude[..., offsets[s] : offsets[s + 1]]
        if segment.shape[-1] == 0:
            continue
        if compiling:
            ranked = segment.sort(dim=-1).values.index_select(-1, rank[None])[..., 0]
            thresholds[..., s] = torch.where(rank > 0, ranked, 0.0)
        elif rank > 0 and sorting:
            thresholds[..., s] = segment.sort(dim=-1).values[..., rank]
        elif rank > 0:
            thresholds[..., s] = segment.kthvalue(rank + 1, dim=-1).values
    return thresholds


def semi_binary_mask(logits: Tensor, threshold: Tensor) -> Tensor:
    """m = |tanh a| where |a| >= thr, else 0; dm/da = sign(a) (1 - tanh(a)^2) on kept entries.

    NaN logits are kept and give NaN masks, so that they show; a NaN threshold keeps everything.

    Args:
        logits: any shape, float.
        threshold: broadcasts against logits, from `mask_thresholds`.

    Returns:
        Mask of the shape of logits, values in [0, 1].
    """
    dropped = logits.detach().abs() < threshold
    return torch.where(dropped, 0.0, logits.tanh().abs())


def masked_weights(
    weights: Sequence[Tensor], logits: Tensor, thresholds: Tensor, offsets: Sequence[int]
) -> list[Tensor]:
    """W_s * m_s for the first len(weights) segments, all layers at once.

    Args:
        weights: tensors of any shape, weights[s].numel() == offsets[s + 1] - offsets[s].
        logits: (N,) flat logits of one task.
        thresholds: (S,).
        offsets: S + 1 segment borders, S >= len(weights).

    Returns:
        One masked tensor per weight, each of its weight's shape.
    """
    return [
        weight * semi_binary_mask(logits[offsets[s] : offsets[s + 1]].view(weight.shape), thresholds[s])
        for s, weight in enumerate(weights)
    ]


def weight_drift(
    weights: Sequence[Tensor],
    previous: Tensor,
    offsets: Sequence[int],
    norm: int = 1,
    logits: Tensor | None = None,
    thresholds: Tensor | None = None,
) -> Tensor:
    """D = sum_s || (W_s - W_prev_s) * m_s ||_norm; without logits, m = 1.

    The mask is not detached: its gradient reaches the hypernetwork. The 2-norm's gradient at 0 is 0.

    Args:
        weights: S tensors; previous: (N,) flat weights as the task began; offsets: S + 1 borders.
        norm: 1 or 2.
        logits: (N,) and thresholds: (S,), both or neither.

    Returns:
        Scalar.
    """
    total = previous.new_zeros(())
    limits: Any = thresholds  # there where logits are
    for s, weight in enumerate(weights):
        segment = slice(offsets[s], offsets[s + 1])
        change = weight.flatten() - previous[segment]
        if logits is not None:
            change = change * semi_binary_mask(logits[segment], limits[s])
        total = total + torch.linalg.vector_norm(change, norm)
    return total


def masked_weights_drift(
    weights: Sequence[Tensor],
    logits: Tensor,
    thresholds: Tensor,
    offsets: Sequence[int],
    previous: Tensor,
    norm: int = 1,
) -> tuple[list[Tensor], Tensor]:
    """W_s * m_s and D = sum_s || (W_s - W_prev_s) * m_s ||_norm: what a training step needs of the mask, in one pass.

    Args:
        as those of `masked_weights`, here one weight per segment, and of `weight_drift`.

    Returns:
        What `masked_weights` and `weight_drift` return.
    """
    masked = masked_weights(weights, logits, thresholds, offsets)
    return masked, weight_drift(weights, previous, offsets, norm, logits, thresholds)


def mask_overlap(logits: Tensor, thresholds: Tensor, offsets: Sequence[int]) -> Tensor:
    """c[s, i, j] = the number of entries in segment s that the masks of tasks i and j both keep.

    Summed over s it is the overlap of whole masks; c[s, i, i] counts what task i keeps. What is kept is as in
    `semi_binary_mask`. No gradient flows through a count.

    Args:
        logits: (T, N) flat logits of T tasks; thresholds: (T, S) on |a|; offsets: S + 1 segment borders.

    Returns:
        (S, T, T) int64, symmetric in the tasks.
    """
    overlap = []
    for s in range(len(offsets) - 1):
        magnitude = logits.detach()[:, offsets[s] : offsets[s + 1]].abs()
        kept = (~(magnitude < thresholds[:, s, None])).double()  # whose products count exactly, up to 2^53
        overlap.append(kept @ kept.t())
    tasks = logits.shape[0]
    return torch.stack(overlap).long() if overlap else logits.new_empty(0, tasks, tasks, dtype=torch.int64)
