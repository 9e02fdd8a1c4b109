"""The hypernetwork's trunk, elu(V elu(... elu(V1 e + c1) ...) + c) of a few tasks' embeddings e.

On the CPU that is so little work that each op of PyTorch's takes longer to call than to run: the extension has all of
it in one call forward and one backward. A task's numbers are there to the bit what they are with other tasks beside it,
from any number of threads.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import few_rows
from .ops import native, registry
from .ops.native import trunk as operators
from .transforming import transforming

Layers = Sequence[tuple[Tensor, Tensor]]  # weight and bias of each


def served(rows: Sequence[Tensor], layers: Sequence[Tensor]) -> bool:
    """Whether the extension serves it, by `run` and `gradients`; layers: weight and bias of each in turn."""
    if (
        native.PROBLEM
        or torch.compiler.is_compiling()
        or transforming()
        or registry.requested() not in (registry.AUTO, "cpu")
    ):
        return False
    if not all(t.dtype is torch.float32 and t.is_cpu and t.is_contiguous() for t in (*rows, *layers)):
        return False
    return all(few_rows.are_few(len(rows), weight) for weight in layers[::2])


def run(rows: Sequence[Tensor], layers: Sequence[Tensor]) -> list[Tensor]:
    """For each layer its outputs (T, H) and ELU's slopes there, without gradient; the last outputs are the trunk's."""
    return operators.trunk([*rows], [*layers])


def gradients(grad: Tensor, kept: Sequence[Tensor], rows: Sequence[Tensor], layers: Sequence[Tensor]) -> list[Tensor]:
    """Of every row, then of every weight and bias, from that of the trunk's outputs; kept: what `run` returned."""
    return operators.trunk_backward(grad.contiguous(), [*kept], [*rows], [*layers])


def trunk(rows: Tensor | list[Tensor], layers: Layers) -> Tensor:
    """(T, H) outputs for rows (T, E), or as many (E,)."""
    flat = [tensor for layer in layers for tensor in layer]
    single = [*rows.unbind()] if isinstance(rows, Tensor) and rows.is_cpu else rows
    if len(rows) == 0 or isinstance(single, Tensor) or not served(single, flat):
        return few_rows.mlp(rows if isinstance(rows, Tensor) else torch.stack(rows), layers)
    rows = single
    if torch.is_grad_enabled() and any(t.requires_grad for t in (*rows, *flat)):
        return _Trunk.apply(len(rows), *rows, *flat)
    return run(rows, flat)[-2]


class _Trunk(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> Tensor:
        kept = run(tensors[:count], tensors[count:])
        ctx.count = count
        ctx.save_for_backward(*tensors, *kept)
        return kept[-2]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        count, (grad,) = ctx.count, grads
        saved = ctx.saved_tensors  # read once: a checkpoint gives it no second time
        layers = (len(saved) - count) // 2
        tensors, kept = saved[: count + layers], saved[count + layers :]
        if not torch.is_grad_enabled():
            return None, *gradients(grad, kept, tensors[:count], tensors[count:])
        pairs = list(zip(tensors[count::2], tensors[count + 1 :: 2], strict=True))  # differentiated again: with a graph
        outputs = few_rows.mlp(torch.stack(tensors[:count]), pairs)
        asked = [t for t, needed in zip(tensors, ctx.needs_input_grad[1:], strict=True) if needed]
        found = iter(torch.autograd.grad(outputs, asked, grad, create_graph=True))
        return None, *(next(found) if needed else None for needed in ctx.needs_input_grad[1:])
