"""What the ops' arguments must be: one rule per op, judged once for every backend, in the same words.

A rule takes all of its op's arguments by position and raises `InputError` before anything is computed or changed. It
says what the definition in `reference` needs. What a single backend can't serve is for that backend's offer to say.
"""

from collections.abc import Iterable, Iterator, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .task_rows import TaskRows

Size = int | tuple[int, int]


def tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """All tensors among the values and within their lists and tuples, in order."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors(value)


def one_device(op: str, first: Tensor, values: Iterable[Any]) -> None:
    """Raises InputError unless all tensors are where `first` is; scalars may also be on the CPU."""
    for tensor in tensors(values):
        if tensor.device != first.device and (tensor.dim() > 0 or tensor.device.type != "cpu"):
            raise InputError(f"{op}: all tensors must be on one device, not on {first.device} and {tensor.device}")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


def _shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise InputError(f"{name} must have shape {shape}, not {tuple(tensor.shape)}")


def _one_entry(name: str, tensor: Tensor) -> None:
    if tensor.numel() != 1:
        raise InputError(f"{name} must have one entry, not {tensor.numel()}")


def _offsets(offsets: Sequence[int], entries: int) -> None:
    borders = list(offsets)
    if not borders or borders[0] < 0 or borders != sorted(borders) or borders[-1] > entries:
        raise InputError(f"offsets must ascend from 0 or more to at most {entries} entries, not {borders}")


def _segments(weights: Sequence[Tensor], offsets: Sequence[int], flat: Tensor) -> None:
    """The weights are the first segments of the flat tensor."""
    if flat.dim() != 1:
        raise InputError(f"logits and previous weights must be flat, not of shape {tuple(flat.shape)}")
    _offsets(offsets, flat.shape[0])
    if len(weights) >= len(offsets):
        raise InputError(f"{len(weights)} weights need {len(weights) + 1} offsets, not {len(offsets)}")
    for s, weight in enumerate(weights):
        size = offsets[s + 1] - offsets[s]
        if weight.numel() != size:
            raise InputError(f"weights {s} has {weight.numel()} entries, its segment {size}")


def _one_per_segment(thresholds: Tensor, offsets: Sequence[int]) -> None:
    if tuple(thresholds.shape) != (len(offsets) - 1,):
        raise InputError(f"thresholds must be one per segment, ({len(offsets) - 1},), not {tuple(thresholds.shape)}")


# -- masks -------------------------------------------------------------------------------------------------------------


def mask_thresholds(logits: Tensor, offsets: Sequence[int], ranks: Tensor) -> None:
    if logits.dim() == 0 or ranks.dtype != torch.int64:
        raise InputError(f"logits must be (..., N) and ranks int64, not {tuple(logits.shape)} and {ranks.dtype}")
    _offsets(offsets, logits.shape[-1])
    _shape("ranks", ranks, (len(offsets) - 1,))


def kept_ranks(logits: Tensor, offsets: Sequence[int], ranks: Tensor) -> None:
    """Looks at the values of `mask_thresholds`' ranks, where that is no wait."""
    if ranks.device.type == "cpu":
        for s, rank in enumerate(ranks.tolist()):
            size = offsets[s + 1] - offsets[s]
            if not 0 <= rank < max(size, 1):
                raise InputError(f"rank {rank} is outside segment {s} of {size} entries")


def semi_binary_mask(logits: Tensor, threshold: Tensor) -> None:
    missing = logits.dim() - threshold.dim()
    if missing < 0 or any(n not in (1, logits.shape[missing + i]) for i, n in enumerate(threshold.shape)):
        raise InputError(f"threshold of {tuple(threshold.shape)} does not broadcast to logits of {tuple(logits.shape)}")


def masked_weights(weights: Sequence[Tensor], logits: Tensor, thresholds: Tensor, offsets: Sequence[int]) -> None:
    _segments(weights, offsets, logits)
    _one_per_segment(thresholds, offsets)


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
    _segments(weights, offsets, previous)
    if logits is None or thresholds is None:
        _require(logits is thresholds, "logits and thresholds go together, one is missing")
        return
    _segments(weights, offsets, logits)
    _one_per_segment(thresholds, offsets)


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
    _offsets(offsets, logits.shape[1])
    _shape("thresholds", thresholds, (logits.shape[0], len(offsets) - 1))


