"""Of the hypernetwork's output layer: its logits, both drifts of it, and its steps with Adam."""

import torch
from torch import Tensor

from ...errors import InputError
from .checks import has_one_entry, has_shape


def hypernet_logits(hidden: Tensor, weight: Tensor, bias: Tensor, size: int) -> None:
    if hidden.dim() != 3 or weight.dim() != 2:
        shapes = f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
        raise InputError(f"hidden must be (T, chunks, H) and weight (chunk_size, H), not {shapes}")
    has_shape("hidden", hidden, (*hidden.shape[:2], weight.shape[1]))
    has_shape("bias", bias, (weight.shape[0],))
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
    has_shape("targets", targets, (hidden.shape[0], targets.shape[1]))


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
    has_shape("old_hidden", old_hidden, tuple(hidden.shape))
    has_shape("old_weight", old_weight, tuple(weight.shape))
    has_shape("old_bias", old_bias, tuple(bias.shape))


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
    has_shape("grad_logits", grad_logits, (weight.shape[0],))
    _moments(weight, weight_m, weight_v)
    for name, moment in (("bias_m", bias_m), ("bias_v", bias_v)):
        has_shape(name, moment, tuple(bias.shape))
        if moment.dtype != weight.dtype or bias.dtype != weight.dtype:
            raise InputError(f"bias and {name} must be {weight.dtype}, as weight, not {bias.dtype} and {moment.dtype}")
    for name, one in (("drift_weight", drift_weight), ("step", step), ("lr", lr)):
        has_one_entry(name, one)


def _moments(weight: Tensor, weight_m: Tensor, weight_v: Tensor) -> None:
    """Of weight's dtype, or both of bfloat16 beside float32."""
    in_half = weight.dtype == torch.float32 and weight_m.dtype == torch.bfloat16
    dtype = torch.bfloat16 if in_half else weight.dtype
    for name, moment in (("weight_m", weight_m), ("weight_v", weight_v)):
        has_shape(name, moment, tuple(weight.shape))
        if moment.dtype != dtype:
            why = "as weight_m" if in_half else "as weight"
            raise InputError(f"{name} must be {dtype}, {why}, not {moment.dtype}")


def output_residuals(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> None:
    if hidden.dim() != 2 or len(hidden) == 0 or weight.dim() != 2:
        shapes = f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
        raise InputError(f"hidden must be (t + 1, H) and weight (N, H), not {shapes}")
    rows, columns = weight.shape
    has_shape("hidden", hidden, (len(hidden), columns))
    has_shape("targets", targets, (len(hidden) - 1, rows))
    has_shape("bias", bias, (rows,))


def hidden_gradient(factors: Tensor, scales: Tensor, weight: Tensor) -> None:
    if factors.dim() != 2 or weight.dim() != 2 or factors.shape[1] != weight.shape[0]:
        raise InputError(
            f"factors must be (K, N) and weight (N, H), not {tuple(factors.shape)} and {tuple(weight.shape)}"
        )
    has_shape("scales", scales, (len(factors),))


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
    has_shape("hidden", hidden, (len(factors), weight.shape[1]))
    _moments(weight, weight_m, weight_v)
    for name, one in (("step", step), ("lr", lr)):
        has_one_entry(name, one)
