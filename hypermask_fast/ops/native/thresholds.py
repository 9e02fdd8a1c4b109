"""Exact selection of each segment's threshold."""

from . import operator


def mask_thresholds(logits, offsets, ranks):
    return _mask_thresholds_operator(logits.detach().contiguous(), offsets, ranks.contiguous())


_mask_thresholds_operator = operator(
    "mask_thresholds", lambda logits, offsets, ranks: logits.new_empty(*logits.shape[:-1], len(offsets) - 1)
)
