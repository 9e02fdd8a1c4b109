"""Batch norm over all ranks' shares of a batch."""

from typing import TypeVar

from torch import nn

from ..errors import InputError
from ..masking.access import scope_of
from ..masking.norms import synchronise, uses_batches
from ..model import HyperMask
from .reducer import Reducer

M = TypeVar("M", bound=nn.Module)


def synchronise_batch_norm(module: M, evaluation: bool = False) -> M:
    """Has all batch norms of the HyperMask models in a module take the ranks' batches as shares of one.

    mean = sum_r n_r mean_r / n and var = sum_r n_r (var_r + (mean_r - mean)^2) / n over ranks r with n_r values per
    channel: normalisation, its gradient and the running statistics are those of one process with the whole batch,
    with shares of any sizes. On any device, where nn.SyncBatchNorm needs a GPU. One exchange of 2 numbers per channel
    and rank in a layer's forward pass, and one of 2 per channel in its backward pass.

        model = hmf.distributed.synchronise_batch_norm(hmf.distributed.replicate(model))

    Without it each rank normalises by its own batch, and running statistics are the ranks' means after each backward
    pass. Passes in training mode are then made by all ranks together, of the same tasks.

    Args:
        module: one that is replicated or sharded.
        evaluation: whether also in evaluation mode, where batch statistics are used there (the official fidelity), the
            ranks' batches are shares of one. Then all of them make each pass.

    Returns:
        The module.

    Raises:
        InputError: a module that is neither replicated nor sharded, or without batch norm.
    """
    count = 0
    for part in module.modules():
        if isinstance(part, HyperMask):
            reducer = part.reducer
            if not isinstance(reducer, Reducer):
                raise InputError("synchronise_batch_norm follows hmf.distributed.replicate(model) or shard(model)")
            found = synchronise(part.net, scope_of(part.net), reducer.ranks, evaluation)
            if found:
                reducer.shares.add(True)
            if found and evaluation and uses_batches(part.net):
                reducer.shares.add(False)
            count += found
    if not count:
        raise InputError(f"{type(module).__name__} has no HyperMask model with batch norm in it")
    return module
