"""What rules are made of: each raises `InputError` in one line where it does not hold."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor

from ...errors import InputError


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


def require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


def has_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise InputError(f"{name} must have shape {shape}, not {tuple(tensor.shape)}")


def has_one_entry(name: str, tensor: Tensor) -> None:
    if tensor.numel() != 1:
        raise InputError(f"{name} must have one entry, not {tensor.numel()}")


def ascending(offsets: Sequence[int], entries: int) -> None:
    borders = list(offsets)
    if not borders or borders[0] < 0 or borders != sorted(borders) or borders[-1] > entries:
        raise InputError(f"offsets must ascend from 0 or more to at most {entries} entries, not {borders}")


def first_segments(weights: Sequence[Tensor], offsets: Sequence[int], flat: Tensor) -> None:
    """The weights are the first segments of the flat tensor."""
    if flat.dim() != 1:
        raise InputError(f"logits and previous weights must be flat, not of shape {tuple(flat.shape)}")
    ascending(offsets, flat.shape[0])
    if len(weights) >= len(offsets):
        raise InputError(f"{len(weights)} weights need {len(weights) + 1} offsets, not {len(offsets)}")
    for s, weight in enumerate(weights):
        size = offsets[s + 1] - offsets[s]
        if weight.numel() != size:
            raise InputError(f"weights {s} has {weight.numel()} entries, its segment {size}")


def one_per_segment(thresholds: Tensor, offsets: Sequence[int]) -> None:
    if tuple(thresholds.shape) != (len(offsets) - 1,):
        raise InputError(f"thresholds must be one per segment, ({len(offsets) - 1},), not {tuple(thresholds.shape)}")


def gradient(grad: Tensor, shape: Sequence[int]) -> None:
    """Of an output of this shape."""
    has_shape("grad", grad, tuple(shape))
