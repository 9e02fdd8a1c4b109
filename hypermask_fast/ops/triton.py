"""What the Triton kernels (kernels/) serve, and when. Triton is imported at the first call only."""

import os
from collections.abc import Callable, Sequence
from importlib import util
from typing import Any

import torch
from torch import Tensor

from . import arguments, registry
from .registry import Offer

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _problem() -> str:
    if util.find_spec("triton") is None:
        return "triton is not installed"
    return "" if torch.cuda.is_available() or _interpreted() else "no CUDA device (or TRITON_INTERPRET=1 for tests)"


registry.declare("triton", _problem)


def condition(*values: Any) -> str:
    """Why Triton can't take these tensors, "" if it can."""
    for tensor in arguments.tensors(values):
        if not (tensor.is_cuda or _interpreted()):
            return f"the tensors are on {tensor.device.type}"
        if tensor.is_floating_point() and tensor.dtype not in _DTYPES:
            dtype = str(tensor.dtype).removeprefix("torch.")
            return f"triton computes in float32, float16 and bfloat16, not {dtype}"
    return ""


def of_one_dtype(weights: Sequence[Tensor], *rest: Any) -> str:
    """`condition` for an op of many weights, which Triton takes where they have one dtype."""
    several = len({w.dtype for w in weights}) > 1
    return condition(weights, *rest) or ("the weights differ in dtype" if several else "")


def offer(op: str, condition: Callable[..., str] = condition) -> Offer:
    """The kernel of this name, where `condition` allows."""

    def call(*values: Any) -> Any:
        from .. import kernels  # a statement, which torch.compile can trace

        return getattr(kernels, op)(*values)

    return Offer(call, condition)


def operator(name: str) -> Callable[..., Any]:
    """hypermask_triton::name, which importing the kernels defines."""
    from .. import kernels  # noqa: F401

    return getattr(torch.ops.hypermask_triton, name)
