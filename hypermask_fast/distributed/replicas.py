"""Replicas: every process has the whole model, whose gradients are averaged."""

from typing import Any, TypeVar

import torch.distributed as dist
from torch import nn

from ..averaging import Averaging
from ..errors import InputError
from ..model import HyperMask
from ..wrapping import check_whole
from .reducer import average_gradients

M = TypeVar("M", bound=nn.Module)


def replicate(module: M, group: Any = None) -> M:
    """Makes a module with HyperMask models in it the same on every rank, and keeps it so while it is trained.

    dW = G^T H with the same H on every rank: so of a hypernetwork the gradient of the logits is averaged within the
    backward pass, N numbers, and that of the output drift, and all gradients of the hypernetwork are then the ranks'
    means. Those of all other Parameters are averaged as the backward pass ends. So any loop trains one model:

        model = hmf.distributed.replicate(model)

    A DistributedDataParallel around it averages the other Parameters itself. Every rank makes the same backward passes,
    of the same tasks.

    Args:
        module: a HyperMask, or a module with one in it: the one that DistributedDataParallel is given, where one is.
        group: a process group of torch.distributed; None for all processes.

    Returns:
        The module.

    Raises:
        InputError: no process group, no HyperMask in the module, or parameters that are sharded.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise InputError("there is no process group: torch.distributed.init_process_group() comes first")
    for part in module.modules():
        if isinstance(part, HyperMask):
            check_whole(part.net, part, part.hypernet, part.hypernet.output)
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
    average_gradients(module, group)
    marked: Any = module
    marked._ddp_params_and_buffers_to_ignore = left_out  # noqa: SLF001  # what DistributedDataParallel asks for
    return module
