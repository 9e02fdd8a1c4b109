"""The masked layers, and which task's network is the surest."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..task_rows import TaskRows, rows_of_tasks
from .hypernetwork import chunk_logits
from .masks import semi_binary_mask


def masked_linear(x: Tensor, weight: Tensor, logits: Tensor, threshold: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x (W * m)^T + b.

    Args:
        x: (..., in); weight, logits: (out, in); threshold: one entry; bias: (out,), used as it is.

    Returns:
        (..., out).
    """
    return F.linear(x, weight * semi_binary_mask(logits, threshold), bias)


def masked_conv2d(
    x: Tensor,
    weight: Tensor,
    logits: Tensor,
    threshold: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Tensor:
    """y = conv2d(x, W * m) + b.

    Args:
        x: (batch, in, height, width); weight, logits: (out, in / groups, kh, kw); threshold: one entry;
            bias: (out,), used as it is.

    Returns:
        (batch, out, height', width').
    """
    return F.conv2d(x, weight * semi_binary_mask(logits, threshold), bias, stride, padding, dilation, groups)


def chunk_masked_linear(
    x: Tensor,
    weight: Tensor,
    hidden: Tensor,
    output_weight: Tensor,
    output_bias: Tensor,
    start: int,
    threshold: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """y = x (W * m(a))^T + b with a = chunk_logits(hidden, output_weight, output_bias, start, W.shape).

    Args:
        x: (..., in); weight: (out, in); hidden: (chunks, H); output_weight: (C, H); output_bias: (C,).
        start: offset of the weight in the hypernetwork's flat output; threshold: one entry, on |a|.
        bias: (out,), used as it is.

    Returns:
        (..., out).
    """
    logits = chunk_logits(hidden, output_weight, output_bias, start, weight.shape)
    return masked_linear(x, weight, logits, threshold, bias)


def chunk_masked_conv2d(
    x: Tensor,
    weight: Tensor,
    hidden: Tensor,
    output_weight: Tensor,
    output_bias: Tensor,
    start: int,
    threshold: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Tensor:
    """y = conv2d(x, W * m(a)) + b with a = chunk_logits(hidden, output_weight, output_bias, start, W.shape).

    Args:
        x: (batch, in, height, width); weight: (out, in / groups, kh, kw); the rest as in `chunk_masked_linear`.

    Returns:
        (batch, out, height', width').
    """
    logits = chunk_logits(hidden, output_weight, output_bias, start, weight.shape)
    return masked_conv2d(x, weight, logits, threshold, bias, stride, padding, dilation, groups)


def task_batched_linear(
    x: Tensor,
    weight: Tensor,
    logits: Tensor,
    thresholds: Tensor,
    task_ids: Tensor | TaskRows | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """y_b = x_b (W * m_t)^T + b_t with t = task_ids[b]; without task_ids every task over every row.

    Args:
        x: (B, in), or (T, B, in) without task_ids where each task has its own rows; weight: (out, in), shared.
        logits: (T, out, in); thresholds: (T,); task_ids: (B,) int64, any order, or `TaskRows`.
        bias: (out,) used as it is, or (T, out) with each task's mask already applied.

    Returns:
        (B, out); without task_ids (T, B, out).

    Raises:
        InputError: a task id is not one of 0 to T - 1 (in a compiled graph, which can't look at ids, its row is NaN).
    """
    masked = weight * semi_binary_mask(logits, thresholds[:, None, None])
    y = x @ masked.transpose(1, 2)
    if bias is not None:
        y = y + (bias if bias.dim() == 1 else bias[:, None])
    return y if task_ids is None else rows_of_tasks(y, task_ids)


def entropy_select(logits: Tensor) -> Tensor:
    """argmin over tasks of the softmax entropy -sum_c p log p; the lowest index among equals, NaN counts as Inf.

    Args:
        logits: (T, batch, classes) class logits of every task's masked network.

    Returns:
        (batch,) int64 task per sample.
    """
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    entropy = -torch.where(p == 0, 0.0, p * log_p).sum(-1)  # 0 log 0 = 0
    return entropy.nan_to_num(nan=math.inf).argmin(0)
