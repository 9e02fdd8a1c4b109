"""Of the masked layers, and of choosing a task by their logits."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from ...errors import InputError
from ..task_rows import TaskRows
from .checks import has_one_entry, has_shape, require

Size = int | tuple[int, int]


def pair(name: str, value: Size, least: int) -> tuple[int, int]:
    """A number for both directions, or two, as (height, width). Raises InputError on anything else."""
    both = (value, value) if isinstance(value, int) else value
    if isinstance(both, str) or len(both) != 2 or min(both) < least:
        raise InputError(f"{name} must be a number of at least {least}, or two, not {value!r}")
    return both[0], both[1]


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if weight.dim() != 2:
        raise InputError(f"weight must be (out, in), not {tuple(weight.shape)}")
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        shapes = f"for a weight of {tuple(weight.shape)}, not {tuple(x.shape)}"
        raise InputError(f"x must be (..., {weight.shape[1]}) {shapes}")
    if bias is not None:
        has_shape("bias", bias, (weight.shape[0],))


def masked_linear(x: Tensor, weight: Tensor, logits: Tensor, threshold: Tensor, bias: Tensor | None) -> None:
    _linear(x, weight, bias)
    has_shape("logits", logits, tuple(weight.shape))
    has_one_entry("threshold", threshold)


def _conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Size, padding: Size, dilation: Size, groups: int
) -> None:
    if weight.dim() != 4 or 0 in weight.shape[:1] + weight.shape[2:]:
        shape = tuple(weight.shape)
        raise InputError(f"weight must be (out, in / groups, kh, kw), out, kh and kw at least 1, not {shape}")
    if x.dim() != 4:
        raise InputError(f"x must be (batch, in, height, width), not {tuple(x.shape)}")
    if groups < 1 or weight.shape[0] % groups:
        raise InputError(f"groups must divide the {weight.shape[0]} output channels, {groups} does not")
    if x.shape[1] != weight.shape[1] * groups:
        raise InputError(f"x must have {weight.shape[1] * groups} channels for this weight, not {x.shape[1]}")
    if bias is not None:
        has_shape("bias", bias, (weight.shape[0],))
    pair("stride", stride, 1)
    pads, dilations = pair("padding", padding, 0), pair("dilation", dilation, 1)
    kernel = tuple(weight.shape[2:])
    spans = zip(x.shape[2:], kernel, pads, dilations, strict=True)
    if any(size + 2 * pad < d * (k - 1) + 1 for size, k, pad, d in spans):
        raise InputError(f"a kernel of {kernel} does not fit into an input of {tuple(x.shape[2:])}")


def masked_conv2d(
    x: Tensor,
    weight: Tensor,
    logits: Tensor,
    threshold: Tensor,
    bias: Tensor | None,
    stride: Size,
    padding: Size,
    dilation: Size,
    groups: int,
) -> None:
    _conv2d(x, weight, bias, stride, padding, dilation, groups)
    has_shape("logits", logits, tuple(weight.shape))
    has_one_entry("threshold", threshold)


def chunk_logits(hidden: Tensor, output_weight: Tensor, output_bias: Tensor, start: int, shape: Sequence[int]) -> None:
    """Also what the chunked layers need of their hypernetwork."""
    if hidden.dim() != 2 or output_weight.dim() != 2 or hidden.shape[1] != output_weight.shape[1]:
        shapes = f"{tuple(hidden.shape)} and {tuple(output_weight.shape)}"
        raise InputError(f"hidden must be (chunks, H) and output_weight (C, H), not {shapes}")
    has_shape("output_bias", output_bias, (output_weight.shape[0],))
    generated, stop = hidden.shape[0] * output_weight.shape[0], start + prod(shape)
    if start < 0 or stop > generated:
        raise InputError(f"entries {start} to {stop} lie outside the {generated} that the chunks generate")


def chunk_masked_linear(
    x: Tensor,
    weight: Tensor,
    hidden: Tensor,
    output_weight: Tensor,
    output_bias: Tensor,
    start: int,
    threshold: Tensor,
    bias: Tensor | None,
) -> None:
    _linear(x, weight, bias)
    chunk_logits(hidden, output_weight, output_bias, start, weight.shape)
    has_one_entry("threshold", threshold)


def chunk_masked_conv2d(
    x: Tensor,
    weight: Tensor,
    hidden: Tensor,
    output_weight: Tensor,
    output_bias: Tensor,
    start: int,
    threshold: Tensor,
    bias: Tensor | None,
    stride: Size,
    padding: Size,
    dilation: Size,
    groups: int,
) -> None:
    _conv2d(x, weight, bias, stride, padding, dilation, groups)
    chunk_logits(hidden, output_weight, output_bias, start, weight.shape)
    has_one_entry("threshold", threshold)


def task_batched_linear(
    x: Tensor,
    weight: Tensor,
    logits: Tensor,
    thresholds: Tensor,
    task_ids: Tensor | TaskRows | None,
    bias: Tensor | None,
) -> None:
    if weight.dim() != 2:
        raise InputError(f"weight must be (out, in), not {tuple(weight.shape)}")
    if logits.dim() != 3:
        raise InputError(f"logits must be (tasks, out, in), not {tuple(logits.shape)}")
    tasks, (outputs, inputs) = len(logits), weight.shape
    has_shape("logits", logits, (tasks, outputs, inputs))
    has_shape("thresholds", thresholds, (tasks,))
    own_rows = x.dim() == 3 and task_ids is None and x.shape[0] == tasks
    if not (x.dim() == 2 or own_rows) or x.shape[-1] != inputs:
        wanted = f"(batch, {inputs}), or ({tasks}, batch, {inputs}) without task_ids"
        raise InputError(f"x must be {wanted}, not {tuple(x.shape)}")
    if bias is not None and tuple(bias.shape) not in ((outputs,), (tasks, outputs)):
        raise InputError(f"bias must be ({outputs},) or ({tasks}, {outputs}), not {tuple(bias.shape)}")
    ids = task_ids.ids if isinstance(task_ids, TaskRows) else task_ids
    if ids is not None:
        if ids.dtype != torch.int64:
            raise InputError(f"task_ids must be int64, not {ids.dtype}")
        has_shape("task_ids", ids, (x.shape[0],))
    if isinstance(task_ids, TaskRows):
        has_shape("order", TaskRows.of(task_ids, tasks).order, (x.shape[0],))


def sorted_rows(task_ids: Tensor | None, order: Tensor | None, begins: Tensor | None) -> TaskRows | None:
    """The parts of a `TaskRows`, given one by one, as `task_batched_linear` takes them."""
    if task_ids is None or order is None or begins is None:
        require(task_ids is order is begins, "task_ids, order and begins go together, one is missing")
        return None
    return TaskRows(task_ids, order, begins)


def known_tasks(task_ids: Tensor, tasks: int) -> None:
    """Looks at the ids' values, for which a GPU has to be waited for."""
    require(bool(((task_ids >= 0) & (task_ids < tasks)).all()), f"task_ids must be 0 to {tasks - 1}")


def entropy_select(logits: Tensor) -> None:
    if logits.dim() != 3 or 0 in (logits.shape[0], logits.shape[2]) or not logits.is_floating_point():
        wanted = "float (T, batch, classes) with T of 1 or more and a class"
        raise InputError(f"logits must be {wanted}, not {logits.dtype} {tuple(logits.shape)}")
