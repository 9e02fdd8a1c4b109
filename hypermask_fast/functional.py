"""The ops as functions, for those who write their own layers; each is defined in `reference`."""

from .reference import (
    entropy_select,
    hypernet_logits,
    kept_rank,
    mask_thresholds,
    masked_conv2d,
    masked_linear,
    masked_weights,
    output_drift,
    semi_binary_mask,
    weight_drift,
)

__all__ = [
    "entropy_select",
    "hypernet_logits",
    "kept_rank",
    "mask_thresholds",
    "masked_conv2d",
    "masked_linear",
    "masked_weights",
    "output_drift",
    "semi_binary_mask",
    "weight_drift",
]
