"""Replicas: every process has the whole model, whose gradients are averaged."""

from typing import Any, TypeVar

import torch.distributed as dist
from torch import nn

from ..averaging import Averaging
from ..errors import InputError
from .joining import join, models_in

M = TypeVar("M", bound=nn.Module)


def replicate(module: M, group: Any = None) -> M:
    """Makes a module with HyperMask models in it the same on every rank, and keeps it so while it is trained.

    dW = G^T H with the same H on every rank: so of a hypernetwork the gradient of the logits is averaged within the
    backward pass, N numbers, and that of the output drift, and all gradients of the hypernetwork are then the ranks'
    means. Those of all other Parameters are averaged as the backward pass ends. So any loop trains all ranks' batches:

        model = hmf.distributed.replicate(model)

    DistributedDataParallel(model), around it, averages the other Parameters itself. Every rank makes the same backward
    passes, of the same tasks.

    Args:
        module: a HyperMask, or a module with one in it (the one that DistributedDataParallel is given, if any).
        group: a process group of torch.distributed; None for all processes.

    Returns:
        The module.

    Raises:
        InputError: no process group, no HyperMask in the module, parameters that are sharded, or a module that is not
            the same on all ranks in all but its values.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise InputError("there is no process group: torch.distributed.init_process_group() comes first")
    models = models_in(module, "replicate")
    averaging = Averaging(group)
    join(module, averaging)
    for model in models:
        model.hypernet.averaging = averaging
    return module
