"""Products of few rows that are the same, bit for bit, from any number of threads."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .transforming import transforming

_FEW_ROWS, _FEW_PRODUCTS = 64, 1 << 22


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x W^T + b; on the CPU the same bits from any number of threads, where x (..., K) has few rows.

    In PyTorch's own product of few rows the order in which numbers are added depends on the number of threads, and
    Adam makes large differences of small ones. A trunk's products are so small that they can be added up plainly.
    """
    if not _are_few(x, weight):
        return F.linear(x, weight, bias)
    return _FewRowsLinear.apply(x.flatten(0, -2), weight, bias).view(*x.shape[:-1], -1)


def mlp(x: Tensor, layers: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """elu(W elu(... elu(V x + c) ...) + b) of x (T, K), by `linear`; where no graph is compiled, as one node."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not all(_are_few(x, w) for w, _ in layers):
        return _by_layers(x, layers)
    return _FewRowsMlp.apply(x, *(tensor for layer in layers for tensor in layer))


def _are_few(x: Tensor, weight: Tensor) -> bool:
    if x.device.type != "cpu" or (not torch.compiler.is_compiling() and transforming()):
        return False
    return are_few(x.numel() // max(x.shape[-1], 1), weight)


def are_few(rows: int, weight: Tensor) -> bool:
    """Whether so many rows times this weight are better added up plainly."""
    return rows <= _FEW_ROWS and rows * weight.numel() <= _FEW_PRODUCTS


def _by_layers(x: Tensor, layers: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    for weight, bias in layers:
        x = F.elu(linear(x, weight, bias))
    return x


class _FewRowsLinear(torch.autograd.Function):
    """x W^T + b of x (T, K) and W (N, K), the three gradients too.

    Every number is a sum of its own over neighbours in memory, which PyTorch never cuts into parts for its threads.
    Gradients by autograd would be sums over other dimensions, which it does cut.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _sums_of_products(x, weight) + bias

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return _gradients(grads[0], x, weight)


class _FewRowsMlp(torch.autograd.Function):
    """`_by_layers` with the same numbers, to the bit: a node for the whole instead of two or more for each layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        inputs, sums = [x], []
        for weight, bias in zip(parameters[::2], parameters[1::2], strict=True):
            sums.append(_sums_of_products(inputs[-1], weight) + bias)
            inputs.append(F.elu(sums[-1]))
        ctx.save_for_backward(x, *parameters)
        ctx.inputs, ctx.sums = inputs[1:-1], sums
        return inputs[-1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        x, *parameters = ctx.saved_tensors
        weights, (grad,) = parameters[::2], grads
        if torch.is_grad_enabled():  # to be differentiated again, for which what lies between needs a graph too
            y = _by_layers(x, list(zip(weights, parameters[1::2], strict=True)))
            asked = [t for t, needed in zip((x, *parameters), ctx.needs_input_grad, strict=True) if needed]
            found = iter(torch.autograd.grad(y, asked, grad, create_graph=True))
            return tuple(next(found) if needed else None for needed in ctx.needs_input_grad)  # pyright: ignore
        of_parameters: list[Tensor] = []
        for weight, before, total in zip(weights[::-1], [x, *ctx.inputs][::-1], ctx.sums[::-1], strict=True):
            grad = torch.ops.aten.elu_backward(grad, 1.0, 1.0, 1.0, False, total)
            grad, *others = _gradients(grad, before, weight)
            of_parameters = [*others, *of_parameters]
        return grad, *of_parameters


def _gradients(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of x, W and b, from that of x W^T + b."""
    of_entry = grad.t().contiguous()
    return _sums_of_products(grad, weight.t()), _sums_of_products(of_entry, x.t()), of_entry.sum(-1)


def _sums_of_products(a: Tensor, b: Tensor) -> Tensor:
    """(m, n): a (m, k) times b^T, b (n, k)."""
    return (a.contiguous().unsqueeze(1) * b.contiguous()).sum(-1)
