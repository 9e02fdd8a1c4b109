"""The Triton kernels as a backend: what kernels/ serves, and when. Triton is imported at the first call only."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import registry as backends

OPS = (
    "chunk_masked_conv2d",
    "chunk_masked_linear",
    "entropy_select",
    "masked_conv2d",
    "masked_linear",
    "masked_weights",
    "semi_binary_mask",
    "task_batched_linear",
    "weight_drift",
)
_OF_SEGMENTS = ("masked_weights", "weight_drift")  # whose first argument is a list of weights
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def register() -> None:
    """Offers every kernel to `backends`."""
    for op in OPS:
        backends.offer(op, "triton", _kernel(op), _of_segments if op in _OF_SEGMENTS else condition)


def _kernel(op: str) -> Callable:
    def call(*args: Any, **kwargs: Any) -> Any:
        from .. import kernels  # a statement, which torch.compile can trace

        return getattr(kernels, op)(*args, **kwargs)

    return call


def condition(*args: Any, **kwargs: Any) -> str:
    """Why Triton can't take these tensors, "" if it can."""
    for tensor in backends.tensors((*args, *kwargs.values())):
        if not (tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
            return f"the tensors are on {tensor.device.type}"
        if tensor.is_floating_point() and tensor.dtype not in _DTYPES:
            return f"triton computes in float32, float16 and bfloat16, not {_name(tensor)}"
    return ""


def _of_segments(weights: Sequence[Tensor], *args: Any, **kwargs: Any) -> str:
    problem = condition(weights, *args, **kwargs)
    return problem or ("the weights differ in dtype" if len({w.dtype for w in weights}) > 1 else "")


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
