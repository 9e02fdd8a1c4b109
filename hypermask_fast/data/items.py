"""From the items of somebody's Dataset, (input, label) pairs, to checked batch tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checks import is_whole
from ..errors import InputError
from .transforms import unit_range

_CHANNELS = (1, 3, 4)


def stack_items(
    items: Sequence[Any], label_map: Mapping[int, int] | None = None, num_classes: int | None = None
) -> tuple[Tensor, Tensor]:
    """The items as one batch, inputs as stored.

    Args:
        items: B >= 1 pairs (input, label). Inputs: tensors or arrays of one shape, all uint8 (images channels
            first) or all of a float dtype. Labels: integers.
        label_map: the item's label to the one returned; None keeps it.
        num_classes: if given, the labels returned must be 0 .. num_classes - 1.

    Returns:
        x (B, ...) uint8 or float32, y (B,) int64.

    Raises:
        InputError: an item that is not as above.
    """
    for item in items:
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise InputError(f"a dataset item must be a pair (input, label), not {_kind(item)}")
    inputs = [input_tensor(x) for x, _ in items]
    if len({(x.shape, x.dtype) for x in inputs}) > 1:
        kinds = sorted({_kind(x) for x in inputs})
        raise InputError(f"inputs of a dataset must share shape and dtype; found {kinds[0]} and {kinds[1]}")
    labels = [_label(y, label_map, num_classes) for _, y in items]
    return torch.stack(inputs), torch.tensor(labels, dtype=torch.int64)


def input_tensor(x: Any) -> Tensor:
    """One item's input as uint8 or float32.

    Raises:
        InputError: not a tensor or array (a PIL image, say), an integer dtype other than uint8, or a uint8
            image with its channels last.
    """
    if not isinstance(x, (Tensor, np.ndarray)):
        raise InputError(
            f"a dataset's inputs must be tensors or arrays, not {_kind(x)}; convert them in its transform"
            " (torchvision: ToTensor)"
        )
    if isinstance(x, np.ndarray):
        if x.dtype != np.uint8 and x.dtype.kind != "f":
            raise InputError(f"a dataset's inputs must be uint8 or float, not {_kind(x)}")
        # float32 here, not in torch: it covers byte orders and widths that torch lacks.
        x = torch.tensor(x if x.dtype == np.uint8 else x.astype(np.float32))
    if x.dtype == torch.uint8:
        if x.dim() == 3 and x.shape[-1] in _CHANNELS and x.shape[0] not in _CHANNELS:
            shape = tuple(x.shape)
            raise InputError(f"a uint8 image must be (channels, height, width), not {shape}: permute it first")
        return x
    if not x.dtype.is_floating_point:
        raise InputError(f"a dataset's inputs must be uint8 or float, not {_kind(x)}")
    return x.float()


@dataclass(frozen=True)
class Collate:
    """DataLoader's collate_fn: the items as x (B, ...) float32 and y (B,) int64.

    An InputError is returned as a value: raised in a worker, DataLoader would wrap its line in a traceback.
    """

    label_map: Mapping[int, int] | None
    num_classes: int | None

    def __call__(self, items: Sequence[Any]) -> tuple[Tensor, Tensor] | InputError:
        try:
            x, y = stack_items(items, self.label_map, self.num_classes)
        except InputError as error:
            return error
        return unit_range(x), y


def _label(label: Any, label_map: Mapping[int, int] | None, num_classes: int | None) -> int:
    """The label as an int, mapped and checked."""
    single = isinstance(label, (Tensor, np.ndarray, np.generic)) and label.shape == ()
    value = label.item() if single else label
    if not is_whole(value):
        raise InputError(f"labels must be integers, not {_kind(label)}")
    if label_map is not None:
        if value not in label_map:
            raise InputError(f"label {value} is not in label_map, which has {sorted(label_map)}")
        value = label_map[value]
    if num_classes is not None and not 0 <= value < num_classes:
        raise InputError(f"labels must be 0 .. {num_classes - 1}, found {value}: map each task's classes to 0, 1, ...")
    return value


def _kind(x: Any) -> str:
    """A short description of a value for a message."""
    if isinstance(x, (Tensor, np.ndarray)):
        return f"{str(x.dtype).removeprefix('torch.')} of shape {tuple(x.shape)}"
    if isinstance(x, (bool, int, float, str)):
        return f"{x!r} ({type(x).__name__})"
    return type(x).__name__
