"""Products of few rows that are the same, bit for bit, from any number of threads."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_FEW_ROWS, _FEW_PRODUCTS = 64, 1 << 22


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x W^T + b; on the CPU the same bits from any number of threads, where x (..., K) has few rows.

    In PyTorch's own product of few rows the order in which numbers are added depends on the number of threads, and
    Adam makes large differences of small ones. A trunk's products are so small that they can be added up plainly.
    """
    rows = x.numel() // max(x.shape[-1], 1)
    if x.device.type != "cpu" or rows > _FEW_ROWS or rows * weight.numel() > _FEW_PRODUCTS:
        return F.linear(x, weight, bias)
    return _FewRowsLinear.apply(x.flatten(0, -2), weight, bias).view(*x.shape[:-1], -1)


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
        (grad,) = grads
        of_entry = grad.t().contiguous()
        return _sums_of_products(grad, weight.t()), _sums_of_products(of_entry, x.t()), of_entry.sum(-1)


def _sums_of_products(a: Tensor, b: Tensor) -> Tensor:
    """(m, n): a (m, k) times b^T, b (n, k)."""
    return (a.contiguous()[:, None] * b.contiguous()).sum(-1)
