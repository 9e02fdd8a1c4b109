"""Means of gradients over the processes that train one model together."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Averaging:
    """Means over the processes of a group.

    What the gradients of a hypernetwork come from is the gradient of its logits, N numbers, and that of the output
    drift, one: averaged there, all that follows is the same on every rank, and nothing else need be sent.

    Args:
        group: torch.distributed's; None for all processes.
    """

    def __init__(self, group: Any = None) -> None:
        self.group, self.size = group, dist.get_world_size(group)

    def __deepcopy__(self, memo: dict) -> "Averaging":
        return self  # a copied model goes on with the same processes

    def __reduce__(self) -> tuple[type, tuple]:
        return type(None), ()  # one that is loaded is in a process of its own

    def means(self, *tensors: Tensor) -> list[Tensor]:
        """The tensors' means over the ranks, in one all-reduce."""
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat, group=self.group)
        flat /= self.size
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]

    def of_gradient(self, tensor: Tensor) -> Tensor:
        """The tensor itself, whose gradient is averaged on its way back."""
        return _Averaged.apply(tensor, self) if torch.is_grad_enabled() and tensor.requires_grad else tensor

    @torch.no_grad()
    def make_equal(self, tensors: Iterable[Tensor]) -> None:
        """Gives every rank the tensors of the group's first one."""
        for tensor in tensors:
            values = tensor.contiguous()
            dist.broadcast(
                values, src=0 if self.group is None else dist.get_global_rank(self.group, 0), group=self.group
            )
            tensor.copy_(values)


class _Averaged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, averaging: Averaging) -> Tensor:
        ctx.averaging = averaging
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.averaging.means(*grads)[0], None
