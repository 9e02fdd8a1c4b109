"""The chunked hypernetwork's output layer, its products arranged so that nothing larger than needed is made.

Plain PyTorch on any device and in any dtype; the definitions are `reference.hypernet_logits` and
`reference.chunked_output_drift`.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..once import differentiable_once
from ..signature import needs_gradient

_FEW = 1 << 19  # products of the hidden vectors with the layer


def hypernet_logits(hidden: Tensor, weight: Tensor, bias: Tensor, size: int) -> Tensor:
    """`reference.hypernet_logits`, whose backward pass reads the gradient where it lies.

    Autograd would first copy it into a zero-filled array of whole chunks.
    """
    if not needs_gradient((hidden, weight, bias)):
        return reference.hypernet_logits(hidden, weight, bias, size)
    return _Logits.apply(hidden, weight, bias, size)


def hypernet_logits_form(hidden: Tensor, weight: Tensor, bias: Tensor, size: int) -> str:
    return "" if hidden.shape[1] > 1 else "one chunk: a single product, as the definition has it"


def _gradient_of(op: str) -> Callable[[Callable], Callable]:
    """For who calls loss.backward() under autocast: these products, as those of the forward pass, keep their dtype."""

    def decorated(backward: Callable) -> Callable:
        @functools.wraps(backward)
        def in_own_dtype(ctx: Any, grad: Tensor):
            if not torch.is_autocast_enabled(grad.device.type):
                return backward(ctx, grad)
            with torch.autocast(grad.device.type, enabled=False):
                return backward(ctx, grad)

        return differentiable_once(op, in_own_dtype)

    return decorated


class _Logits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return reference.hypernet_logits(hidden, weight, bias, size)

    @staticmethod
    @_gradient_of("hypernet_logits")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        hidden, weight = ctx.saved_tensors
        rows = weight.shape[0]
        whole = grad.shape[1] // rows
        # The whole chunks of all tasks, then each task's last one where it is cut off.
        of_whole = grad[:, : whole * rows].reshape(-1, rows)
        grad_weight = of_whole.t() @ hidden[:, :whole].flatten(0, 1)
        grad_bias = of_whole.sum(0)
        grad_hidden = (of_whole @ weight).view(-1, whole, hidden.shape[2])
        if whole < hidden.shape[1]:
            of_last = grad[:, whole * rows :]
            rest = of_last.shape[1]
            grad_weight[:rest].addmm_(of_last.t(), hidden[:, whole])
            grad_bias[:rest] += of_last.sum(0)
            grad_hidden = torch.cat([grad_hidden, (of_last @ weight[:rest])[:, None]], dim=1)
        return grad_hidden, grad_weight, grad_bias, None


class _Drift:
    """`reference.chunked_output_drift` without N-sized work, or by the residuals themselves where they are so few that
    the number of calls decides. Both keep the digits that subtracting two large, nearly equal outputs loses."""

    def __call__(self, *values: Any) -> Tensor:
        return self.of_kind(*values)(*values)

    def of_kind(self, hidden: Tensor, weight: Tensor, bias: Tensor, *rest: Any) -> Callable[..., Tensor]:
        if not _are_few(hidden, weight):
            way = _by_gram_matrices
        else:
            way = _Residuals.apply if needs_gradient((hidden, weight, bias)) else _by_residuals
        device = hidden.device.type
        if not torch.is_autocast_enabled(device):
            return way

        def in_own_dtype(*values: Any) -> Tensor:  # half precision would round away what the drift is made of
            with torch.autocast(device, enabled=False):
                return way(*values)

        return in_own_dtype


output_drift = _Drift()


def _by_residuals(
    hidden: Tensor, weight: Tensor, bias: Tensor, old_hidden: Tensor, old_weight: Tensor, old_bias: Tensor, size: int
) -> Tensor:
    old = _constant(old_hidden), _constant(old_weight), _constant(old_bias)
    return _residuals(hidden, weight, bias, *old, size)[1]


def _by_gram_matrices(
    hidden: Tensor, weight: Tensor, bias: Tensor, old_hidden: Tensor, old_weight: Tensor, old_bias: Tensor, size: int
) -> Tensor:
    """n H^2 + C H^2 operations for n = tasks * chunks rows. The last chunk, where it is cut off, is done directly."""
    rows = weight.shape[0]
    whole = size // rows
    old = old_hidden.detach(), old_weight.detach(), old_bias.detach()
    hidden_whole, old_whole = (h[:, :whole].flatten(0, 1) for h in (hidden, old[0]))
    total = _GramDrift.apply(hidden_whole, weight, bias, old_whole, *old[1:])
    rest = size - whole * rows
    if rest:
        last = hidden[:, whole : whole + 1], weight[:rest], bias[:rest]
        total = total + _Residuals.apply(*last, old[0][:, whole : whole + 1], old[1][:rest], old[2][:rest], rest)
    return total


def _constant(tensor: Tensor) -> Tensor:
    return tensor.detach() if tensor.requires_grad else tensor


def _are_few(hidden: Tensor, weight: Tensor) -> bool:
    """Whether the residuals themselves are the quicker way; compiled graphs have one way for all sizes."""
    return not torch.compiler.is_compiling() and hidden.numel() * weight.shape[0] <= _FEW


def _residuals(
    hidden: Tensor, weight: Tensor, bias: Tensor, old_hidden: Tensor, old: Tensor, old_bias: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """r = d h + W* e + c, as `_GramDrift` has it, of whole chunks (tasks, chunks, C); and sum ||r||^2 over what is not
    cut off."""
    both = torch.cat([hidden, hidden - old_hidden], dim=2)
    residuals = F.linear(both, torch.cat([weight - old, old], dim=1), bias - old_bias)
    return residuals, residuals.flatten(1)[:, :size].square().sum()


class _Residuals(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, old_h: Tensor, old: Tensor, old_bias: Tensor, size: int
    ) -> Tensor:
        residuals, value = _residuals(hidden, weight, bias, old_h, old, old_bias, size)
        ctx.save_for_backward(hidden, weight, residuals)
        ctx.size = size
        return value

    @staticmethod
    @_gradient_of("chunked_output_drift")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, residuals = ctx.saved_tensors
        scaled = (2 * grad) * residuals
        scaled.flatten(1)[:, ctx.size :] = 0
        rows = scaled.flatten(0, 1)
        return scaled @ weight, rows.t() @ hidden.flatten(0, 1), rows.sum(0), None, None, None, None


class _GramDrift(torch.autograd.Function):
    """sum over rows of || W h + b - W* h* - b* ||^2 for h (n, H), from products of H x H.

    With d = W - W*, e = h - h*, c = b - b* a row's residual is r = d h + W* e + c; with S = h'h, Z = e'h, E = e'e,
    A = d'd, B = W*'d, K = W*'W*, and s, u the sums of the rows of h and e,

        sum ||r||^2 = <S, A> + 2 <Z, B> + <E, K> + 2 (d'c).s + 2 (W*'c).u + n c.c
        dW = 2 (d S + W* Z + c s'),  db = 2 (d s + W* u + n c),  dh = 2 (h (A + B') + e (K + B) + (W'c)').
    """

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, weight: Tensor, bias: Tensor, old_h: Tensor, old: Tensor, old_bias: Tensor
    ) -> Tensor:
        d, e, c = weight - old, h - old_h, bias - old_bias
        both = torch.cat([h, e], dim=1).t() @ h
        s_h, z = both.chunk(2)
        a, b, k, ee = d.t() @ d, old.t() @ d, old.t() @ old, e.t() @ e
        s, u, dc, oc = h.sum(0), e.sum(0), d.t() @ c, old.t() @ c
        ctx.save_for_backward(h, d, e, c, old, both, a, b, k, s, u, dc + oc)
        value = (s_h * a).sum() + 2 * (z * b).sum() + (ee * k).sum()
        return value + 2 * (dc.dot(s) + oc.dot(u)) + h.shape[0] * c.dot(c)

    @staticmethod
    @_gradient_of("chunked_output_drift")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, d, e, c, old, both, a, b, k, s, u, wc = ctx.saved_tensors
        factor = 2 * grad
        s_h, z = (factor * both).chunk(2)
        grad_weight = torch.addmm(torch.outer(c, factor * s), d, s_h).addmm_(old, z)
        grad_bias = factor * (d @ s + old @ u + h.shape[0] * c)
        grad_h = torch.addmm(factor * wc, h, factor * (a + b.t())).addmm_(e, factor * (k + b))
        return grad_h, grad_weight, grad_bias, None, None, None
