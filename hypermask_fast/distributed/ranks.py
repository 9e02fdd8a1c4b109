"""What all ranks that train a module send each other besides what a hypernetwork needs."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks:
    """The processes of a group, all of which make the same calls in the same order.

    Args:
        group: torch.distributed's; None for all processes.
    """

    def __init__(self, group: Any = None) -> None:
        self.group, self.size = group, dist.get_world_size(group)

    def __deepcopy__(self, memo: dict) -> "Ranks":
        return self  # a copied model goes on with the same processes

    def __reduce__(self) -> tuple[type, tuple]:
        return type(None), ()  # one that is loaded is in a process of its own

    def mean_(self, tensor: Tensor) -> None:
        """Puts the mean over the ranks in the tensor's place."""
        tensor /= self.size  # before they are added: float16 ends at 65504
        self.sum_(tensor)

    def sum_(self, tensor: Tensor) -> None:
        """Puts the sum over the ranks in the tensor's place."""
        dist.all_reduce(tensor, group=self.group)

    def gathered(self, tensor: Tensor) -> Tensor:
        """(K, n) of every rank's tensor (n,), in the order of the ranks."""
        found = tensor.new_empty(self.size, *tensor.shape)
        dist.all_gather(list(found), tensor.contiguous(), group=self.group)
        return found

    @torch.no_grad()
    def make_equal(self, tensors: Iterable[Tensor]) -> None:
        """Gives every rank the tensors of the group's first one."""
        first = 0 if self.group is None else dist.get_global_rank(self.group, 0)
        for tensor in tensors:
            values = tensor.contiguous()
            dist.broadcast(values, src=first, group=self.group)
            tensor.copy_(values)
