"""Batch norm over the shares of a batch that several processes have, on any device."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from ..errors import InputError
from ..ranks import Ranks


class Synchronised(TorchFunctionMode):
    """Within the block, batch norm with a batch's own statistics takes those of all ranks' shares together.

    A module keeps its own forward pass: what it asks of `torch.nn.functional.batch_norm` is done here.
    """

    def __init__(self, ranks: Ranks, name: str) -> None:
        super().__init__()
        self._ranks, self._name, self._done = ranks, name, False

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.batch_norm:
            return func(*args, **kwargs)
        self._done = True
        return self._batch_norm(*args, **kwargs)

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        if not self._done and raised[0] is None:
            raise InputError(
                f"{self._name} has a batch norm of its own, which can't be synchronised: it does not call "
                "torch.nn.functional.batch_norm"
            )

    def _batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if not training:
            return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        y, mean, var, count = _Normalised.apply(input, weight, bias, eps, self._ranks)
        with torch.no_grad():
            if running_mean is not None:
                running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            if running_var is not None:
                running_var.lerp_((var * count / (count - 1)).to(running_var.dtype), momentum)
        return y


class _Normalised(torch.autograd.Function):
    """y = (x - mean) / sqrt(var + eps) * weight + bias, with mean and variance over all ranks' x.

    Every rank's count, mean and variance are put together as Chan, Golub and LeVeque (1979) have it, in the same order
    on every rank. In backward dx is the gradient of the sum of all ranks' losses; those of weight and bias are
    the own share's, as any other parameter's.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, ranks: Ranks
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide = x.to(_wide(x))
        over, channels, own = [d for d in range(x.dim()) if d != 1], x.shape[1], x.numel() // max(x.shape[1], 1)
        if own:
            var, mean = torch.var_mean(wide, over, correction=0)
        else:
            var = mean = wide.new_zeros(channels)
        found = ranks.gathered(torch.cat([wide.new_full((1,), own), mean, var]))
        counts, means, variances = found.split([1, channels, channels], dim=1)
        count = counts.sum()
        if own <= 1 and count <= 1:  # in PyTorch's words, on every rank
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.size()}")
        mean = (counts * means).sum(0) / count
        var = (counts * (variances + (means - mean).square())).sum(0) / count
        scale = (var + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, scale, count)
        ctx.ranks, ctx.dtypes = ranks, [None if p is None else p.dtype for p in (weight, bias)]
        shape = _beside(x)
        y = (wide - mean.view(shape)) * (scale if weight is None else scale * weight).view(shape)
        if bias is not None:
            y += bias.view(shape)
        ctx.mark_non_differentiable(mean, var, count)
        return y.to(x.dtype), mean, var, count

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator hides the names
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale, count = ctx.saved_tensors
        shape, over = _beside(x), [d for d in range(x.dim()) if d != 1]
        grad, centred = grads[0].to(mean.dtype), x.to(mean.dtype) - mean.view(shape)
        sums = torch.cat([grad.sum(over), (grad * centred).sum(over)])
        of_bias, of_weight = (part.clone() for part in sums.chunk(2))
        of_x = None
        if ctx.needs_input_grad[0]:
            ctx.ranks.sum_(sums)
            first, second = (sums / count).chunk(2)
            factor = scale if weight is None else scale * weight
            of_x = grad - first.view(shape) - centred * (second * scale.square()).view(shape)
            of_x = (of_x * factor.view(shape)).to(x.dtype)
        return (
            of_x,
            (of_weight * scale).to(ctx.dtypes[0]) if ctx.needs_input_grad[1] else None,
            of_bias.to(ctx.dtypes[1]) if ctx.needs_input_grad[2] else None,
            None,
            None,
        )


def _wide(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def _beside(x: Tensor) -> tuple[int, ...]:
    return 1, -1, *(1,) * (x.dim() - 2)
