"""What makes processes train one module, however its hypernetworks' work is divided."""

import hashlib
from typing import Any

import torch
from torch import nn

from ..averaging import Averaging
from ..errors import InputError
from ..model import HyperMask
from ..wrapping import check_whole
from .reducer import Reducer


def models_in(module: nn.Module, taker: str) -> list[HyperMask]:
    """The HyperMask models in a module. Raises InputError where there is none, or one is sharded by others."""
    models = [part for part in module.modules() if isinstance(part, HyperMask)]
    if not models:
        raise InputError(f"{taker} takes a HyperMask or a module with one in it; {type(module).__name__} has none")
    for model in models:
        check_whole(model)
    return models


def join(module: nn.Module, averaging: Averaging) -> None:
    """Gives every rank the first one's Parameters and buffers, and has gradients outside of hypernetworks averaged.

    Args:
        module: a HyperMask, or a module with some in it, not sharded yet.
        averaging: over all ranks.

    Raises:
        InputError: on every rank, where modules differ in more than values.
    """
    _check_same(module, averaging)
    averaging.make_equal([*module.parameters(), *module.buffers()])
    models = [part for part in module.modules() if isinstance(part, HyperMask)]
    reducer = Reducer([module, *(model for model in models if model is not module)], averaging)
    for model in models:
        model.reducer = reducer
    # What DistributedDataParallel asks of the module that it is given.
    inner = {id(parameter) for model in models for parameter in model.hypernet.parameters()}
    marked: Any = module
    marked._ddp_params_and_buffers_to_ignore = [  # noqa: SLF001
        name for name, parameter in module.named_parameters() if id(parameter) in inner
    ]


def _check_same(module: nn.Module, averaging: Averaging) -> None:
    """Raises InputError, on every rank, where the ranks' modules are not of one shape and of the same settings."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    parts = [repr([(name, tuple(t.shape), str(t.dtype), t.device.type, t.requires_grad) for name, t in tensors])]
    for part in module.modules():
        if isinstance(part, HyperMask):
            parts.append(repr((part.sparsity, part.drift, part.classes, part.tasks, part.frozen, part.heads())))
    digest = hashlib.sha256("\n".join(parts).encode()).digest()
    like = next(module.parameters())
    found = averaging.gathered(torch.tensor(list(digest), dtype=torch.uint8, device=like.device))
    others = (found != found[0]).any(1).nonzero().flatten().tolist()
    if others:
        raise InputError(
            f"the model of rank {others[0]} is not that of rank 0: names, shapes, dtypes or devices of its tensors, "
            "tasks, sparsity or drifts differ"
        )
