"""Of the ops over masks and the target's weights, and of the operators that make their gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import InputError
from .checks import ascending, first_segments, has_one_entry, has_shape, one_per_segment, require


def mask_thresholds(logits: Tensor, offsets: Sequence[int], ranks: Tensor) -> None:
    if logits.dim() == 0 or ranks.dtype != torch.int64:
        raise InputError(f"logits must be (..., N) and ranks int64, not {tuple(logits.shape)} and {ranks.dtype}")
    ascending(offsets, logits.shape[-1])
    has_shape("ranks", ranks, (len(offsets) - 1,))


def kept_ranks(logits: Tensor, offsets: Sequence[int], ranks: Tensor) -> None:
    """Looks at the values of `mask_thresholds`' ranks, where that is no wait."""
    if ranks.device.type == "cpu":
        for s, rank in enumerate(ranks.tolist()):
            size = offsets[s + 1] - offsets[s]
            if not 0 <= rank < (size or 1):
                raise InputError(f"rank {rank} is outside segment {s} of {size} entries")


def semi_binary_mask(logits: Tensor, threshold: Tensor) -> None:
    missing = logits.dim() - threshold.dim()
    if missing < 0 or any(n not in (1, logits.shape[missing + i]) for i, n in enumerate(threshold.shape)):
        raise InputError(f"threshold of {tuple(threshold.shape)} does not broadcast to logits of {tuple(logits.shape)}")


def masked_weights(weights: Sequence[Tensor], logits: Tensor, thresholds: Tensor, offsets: Sequence[int]) -> None:
    first_segments(weights, offsets, logits)
    one_per_segment(thresholds, offsets)


def weight_drift(
    weights: Sequence[Tensor],
    previous: Tensor,
    offsets: Sequence[int],
    norm: int,
    logits: Tensor | None,
    thresholds: Tensor | None,
) -> None:
    if norm not in (1, 2):
        raise InputError(f"norm must be 1 or 2, not {norm!r}")
    first_segments(weights, offsets, previous)
    if logits is None or thresholds is None:
        require(logits is thresholds, "logits and thresholds go together, one is missing")
        return
    first_segments(weights, offsets, logits)
    one_per_segment(thresholds, offsets)


def masked_weights_drift(
    weights: Sequence[Tensor],
    logits: Tensor,
    thresholds: Tensor,
    offsets: Sequence[int],
    previous: Tensor,
    norm: int,
) -> None:
    weight_drift(weights, previous, offsets, norm, logits, thresholds)


def mask_overlap(logits: Tensor, thresholds: Tensor, offsets: Sequence[int]) -> None:
    if logits.dim() != 2:
        raise InputError(f"logits must be (T, N), not {tuple(logits.shape)}")
    ascending(offsets, logits.shape[1])
    has_shape("thresholds", thresholds, (logits.shape[0], len(offsets) - 1))


def masked_weights_gradients(grads: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
    """Of W_s * m_s, one per weight."""
    if len(grads) != len(weights):
        raise InputError(f"{len(weights)} weights need as many grads, not {len(grads)}")
    for s, (grad, weight) in enumerate(zip(grads, weights, strict=True)):
        if grad.shape != weight.shape:
            raise InputError(f"grads {s} must have shape {tuple(weight.shape)}, not {tuple(grad.shape)}")


def weight_drift_gradient(grad: Tensor, norms: Tensor, weights: Sequence[Tensor]) -> None:
    """Of the drift, whose norm of every weight the forward pass has kept."""
    has_one_entry("grad", grad)
    has_shape("norms", norms, (len(weights),))
