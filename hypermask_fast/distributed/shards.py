"""Shards: every process owns a slice of a hypernetwork's output, and what generates it."""

import gc
from itertools import accumulate, pairwise
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..chunked import ChunkedHyperNetwork
from ..dense import HyperNetwork
from ..errors import InputError
from ..model import HyperMask
from ..processes import REPLICATE, SHARD, Shards
from ..ranks import check_initialized
from ..wrapping import check_whole
from .agreement import agree, facts_of
from .reducer import average_gradients
from .replicas import hypermasks, leave_out_of_ddp

M = TypeVar("M", bound=nn.Module)


def shard(module: M, mesh: Any = None) -> M:
    """Gives every rank a slice of the hypernetwork's output layer, which is most of a model; in place.

    A dense hypernetwork's output layer is sliced by rows, a chunked one's chunk embeddings are: contiguous, near-equal
    slices, as torch.chunk cuts them. They become DTensor Parameters, and what follows them, Adam's moments and the
    anchor's drift targets, are DTensors too. Everything else is the same on every rank. All begin with the first rank's
    values. A step sends the N logits, their gradient's N numbers, the target's gradients, and little else:

        model = hmf.distributed.shard(HyperMask(net, 10, hypernetwork=config))
        optimizer = hmf.optim.Adam(model)

    Every rank makes the same calls of the model in the same order, of the same tasks: of `mask`, `state_dict`'s
    consumers, `save_pretrained` and `export` too.

    Args:
        module: a HyperMask, or a module with one in it (which may be sharded already). Optimisers are made afterwards.
        mesh: a DeviceMesh of all ranks: 1-D, or 2-D with dimensions named ("replicate", "shard"), for replicas of
            shards. None: all ranks, 1-D.

    Returns:
        The module.

    Raises:
        InputError: no process group, another mesh, a hypernetwork that can't be cut for so many ranks or is sharded,
            replicated or held by an optimiser already, or ranks that disagree about the model. Nothing has changed.
    """
    check_initialized()
    problem, facts, models = None, {}, []
    try:
        models = hypermasks(module, "shard")
        if module not in models and mesh is None and all(isinstance(m.hypernet.processes, Shards) for m in models):
            return _joined(module)  # a new one around models that are sharded already
        mesh = _mesh(models[0], mesh)
        facts = {
            "kind of device": mesh.device_type,
            "mesh": (mesh.mesh.tolist(), mesh.mesh_dim_names),
            **facts_of(models),
        }
        for model in models:
            _check(model, mesh)
    except InputError as error:
        problem = str(error)
    agree(facts, problem)
    for model in models:
        _shard(model, mesh)
    return _joined(module)


def _joined(module: M) -> M:
    average_gradients(module)
    leave_out_of_ddp(module)
    return module


def _mesh(model: HyperMask, mesh: Any) -> Any:
    """The mesh to shard on, which has all ranks."""
    from torch.distributed.device_mesh import DeviceMesh

    kind, world = model.hypernet.output.weight.device.type, dist.get_world_size()
    if mesh is None:
        everyone: Any = dist.group.WORLD
        return DeviceMesh.from_group(everyone, kind, mesh_dim_names=(SHARD,))
    if not isinstance(mesh, DeviceMesh):
        raise InputError(f"mesh is a DeviceMesh of torch.distributed, not {type(mesh).__name__}")
    names = mesh.mesh_dim_names
    if mesh.ndim > 1 and names != (REPLICATE, SHARD):
        raise InputError(f'a mesh to shard on has the dimensions ("{REPLICATE}", "{SHARD}"), not {names}')
    if mesh.ndim == 1 and names not in (None, (SHARD,)):
        raise InputError(f'a mesh of one dimension is to shard on: it is named "{SHARD}" or not at all, not {names}')
    ranks = mesh.mesh.flatten().tolist()
    if sorted(ranks) != list(range(world)):
        raise InputError(f"the mesh has {len(ranks)} ranks, the process group {world}: a mesh to shard on has them all")
    if ranks[0] != 0:
        raise InputError(f"the mesh begins with rank {ranks[0]}: it must begin with rank 0, whose values all take")
    if mesh.device_type != kind:
        raise InputError(f"the mesh is of {mesh.device_type}, the hypernetwork on {kind}: they must be the same")
    return mesh if names else DeviceMesh.from_group(mesh.get_group(), kind, mesh=mesh.mesh, mesh_dim_names=(SHARD,))


