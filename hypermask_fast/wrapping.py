"""What is around a model in a group of processes: DistributedDataParallel, or parameters that are in shards."""

import sys
from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .errors import InputError


def in_a_group() -> bool:
    """Whether there is a process group."""
    return dist.is_available() and dist.is_initialized()


def active_ddp() -> DistributedDataParallel | None:
    """The DistributedDataParallel whose forward pass is under way."""
    # PyTorch's own, for torch.compile: there is no public way to ask.
    return DistributedDataParallel._active_ddp_module  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]


def refuse_ddp_of_network(net: nn.Module) -> None:
    """Raises InputError within the forward pass of DistributedDataParallel(net)."""
    ddp = active_ddp()
    if ddp is not None and ddp.module is net:
        raise InputError(
            "DistributedDataParallel(model.net) knows nothing of masks and tasks: "
            "DistributedDataParallel(hmf.distributed.replicate(model)), which is called as model(x, task)"
        )


def check_whole(module: nn.Module, left_out: Iterable[nn.Module] = ()) -> None:
    """Raises InputError where parameters are sharded by others (fully_shard, FullyShardedDataParallel, DTensor).

    left_out: modules whose parameters may be DTensors.
    """
    for name, part in module.named_modules():
        if "_is_fsdp_managed_module" in vars(part):  # what both FSDPs tell torch.compile
            raise InputError(
                f"{name or type(part).__name__} is sharded by FSDP, which frees parameters that masks are made of: "
                "leave fully_shard out; hmf.distributed.shard(model) shards the hypernetwork, which is the large part"
            )
    known = {id(parameter) for part in left_out for parameter in part.parameters()}
    for name, parameter in module.named_parameters():
        if id(parameter) not in known and is_dtensor(parameter):
            raise InputError(
                f"{name} is a DTensor, which can't be masked: leave the target network whole; "
                "hmf.distributed.shard(model) shards the hypernetwork, which is the large part"
            )


def is_dtensor(tensor: Tensor) -> bool:
    module: Any = sys.modules.get("torch.distributed.tensor")  # where nobody has imported it there are none
    return module is not None and isinstance(tensor, module.DTensor)
