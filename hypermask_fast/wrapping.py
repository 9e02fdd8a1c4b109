"""What is around a model in a group of processes: DistributedDataParallel, or parameters that are in shards."""

import sys
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .errors import InputError

_SHARDED = "_is_fsdp_managed_module"  # what FullyShardedDataParallel and fully_shard tell torch.compile of a module
_INSTEAD = "hmf.distributed.shard(model) shards the hypernetwork, which is the large part, and no more is needed"


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


def check_whole(net: nn.Module, *others: nn.Module) -> None:
    """Raises InputError where a network's parameters are sharded by others: by either FSDP, or as DTensors.

    others: modules that may hold DTensors, but not FSDP's.
    """
    for path, part in (*net.named_modules(), *((type(other).__name__, other) for other in others)):
        if _SHARDED in vars(part):
            raise InputError(
                f"{path or 'the network'} is sharded by FSDP, which takes the parameters away that masks are made of: "
                f"leave FSDP out; {_INSTEAD}"
            )
    for part in net.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if is_dtensor(parameter):
                raise InputError(f"{name} of {type(part).__name__} is a DTensor, which can't be masked: {_INSTEAD}")


def is_dtensor(tensor: Tensor) -> bool:
    module: Any = sys.modules.get("torch.distributed.tensor")  # where nobody has imported it there are none
    return module is not None and isinstance(tensor, module.DTensor)
