"""The layer ops in two steps: W * m by the fastest backend there is, then the product by PyTorch's own libraries.

What `paths` calls "mask first", on every device and dtype.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import InputError
from .. import reference
from ..registry import OPS
from ..task_rows import TaskRows, rows_of_tasks


def masked_weight(weight: Tensor, logits: Tensor, threshold: Tensor) -> Tensor:
    """W * m of one tensor."""
    (masked,) = OPS["masked_weights"]([weight], logits.reshape(-1), threshold.reshape(1), [0, weight.numel()])
    return masked


def masked_linear(x, weight, logits, threshold, bias):
    """See `reference.masked_linear`."""
    return F.linear(x, masked_weight(weight, logits, threshold), bias)


def masked_conv2d(x, weight, logits, threshold, bias, stride, padding, dilation, groups):
    """See `reference.masked_conv2d`."""
    return F.conv2d(x, masked_weight(weight, logits, threshold), bias, stride, padding, dilation, groups)


def chunk_masked_linear(x, weight, hidden, output_weight, output_bias, start, threshold, bias):
    """See `reference.chunk_masked_linear`."""
    logits = _chunk_logits(hidden, output_weight, output_bias, start, weight.shape)
    return masked_linear(x, weight, logits, threshold, bias)


def chunk_masked_conv2d(x, weight, hidden, output_weight, output_bias, start, threshold, *rest):
    """See `reference.chunk_masked_conv2d`."""
    logits = _chunk_logits(hidden, output_weight, output_bias, start, weight.shape)
    return masked_conv2d(x, weight, logits, threshold, *rest)


def _chunk_logits(hidden: Tensor, *args) -> Tensor:
    with torch.autocast(hidden.device.type, enabled=False):  # their thresholds come from logits as stored
        return reference.chunk_logits(hidden, *args)


def task_batched_linear(x, weight, logits, thresholds, task_ids, bias):
    """See `reference.task_batched_linear`: one product per task, over the rows that the task has.

    In a compiled graph nobody knows how many that are: there every task meets every row, and each row keeps its own.

    Raises:
        InputError: a task id is not one of 0 to T - 1 (in a compiled graph its row is NaN).
    """
    tasks = len(logits)
    if tasks == 0 or x.shape[-2] == 0:  # nothing to arrange, and every argument has its gradient of 0
        return reference.task_batched_linear(x, weight, logits, thresholds, task_ids, bias)
    if task_ids is None:
        rows = x.expand(tasks, *x.shape) if x.dim() == 2 else x
        return torch.stack([_of_task(x_t, weight, logits, thresholds, bias, t) for t, x_t in enumerate(rows)])
    if torch.compiler.is_compiling():
        ids = task_ids.ids if isinstance(task_ids, TaskRows) else task_ids
        return rows_of_tasks(task_batched_linear(x, weight, logits, thresholds, None, bias), ids)
    rows = TaskRows.of(task_ids, tasks)
    *counts, unknown = rows.begins.diff().tolist()
    if unknown:
        raise InputError(f"task_ids must be 0 to {tasks - 1}")
    groups = [(t, group) for t, group in enumerate(x[rows.order].split(counts)) if len(group) > 0]
    outputs = torch.cat([_of_task(group, weight, logits, thresholds, bias, t) for t, group in groups])
    return outputs[rows.order.argsort()]


def _of_task(x: Tensor, weight: Tensor, logits: Tensor, thresholds: Tensor, bias: Tensor | None, task: int) -> Tensor:
    if bias is not None and bias.dim() == 2:
        bias = bias[task]
    return masked_linear(x, weight, logits[task], thresholds[task], bias)
