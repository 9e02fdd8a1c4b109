"""The layer ops in two steps: W * m by the fastest backend there is, then the product by PyTorch's own libraries.

What `paths` calls "mask first", on every device and dtype.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import InputError
from .. import reference
from ..native import masks
from ..registry import AUTO, OPS, PLAIN, problem, requested
from ..task_rows import TaskRows, rows_of_tasks

_FEW = 1 << 19  # products of every row with every task, one after another
_FEW_ROWS = 256  # whose ids Python looks at
_MASKING = 8  # rows, whose products take as long as to mask the weight


def masked_weight(weight: Tensor, logits: Tensor, threshold: Tensor) -> Tensor:
    """W * m of one tensor, by the backend that `masked_weights` would choose."""
    if _on_the_cpu(weight, logits, threshold):  # by its operator for one tensor: half the cost of a call
        return masks.masked_weight(weight, logits, threshold)
    (masked,) = OPS["masked_weights"]([weight], logits.reshape(-1), threshold.reshape(1), [0, weight.numel()])
    return masked


def _on_the_cpu(weight: Tensor, logits: Tensor, threshold: Tensor) -> bool:
    """Whether the extension serves these on the CPU and nobody asks for another backend; compiled graphs have the op
    itself."""
    if weight.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    same = weight.dtype == logits.dtype == threshold.dtype == torch.float32
    return same and requested() in (AUTO, PLAIN, "cpu") and not problem("cpu")


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


def _chunk_logits(hidden: Tensor, output_weight: Tensor, output_bias: Tensor, start: int, shape: torch.Size) -> Tensor:
    """`reference.chunk_logits` by the same product, in the logits' own dtype."""
    if torch.is_autocast_enabled(hidden.device.type):
        with torch.autocast(hidden.device.type, enabled=False):  # their thresholds come from logits as stored
            return _chunk_logits(hidden, output_weight, output_bias, start, shape)
    generated = F.linear(hidden, output_weight, output_bias).view(-1)
    size = shape.numel()
    return (generated if generated.shape[0] == size else generated.narrow(0, start, size)).view(shape)


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
    if _are_few(x, weight, tasks):
        return _by_all_tasks(x, weight, logits, thresholds, task_ids, bias)
    rows = TaskRows.of(task_ids, tasks)
    *counts, unknown = rows.begins.diff().tolist()
    if unknown:
        raise InputError(f"task_ids must be 0 to {tasks - 1}")
    groups = x.index_select(0, rows.order).split(counts)
    outputs = [_of_task(group, weight, logits, thresholds, bias, t) for t, group in enumerate(groups) if counts[t] > 0]
    return torch.cat(outputs).index_select(0, rows.order.argsort())


def _are_few(x: Tensor, weight: Tensor, tasks: int) -> bool:
    """Whether the number of calls decides the time: then one product of every row with every task is the quicker way.
    Not under autocast, which rounds a product and its bias together."""
    rows = len(x)
    few = rows <= _FEW_ROWS and tasks * (rows + _MASKING) * weight.numel() <= _FEW
    return few and not torch.is_autocast_enabled(x.device.type)


def _by_all_tasks(
    x: Tensor, weight: Tensor, logits: Tensor, thresholds: Tensor, task_ids: Tensor | TaskRows, bias: Tensor | None
) -> Tensor:
    """Every row under the masks of all tasks that the rows have, of which it keeps its own task's result."""
    known, tasks = (task_ids.ids if isinstance(task_ids, TaskRows) else task_ids).tolist(), len(logits)
    present = sorted({*known})
    if present[0] < 0 or present[-1] >= tasks:
        raise InputError(f"task_ids must be 0 to {tasks - 1}")
    if len(present) < tasks:
        chosen = torch.tensor(present, device=logits.device)
        logits, thresholds = logits.index_select(0, chosen), thresholds.index_select(0, chosen.to(thresholds.device))
        bias = bias.index_select(0, chosen) if bias is not None and bias.dim() == 2 else bias
        tasks, known = len(present), [present.index(task) for task in known]
    masked = weight * OPS["semi_binary_mask"](logits, thresholds[:, None, None])
    every = F.linear(x, masked.flatten(0, 1), None if bias is None or bias.dim() == 1 else bias.flatten())
    mine = torch.tensor([row * tasks + task for row, task in enumerate(known)], device=x.device)
    y = every.view(len(known) * tasks, len(weight)).index_select(0, mine)
    return y if bias is None or bias.dim() == 2 else y + bias


def _of_task(x: Tensor, weight: Tensor, logits: Tensor, thresholds: Tensor, bias: Tensor | None, task: int) -> Tensor:
    if bias is not None and bias.dim() == 2:
        bias = bias[task]
    return masked_linear(x, weight, logits[task], thresholds[task], bias)
