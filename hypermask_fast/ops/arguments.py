"""What the ops' arguments must be, for who computes in plain PyTorch, which broadcasts or cuts what does not fit.

The extension and the Triton kernels check theirs themselves. `CHECKS`: op -> a function of the op's arguments that
raises InputError; `one_device` is for every backend.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import InputError
from .registry import tensors
from .task_rows import TaskRows


def one_device(op: str, first: Tensor, args: tuple) -> None:
    """Raises InputError unless all tensors are where `first` is; scalars may also be on the CPU."""
    for tensor in tensors(args):
        if tensor.device != first.device and (tensor.dim() > 0 or tensor.device.type != "cpu"):
            raise InputError(f"{op}: all tensors must be on one device, not on {first.device} and {tensor.device}")


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
    if flat.dim() != 1:
        raise InputError(f"logits and previous weights must be flat, not of shape {tuple(flat.shape)}")
    _offsets(offsets, flat.shape[0])
    if len(weights) >= len(offsets):
        raise InputError(f"{len(weights)} weights need {len(weights) + 1} offsets, not {len(offsets)}")
    for s, weight in enumerate(weights):
        if weight.numel() != offsets[s + 1] - offsets[s]:
            size = offsets[s + 1] - offsets[s]
            raise InputError(f"weights {s} has {weight.numel()} entries, its segment {size}")


def _mask_thresholds(logits: Tensor, offsets: Sequence[int], ranks: Tensor) -> None:
    if logits.dim() == 0 or ranks.dtype != torch.int64:
        raise InputError(f"logits must be (..., N) and ranks int64, not {tuple(logits.shape)} and {ranks.dtype}")
    _offsets(offsets, logits.shape[-1])
    _shape("ranks", ranks, (len(offsets) - 1,))
    if ranks.device.type == "cpu" and not torch.compiler.is_compiling():
        for s, rank in enumerate(ranks.tolist()):
            size = offsets[s + 1] - offsets[s]
            if not 0 <= rank < max(size, 1):
                raise InputError(f"rank {rank} is outside segment {s} of {size} entries")


def _masked_weights(weights: Sequence[Tensor], logits: Tensor, thresholds: Tensor, offsets: Sequence[int]) -> None:
    _segments(weights, offsets, logits)
    _covers("thresholds", thresholds, weights, offsets)


def _covers(name: str, thresholds: Tensor, weights: Sequence[Tensor], offsets: Sequence[int]) -> None:
    if thresholds.dim() != 1 or not len(weights) <= len(thresholds) <= len(offsets) - 1:
        raise InputError(f"{name} must be one per segment, ({len(offsets) - 1},), not {tuple(thresholds.shape)}")


def _weight_drift(
    weights: Sequence[Tensor],
    previous: Tensor,
    offsets: Sequence[int],
    norm: int,
    logits: Tensor | None,
    thresholds: Tensor | None,
) -> None:
    if norm not in (1, 2):
        raise InputError(f"norm must be 1 or 2, not {norm!r}")
    if (logits is None) != (thresholds is None):
        raise InputError("logits and thresholds go together, one is missing")
    _segments(weights, offsets, previous)
    if logits is not None:
        _segments(weights, offsets, logits)
        _covers("thresholds", thresholds, weights, offsets)


def _masked_weights_drift(
    weights: Sequence[Tensor],
    logits: Tensor,
    thresholds: Tensor,
    offsets: Sequence[int],
    previous: Tensor,
    norm: int,
) -> None:
    _weight_drift(weights, previous, offsets, norm, logits, thresholds)


def _masked_layer(x: Tensor, weight: Tensor, logits: Tensor, threshold: Tensor, *_: object) -> None:
    _shape("logits", logits, tuple(weight.shape))
    _one_entry("threshold", threshold)


def _hypernet_logits(hidden: Tensor, weight: Tensor, bias: Tensor, size: int) -> None:
    if hidden.dim() != 3 or weight.dim() != 2:
        shapes = f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
        raise InputError(f"hidden must be (T, chunks, H) and weight (chunk_size, H), not {shapes}")
    _shape("hidden", hidden, (*hidden.shape[:2], weight.shape[1]))
    _shape("bias", bias, (weight.shape[0],))
    entries = hidden.shape[1] * weight.shape[0]
    if not 0 <= size <= entries:
        raise InputError(f"size must be 0 to chunks * chunk_size = {entries}, not {size}")


def _output_drift(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> None:
    if targets.dim() != 2:
        raise InputError(f"targets must be (T, N), not {tuple(targets.shape)}")
    _hypernet_logits(hidden, weight, bias, targets.shape[1])
    _shape("targets", targets, (hidden.shape[0], targets.shape[1]))


def _chunked_output_drift(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    old_hidden: Tensor,
    old_weight: Tensor,
    old_bias: Tensor,
    size: int,
) -> None:
    _hypernet_logits(hidden, weight, bias, size)
    _shape("old_hidden", old_hidden, tuple(hidden.shape))
    _shape("old_weight", old_weight, tuple(weight.shape))
    _shape("old_bias", old_bias, tuple(bias.shape))


def _hypernet_adam(
    hidden: Tensor,
    grad_logits: Tensor,
    targets: Tensor,
    drift_weight: Tensor,
    weight: Tensor,
    bias: Tensor,
    *state: Tensor | float,
) -> None:
    if hidden.dim() != 2 or len(hidden) == 0 or weight.dim() != 2:
        shapes = f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
        raise InputError(f"hidden must be (t + 1, H) and weight (N, H), not {shapes}")
    rows, columns = weight.shape
    _shape("hidden", hidden, (len(hidden), columns))
    _shape("grad_logits", grad_logits, (rows,))
    _shape("targets", targets, (len(hidden) - 1, rows))
    _shape("bias", bias, (rows,))
    weight_m, weight_v, bias_m, bias_v, step, lr = state[:6]
    for name, moment, like in (
        ("weight_m", weight_m, weight),
        ("weight_v", weight_v, weight),
        ("bias_m", bias_m, bias),
        ("bias_v", bias_v, bias),
    ):
        _shape(name, moment, tuple(like.shape))
        if moment.dtype != weight.dtype or bias.dtype != weight.dtype:
            raise InputError(f"bias and {name} must be {weight.dtype}, as weight, not {bias.dtype} and {moment.dtype}")
    for name, one in (("drift_weight", drift_weight), ("step", step), ("lr", lr)):
        _one_entry(name, one)


def _task_batched_linear(
    x: Tensor,
    weight: Tensor,
    logits: Tensor,
    thresholds: Tensor,
    task_ids: Tensor | TaskRows | None,
    *_: object,
) -> None:
    _shape("logits", logits, (len(logits), *weight.shape))
    _shape("thresholds", thresholds, (len(logits),))
    if isinstance(task_ids, TaskRows):
        task_ids = task_ids.ids
    if task_ids is not None:
        if task_ids.dtype != torch.int64:
            raise InputError(f"task_ids must be int64, not {task_ids.dtype}")
        _shape("task_ids", task_ids, (x.shape[0],))


def _entropy_select(logits: Tensor) -> None:
    if logits.dim() != 3 or logits.shape[0] == 0 or not logits.is_floating_point():
        shape = tuple(logits.shape)
        raise InputError(f"logits must be float (T, batch, classes) with T of 1 or more, not {logits.dtype} {shape}")


CHECKS = {
    "chunked_output_drift": _chunked_output_drift,
    "entropy_select": _entropy_select,
    "hypernet_adam": _hypernet_adam,
    "hypernet_logits": _hypernet_logits,
    "mask_thresholds": _mask_thresholds,
    "masked_conv2d": _masked_layer,
    "masked_linear": _masked_layer,
    "masked_weights": _masked_weights,
    "masked_weights_drift": _masked_weights_drift,
    "output_drift": _output_drift,
    "task_batched_linear": _task_batched_linear,
    "weight_drift": _weight_drift,
}