def _check(model: HyperMask, mesh: Any) -> None:
    """Raises InputError where a model can't be sharded so."""
    hypernet = model.hypernet
    if hypernet.processes is not None:
        done = "sharded" if isinstance(hypernet.processes, Shards) else "replicated"
        raise InputError(f"the model is {done} already")
    check_whole(model.net, model, hypernet, hypernet.output)
    devices = {str(p.device) for p in (*model.parameters(), *model.buffers())}
    if len(devices) > 1:
        raise InputError(f"the model's parameters are on several devices, {', '.join(sorted(devices))}: move it to one")
    ranks, rows = mesh.size(mesh.ndim - 1), len(_sliced(hypernet)[0])
    if not _cut(rows, ranks):
        kind = "chunk" if isinstance(hypernet, ChunkedHyperNetwork) else "row"
        fits = next(fewer for fewer in range(ranks, 0, -1) if _cut(rows, fewer))
        raise InputError(
            f"a hypernetwork of {rows} {kind}{'s' * (rows > 1)} can't be cut into equal slices for {ranks} ranks (the "
            f"last would have none): the most that can share it are {fits}"
        )
    parameters = {id(p) for p in _sliced(hypernet)}
    if any(id(p) in parameters for each in _optimizers() for group in each.param_groups for p in group["params"]):
        raise InputError("an optimizer holds the model's parameters already: shard the model first, then make it")


def _optimizers() -> list[torch.optim.Optimizer]:
    return [each for each in gc.get_objects() if issubclass(type(each), torch.optim.Optimizer)]


def _sliced(hypernet: HyperNetwork) -> list[Tensor]:
    """The parameters whose rows are to be owned by ranks."""
    if isinstance(hypernet, ChunkedHyperNetwork):
        return [hypernet.chunk_embeddings]
    return [hypernet.output.weight, hypernet.output.bias]


def _cut(rows: int, ranks: int) -> list[int]:
    """Rows of each rank, as torch.chunk has them; none where a rank would be left without."""
    most = -(-rows // ranks)
    sizes = [min(most, rows - most * rank) for rank in range(ranks)]
    return sizes if sizes[-1] > 0 else []


def _shard(model: HyperMask, mesh: Any) -> None:
    from torch.distributed.tensor import distribute_tensor

    hypernet = model.hypernet
    rows = _cut(len(_sliced(hypernet)[0]), mesh.size(mesh.ndim - 1))
    chunked = hypernet if isinstance(hypernet, ChunkedHyperNetwork) else None
    ends = list(accumulate(rows, initial=0))
    shards = Shards(mesh, rows if chunked is None else [chunked.entries(*span) for span in pairwise(ends)])
    sliced = set(map(id, _sliced(hypernet)))
    shards.ranks.make_equal(t for t in (*hypernet.parameters(), *hypernet.buffers()) if id(t) not in sliced)

    def slices(whole: Tensor, dim: int) -> Any:
        return distribute_tensor(whole.detach(), mesh, shards.placements(dim))

    for part in (hypernet, hypernet.output):
        for name, parameter in list(part.named_parameters(recurse=False)):
            if id(parameter) in sliced:
                setattr(part, name, nn.Parameter(slices(parameter, 0), parameter.requires_grad))
    if model.anchor is not None:
        of_tasks, *others = model.anchor.targets or (None,)
        shards.ranks.make_equal([model.anchor.weights, *others])
        if of_tasks is not None:
            model.anchor = model.anchor._replace(targets=(slices(of_tasks, 1), *others))
    if chunked is not None:
        chunked.hold(*ends[shards.number : shards.number + 2])
    hypernet.processes = shards
