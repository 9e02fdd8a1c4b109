"""Replicas: every process has the whole model, whose gradients are averaged."""

from typing import Any, TypeVar

import torch.distributed as dist
from torch import nn

from ..averaging import Averaging
from ..errors import InputError
from ..model import HyperMask

M = TypeVar("M", bound=nn.Module)


def replicate(module: M, group: Any = None) -> M:
    """Makes the hypernetworks in `module` the same on every rank, and keeps them so while they are trained.

    dW = G^T H with the same H on every rank: so the gradient of the logits is averaged within the backward pass, N
    numbers, and that of the output drift, and all gradients of the hypernetwork are then the ranks' means. What else is
    in the module is DistributedDataParallel's, which leaves the hypernetworks to this:

        model = hmf.distributed.replicate(model)
        net = DistributedDataParallel(model)

    Every rank makes the same backward passes, of the same tasks.

    Args:
        module: a HyperMask, or the module with one in it that DistributedDataParallel is given.
        group: a process group of torch.distributed; None for all processes.

    Returns:
        The module.

    Raises:
        InputError: no process group, or no HyperMask in the module.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise InputError("there is no process group: torch.distributed.init_process_group() comes first")
    left_out = []
    for name, part in module.named_modules():
        if isinstance(part, HyperMask):
            hypernet = part.hypernet
            hypernet.averaging = Averaging(group)
            hypernet.averaging.make_equal([*hypernet.parameters(), *hypernet.buffers()])
            prefix = f"{name}.hypernet" if name else "hypernet"
            left_out += [f"{prefix}.{parameter}" for parameter, _ in hypernet.named_parameters()]
    if not left_out:
        raise InputError(f"replicate takes a HyperMask or a module with one in it; {type(module).__name__} has none")
    marked: Any = module
    marked._ddp_params_and_buffers_to_ignore = left_out  # noqa: SLF001  # what DistributedDataParallel asks for
    return module
