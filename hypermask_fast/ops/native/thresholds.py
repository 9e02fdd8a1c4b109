"""Exact selection of each segment's threshold."""

from . import Served, constant, operator

_mask_thresholds_operator = operator(
    "mask_thresholds", lambda logits, offsets, ranks: logits.new_empty(*logits.shape[:-1], len(offsets) - 1)
)
mask_thresholds = Served(
    _mask_thresholds_operator, lambda logits, offsets, ranks: (constant(logits), offsets, ranks.contiguous())
)
