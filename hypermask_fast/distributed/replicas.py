"""Replicas: every process has the whole model, whose gradients are averaged."""

from typing import Any, TypeVar

from torch import nn

from ..errors import InputError
from ..model import HyperMask
from ..processes import Replicas, Shards
from ..ranks import check_initialized
from ..wrapping import check_whole
from .agreement import agree, facts_of
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
        InputError: no process group, no HyperMask in the module, parameters that are sharded, or ranks that disagree
            about the model.
    """
    check_initialized()
    problem, facts, models = None, {}, []
    try:
        models = hypermasks(module, "replicate")
        for model in models:
            if isinstance(model.hypernet.processes, Shards):
                raise InputError("the model is sharded already: its ranks train one model, in any loop")
            check_whole(model.net, model, model.hypernet, model.hypernet.output)
        facts = facts_of(models)
    except InputError as error:
        problem = str(error)
    agree(facts, problem, group)
    for model in models:
        hypernet = model.hypernet
        hypernet.processes = Replicas(group)
        hypernet.processes.ranks.make_equal([*hypernet.parameters(), *hypernet.buffers()])
    average_gradients(module, group)
    leave_out_of_ddp(module)
    return module


def hypermasks(module: nn.Module, taker: str) -> list[HyperMask]:
    """The HyperMask models in a module. Raises InputError where there is none."""
    found = [part for part in module.modules() if isinstance(part, HyperMask)] if isinstance(module, nn.Module) else []
    if not found:
        raise InputError(f"{taker} takes a HyperMask or a module with one in it; {type(module).__name__} has none")
    return found


def leave_out_of_ddp(module: nn.Module) -> None:
    """Says to DistributedDataParallel(module) that the hypernetworks are not its own."""
    left_out = []
    for name, part in module.named_modules():
        if isinstance(part, HyperMask):
            prefix = f"{name}.hypernet." if name else "hypernet."
            tensors = (*part.hypernet.named_parameters(), *part.hypernet.named_buffers())
            left_out += [prefix + tensor for tensor, _ in tensors]
    marked: Any = module
    marked._ddp_params_and_buffers_to_ignore = left_out  # noqa: SLF001  # what DistributedDataParallel asks for
