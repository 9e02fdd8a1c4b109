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
            where = value.is_cpu or value.device  # there is one CPU, and True costs less than an object that says so
            told += value.shape, value.dtype, where, value.requires_grad, value.is_contiguous()
        elif value is None:
            told.append(None)
        elif kind in _NUMBERS:
            told += kind, value
        elif kind not in _LISTS:
            return None
        elif value and type(value[0]) is int and {*map(type, value)} == {int}:
            told += kind, tuple(value)
        else:
            inner = of(value)
            if inner is None:
                return None
            told += kind, len(value), inner
    return tuple(told)


def needs_gradient(args: Sequence[Any]) -> bool:
    """Whether autograd records a call with these arguments, tensors and lists of tensors among them."""
    if not torch.is_grad_enabled():
        return False
    for arg in args:
        if isinstance(arg, Tensor):
            if arg.requires_grad:
                return True
        elif isinstance(arg, list) and any(isinstance(t, Tensor) and t.requires_grad for t in arg):
            return True
    return False