# -- layers ------------------------------------------------------------------------------------------------------------


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if weight.dim() != 2:
        raise InputError(f"weight must be (out, in), not {tuple(weight.shape)}")
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        shapes = f"for a weight of {tuple(weight.shape)}, not {tuple(x.shape)}"
        raise InputError(f"x must be (..., {weight.shape[1]}) {shapes}")
    if bias is not None:
        _shape("bias", bias, (weight.shape[0],))


def masked_linear(x: Tensor, weight: Tensor, logits: Tensor, threshold: Tensor, bias: Tensor | None) -> None:
    _linear(x, weight, bias)
    _shape("logits", logits, tuple(weight.shape))
    _one_entry("threshold", threshold)


def pair(name: str, value: Size, least: int) -> tuple[int, int]:
    """A number for both directions, or two, as (height, width). Raises InputError on anything else."""
    both = (value, value) if isinstance(value, int) else value
    if isinstance(both, str) or len(both) != 2 or min(both) < least:
        raise InputError(f"{name} must be a number of at least {least}, or two, not {value!r}")
    return both[0], both[1]


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
        _shape("bias", bias, (weight.shape[0],))
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
    _shape("logits", logits, tuple(weight.shape))
    _one_entry("threshold", threshold)


def chunk_logits(hidden: Tensor, output_weight: Tensor, output_bias: Tensor, start: int, shape: Sequence[int]) -> None:
    """Also what the chunked layers need of their hypernetwork."""
    if hidden.dim() != 2 or output_weight.dim() != 2 or hidden.shape[1] != output_weight.shape[1]:
        shapes = f"{tuple(hidden.shape)} and {tuple(output_weight.shape)}"
        raise InputError(f"hidden must be (chunks, H) and output_weight (C, H), not {shapes}")
    _shape("output_bias", output_bias, (output_weight.shape[0],))
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
    _one_entry("threshold", threshold)


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
    _one_entry("threshold", threshold)


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
    _shape("logits", logits, (tasks, outputs, inputs))
    _shape("thresholds", thresholds, (tasks,))
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
        _shape("task_ids", ids, (x.shape[0],))
    if isinstance(task_ids, TaskRows):
        _shape("order", TaskRows.of(task_ids, tasks).order, (x.shape[0],))


# -- hypernetwork ------------------------------------------------------------------------------------------------------


def hypernet_logits(hidden: Tensor, weight: Tensor, bias: Tensor, size: int) -> None:
    if hidden.dim() != 3 or weight.dim() != 2:
        shapes = f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
        raise InputError(f"hidden must be (T, chunks, H) and weight (chunk_size, H), not {shapes}")
    _shape("hidden", hidden, (*hidden.shape[:2], weight.shape[1]))
    _shape("bias", bias, (weight.shape[0],))
    entries = hidden.shape[1] * weight.shape[0]
    if not 0 <= size <= entries:
        raise InputError(f"size must be 0 to chunks * chunk_size = {entries}, not {size}")


