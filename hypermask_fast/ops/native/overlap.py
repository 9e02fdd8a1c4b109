"""How much the masks of tasks have in common."""

import torch

from . import operator


def mask_overlap(logits, thresholds, offsets):
    return torch.ops.hypermask_native.mask_overlap(
        logits.detach().contiguous(), thresholds.detach().contiguous(), offsets
    )


def mask_overlap_condition(logits, thresholds, offsets):
    return "" if logits.dtype == thresholds.dtype else "logits and thresholds differ in dtype"


def _shapes(logits, thresholds, offsets):
    tasks, segments = thresholds.shape
    return logits.new_empty(segments, tasks, tasks, dtype=torch.int64)


operator("mask_overlap", _shapes)
