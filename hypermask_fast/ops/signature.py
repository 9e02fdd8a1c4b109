"""What can be told of a call from its arguments alone, without their values: calls with equal signatures are alike.

The rules in `arguments`, the conditions of who serves a call and the paths depend on no more than this.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .task_rows import TaskRows

_NUMBERS = (int, float, bool, str)
_LISTS = (list, tuple, torch.Size, TaskRows)


def of(values: Sequence[Any]) -> tuple | None:
    """Of each tensor its shape, dtype, device, whether it needs a gradient, and whether it is contiguous; of each
    number and each list its type and itself. None where there is anything else, such as a tensor of a class of its own.
    """
    told: list[Any] = []
    for value in values:
        kind = type(value)
        if kind is Tensor or kind is Parameter:
            told += value.shape, value.dtype, value.device, value.requires_grad, value.is_contiguous()
        elif value is None:
            told.append(None)
        elif kind in _NUMBERS:
            told += kind, value
        elif kind not in _LISTS:
            return None
        elif {*map(type, value)} == {int}:
            told += kind, tuple(value)
        else:
            inner = of(value)
            if inner is None:
                return None
            told += kind, len(value), inner
    return tuple(told)