def output_drift(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> None:
    if targets.dim() != 2:
        raise InputError(f"targets must be (T, N), not {tuple(targets.shape)}")
    hypernet_logits(hidden, weight, bias, 0)
    entries = hidden.shape[1] * weight.shape[0]
    if targets.shape[1] > entries:
        raise InputError(f"targets must be (T, N) with N at most {entries}, not {tuple(targets.shape)}")
    _shape("targets", targets, (hidden.shape[0], targets.shape[1]))


def chunked_output_drift(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    old_hidden: Tensor,
    old_weight: Tensor,
    old_bias: Tensor,
    size: int,
) -> None:
    hypernet_logits(hidden, weight, bias, size)
    _shape("old_hidden", old_hidden, tuple(hidden.shape))
    _shape("old_weight", old_weight, tuple(weight.shape))
    _shape("old_bias", old_bias, tuple(bias.shape))


def hypernet_adam(
    hidden: Tensor,
    grad_logits: Tensor,
    targets: Tensor,
    drift_weight: Tensor,
    weight: Tensor,
    bias: Tensor,
    weight_m: Tensor,
    weight_v: Tensor,
    bias_m: Tensor,
    bias_v: Tensor,
    step: Tensor,
    lr: Tensor,
    *settings: float,
) -> None:
    output_residuals(hidden, weight, bias, targets)
    _shape("grad_logits", grad_logits, (weight.shape[0],))
    _moments(weight, weight_m, weight_v)
    for name, moment in (("bias_m", bias_m), ("bias_v", bias_v)):
        _shape(name, moment, tuple(bias.shape))
        if moment.dtype != weight.dtype or bias.dtype != weight.dtype:
            raise InputError(f"bias and {name} must be {weight.dtype}, as weight, not {bias.dtype} and {moment.dtype}")
    for name, one in (("drift_weight", drift_weight), ("step", step), ("lr", lr)):
        _one_entry(name, one)


def _moments(weight: Tensor, weight_m: Tensor, weight_v: Tensor) -> None:
    """Of weight's dtype, or both of bfloat16 beside float32."""
    in_half = weight.dtype == torch.float32 and weight_m.dtype == torch.bfloat16
    dtype = torch.bfloat16 if in_half else weight.dtype
    for name, moment in (("weight_m", weight_m), ("weight_v", weight_v)):
        _shape(name, moment, tuple(weight.shape))
        if moment.dtype != dtype:
            why = "as weight_m" if in_half else "as weight"
            raise InputError(f"{name} must be {dtype}, {why}, not {moment.dtype}")


def output_residuals(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> None:
    if hidden.dim() != 2 or len(hidden) == 0 or weight.dim() != 2:
        shapes = f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
        raise InputError(f"hidden must be (t + 1, H) and weight (N, H), not {shapes}")
    rows, columns = weight.shape
    _shape("hidden", hidden, (len(hidden), columns))
    _shape("targets", targets, (len(hidden) - 1, rows))
    _shape("bias", bias, (rows,))


def hidden_gradient(factors: Tensor, scales: Tensor, weight: Tensor) -> None:
    if factors.dim() != 2 or weight.dim() != 2 or factors.shape[1] != weight.shape[0]:
        raise InputError(
            f"factors must be (K, N) and weight (N, H), not {tuple(factors.shape)} and {tuple(weight.shape)}"
        )
    _shape("scales", scales, (len(factors),))


def factored_adam(
    factors: Tensor,
    scales: Tensor,
    hidden: Tensor,
    weight: Tensor,
    weight_m: Tensor,
    weight_v: Tensor,
    step: Tensor,
    lr: Tensor,
    *settings: float,
) -> None:
    hidden_gradient(factors, scales, weight)
    _shape("hidden", hidden, (len(factors), weight.shape[1]))
    _moments(weight, weight_m, weight_v)
    for name, one in (("step", step), ("lr", lr)):
        _one_entry(name, one)


# -- inference ---------------------------------------------------------------------------------------------------------


def entropy_select(logits: Tensor) -> None:
    if logits.dim() != 3 or 0 in (logits.shape[0], logits.shape[2]) or not logits.is_floating_point():
        wanted = "float (T, batch, classes) with T of 1 or more and a class"
        raise InputError(f"logits must be {wanted}, not {logits.dtype} {tuple(logits.shape)}")


# -- what a backend's operators take besides, which can be called directly ---------------------------------------------


def gradient(grad: Tensor, shape: Sequence[int]) -> None:
    """Of an output of this shape."""
    _shape("grad", grad, tuple(shape))


def masked_weights_gradients(grads: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
    """Of W_s * m_s, one per weight."""
    if len(grads) != len(weights):
        raise InputError(f"{len(weights)} weights need as many grads, not {len(grads)}")
    for s, (grad, weight) in enumerate(zip(grads, weights, strict=True)):
        if grad.shape != weight.shape:
            raise InputError(f"grads {s} must have shape {tuple(weight.shape)}, not {tuple(grad.shape)}")


def weight_drift_gradient(grad: Tensor, norms: Tensor, weights: Sequence[Tensor]) -> None:
    """Of the drift, whose norm of every weight the forward pass has kept."""
    _one_entry("grad", grad)
    _shape("norms", norms, (len(weights),))


def sorted_rows(task_ids: Tensor | None, order: Tensor | None, begins: Tensor | None) -> TaskRows | None:
    """The parts of a `TaskRows`, given one by one, as `task_batched_linear` takes them."""
    if task_ids is None or order is None or begins is None:
        _require(task_ids is order is begins, "task_ids, order and begins go together, one is missing")
        return None
    return TaskRows(task_ids, order, begins)


def known_tasks(task_ids: Tensor, tasks: int) -> None:
    """Looks at the ids' values, for which a GPU has to be waited for."""
    _require(bool(((task_ids >= 0) & (task_ids < tasks)).all()), f"task_ids must be 0 to {tasks - 1}")
