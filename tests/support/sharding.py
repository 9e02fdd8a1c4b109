"""What ranks do in tests/training/test_sharded_checkpoint.py: here, where a process can import it."""

import functools
import itertools
import os
import resource
import signal
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import hypermask_fast as hmf
from hypermask_fast.processes import local, ranks_of
from hypermask_fast.ranks import Ranks
from hypermask_fast.training import checkpoint, run, step, stored, tensor_files
from hypermask_fast.training.config import RunConfig, TrainingConfig, load_preset, stored_config
from hypermask_fast.training.result import Result
from hypermask_fast.training.trainer import Trainer
from support.networks import blob_model, blob_scenario
from support.told import refusal

SMALL = {
    "data.tasks": 2,
    "training.iterations": 6,
    "training.batch_size": 512,
    "training.validate_every": 2,
    "training.keep": "best",
    "hypernet.hidden": "[6]",
    "hypernet.embedding": 4,
    "target.hidden": "[6, 5]",
}
CHUNKS = {"hypernet.chunk_size": 40}


@functools.cache
def scenario() -> Any:
    return run.read_scenario(config_of("dense"))


def config_of(kind: str) -> RunConfig:
    return load_preset("split-digits").with_values(SMALL | (CHUNKS if kind == "chunks" else {}))


def in_group(rank: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """function(rank, *arguments) in a process group of all processes that are launched together."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    return function(rank, *arguments)


def mesh_of(shape: tuple[int, ...]) -> DeviceMesh:
    """Of all ranks; two dimensions: replicas of shards."""
    return init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])


def loaded(run_dir: Path, model: hmf.HyperMask) -> checkpoint.Checkpoint:
    """The run's checkpoint, as the Trainer loads it; the model is what it goes into."""
    config = stored_config(run_dir)
    samples = [len(task.train) for task in scenario().tasks]
    tensors, state = stored.load(run_dir, model, len(samples), config.training, config.digests(), samples)
    return checkpoint.Checkpoint(tensors, state, run_dir)


def sharded_model(run_dir: Path, shape: tuple[int, ...]) -> hmf.HyperMask:
    return hmf.distributed.shard(run.build_model(stored_config(run_dir), scenario()), mesh_of(shape))


def save_again(rank: int, run_dir: Path, shape: tuple[int, ...]) -> None:
    """The run's checkpoint, whoever has saved it, saved by a mesh of ranks."""
    model = sharded_model(run_dir, shape)
    tensors, state, _ = loaded(run_dir, model)
    checkpoint.save(
        run_dir, f"{state['task']:03d}-{state['iteration']:07d}", tensors, state, ranks_of(model.hypernet.processes)
    )


def differences(rank: int, sources: list[Path], ordinary: Path, shape: tuple[int, ...]) -> dict[str, Any]:
    """By source, the tensors of which this rank has not exactly its slice, and how many DTensors it has."""
    model = sharded_model(ordinary, shape)
    return {source.name: _difference(source, ordinary, model, shape[-1]) for source in sources}


def _difference(source: Path, ordinary: Path, model: hmf.HyperMask, shards: int) -> tuple[list[str], int]:
    expected, found = checkpoint.load(ordinary), loaded(source, model)
    wrong = [*(expected.tensors.keys() ^ found.tensors.keys()), *(["state"] if expected.state != found.state else [])]
    parts = 0
    for name, value in found.tensors.items():
        whole = expected.tensors[name]
        if hasattr(value, "device_mesh"):
            parts += 1
            (dim,) = (placement.dim for placement in value.placements if placement.is_shard())
            chunks, number = whole.chunk(shards, dim), value.device_mesh.get_local_rank("shard")
            whole = chunks[number] if number < len(chunks) else whole.narrow(dim, 0, 0)
        if value.dtype != whole.dtype or not torch.allclose(local(value), whole, 0, 0, equal_nan=True):
            wrong.append(name)
    checkpoint.restore_model(model, found.tensors)
    for name, value in model.state_dict().items():
        if (there := found.tensors.get(f"model.{name}")) is not None and not torch.equal(local(value), local(there)):
            wrong.append(f"restored {name}")
    return wrong, parts


def refusals(rank: int, folders: list[Path], altered_from: Path, shape: tuple[int, ...]) -> list[str]:
    """What this rank is told of each run's checkpoint."""
    model = sharded_model(altered_from, shape)
    return [refusal(functools.partial(loaded, folder, model)) for folder in folders]


# -- saves that fail, of a few tensors on two ranks ------------------------------------------------------------------

OLD, NEW = {"task": 1}, {"task": 2}
CHANGES = (
    (os, "replace"),
    (os, "mkdir"),
    (os, "rmdir"),
    (os, "unlink"),
    (os, "fsync"),
    (tensor_files, "save_file"),
    (Path, "write_text"),
    (Ranks, "told"),
)


def whole(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors: two that are sharded, and one that is not."""
    first = 100.0 * state["task"]
    return {
        "rows": torch.arange(first, first + 15).view(5, 3),
        "columns": torch.arange(first, first + 21).view(3, 7),
        "rest": torch.full((3,), first),
    }


def save_replicas(rank: int, run_dir: Path, state: dict[str, Any]) -> None:
    tensors = {name: tensor + rank for name, tensor in whole(state).items()}  # so that it shows whose are saved
    checkpoint.save(run_dir, f"000-{state['task']:07d}", tensors, state, Ranks.of())


def save(rank: int, run_dir: Path, state: dict[str, Any]) -> None:
    mesh, tensors = mesh_of((dist.get_world_size(),)), whole(state)
    for name, dim in (("rows", 0), ("columns", 1)):
        tensors[name] = distribute_tensor(tensors[name], mesh, [Shard(dim)])
    checkpoint.save(run_dir, f"000-{state['task']:07d}", tensors, state)


def save_and_die(rank: int, run_dir: Path, victim: int, moment: int) -> None:
    """Saves NEW; one rank is killed right before the change with this number on its disk, or the talk to others."""
    done = itertools.count(1)

    def dying(call: Callable[..., Any]) -> Callable[..., Any]:
        def change(*args: Any, **kwargs: Any) -> Any:
            if next(done) == moment:
                if call.__name__ == "save_file":
                    args[1].write_bytes(b"half of it")
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return change

    mesh_of((dist.get_world_size(),))  # which also talks
    if rank == victim:
        for owner, name in CHANGES:
            setattr(owner, name, dying(getattr(owner, name)))
    save(rank, run_dir, NEW)


def failing_saves(rank: int, run_dir: Path) -> dict[str, str]:
    """What this rank is told where one can't write, by who that is and what fails."""
    told = {}

    def fails(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    for victim in range(dist.get_world_size()):
        for owner, name in CHANGES[:2] + CHANGES[5:7] if victim == 0 else CHANGES[5:6]:
            call = getattr(owner, name)
            if rank == victim:
                setattr(owner, name, fails)
            told[f"{victim} {name}"] = refusal(lambda: save(rank, run_dir, NEW))
            setattr(owner, name, call)
    for victim in range(dist.get_world_size()):  # what the system itself does
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        if rank == victim:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20, limits[1]))
        told[f"{victim} limit"] = refusal(lambda: save(rank, run_dir, NEW))
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    call = tensor_files.save_file
    if rank == 0:
        tensor_files.save_file = fails
    told["0 replicas"] = refusal(lambda: save_replicas(rank, run_dir, NEW))
    tensor_files.save_file = call
    return told


# -- the Trainer -------------------------------------------------------------------------------------------------------


class Died(Exception):
    """What ends training at a certain step."""


def model_of(kind: str) -> hmf.HyperMask:
    torch.manual_seed(1)
    config = hmf.HypernetConfig(embedding=8, hidden=(12,), chunk_size={"dense": None, "chunks": 10}[kind])
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))
    return hmf.HyperMask(net, 2, 20, config, beta=0.1, lam=1e-3)


def trains(rank: int, run_dir: Path, kind: str, shape: tuple[int, ...] | None, steps: int | None) -> Result:
    """Goes on in the folder, on a mesh or, for None, in a single process, until it dies after so many steps."""
    model, done, do = model_of(kind), itertools.count(), step.TaskWork.step

    def dying(*arguments: Any, **named: Any) -> Any:
        if next(done) == steps:
            raise Died
        return do(*arguments, **named)

    if shape is not None:
        hmf.distributed.shard(model, mesh_of(shape))
    step.TaskWork.step = dying
    config = TrainingConfig(iterations=12, batch_size=32, lr=0.01, checkpoint_every=3, validate_every=4, keep="best")
    try:
        return Trainer(model, blob_scenario(2), config, run_dir=run_dir, progress=False).fit(resume=True)
    finally:
        step.TaskWork.step = do


def trains_until_it_dies(*arguments: Any) -> str:
    try:
        trains(*arguments)
    except Died:
        return "died"
    return "ended"


def with_load_model(rank: int, run_dir: Path, kind: str, shape: tuple[int, ...]) -> tuple[int, str]:
    """What `load_model` says of a sharded model, of the right kind and of another one."""
    model = hmf.distributed.shard(model_of(kind), mesh_of(shape))
    learned = run.load_model(run_dir, model)
    other = hmf.distributed.shard(model_of({"dense": "chunks", "chunks": "dense"}[kind]), mesh_of(shape))
    return learned, refusal(lambda: run.load_model(run_dir, other))


# -- torch.distributed.checkpoint --------------------------------------------------------------------------------------

OPTIMISERS = {
    "torch": lambda model: torch.optim.Adam(model.parameters(), 1e-2),
    "default": lambda model: hmf.optim.Adam(model, 1e-2),
    "step_in_backward": lambda model: hmf.optim.Adam(model, 1e-2, step_in_backward=True),
}


def with_dcp(rank: int, folder: Path, kind: str, optimiser: str, helpers: bool) -> list[str]:
    """Names of tensors that torch.distributed.checkpoint does not bring back, or that it changes by looking.

    helpers: get_state_dict and set_state_dict, or state_dict() and load_state_dict() themselves.
    """
    model, optimizer = _trained(kind, optimiser, 2)
    before = _everything(model, optimizer)
    saved = _state_dicts(model, optimizer, helpers)
    wrong = _unequal("by looking", before, _everything(model, optimizer))
    dcp.save(saved, checkpoint_id=folder)
    other, another = _trained(kind, optimiser, 1)
    wrong += [] if _unequal("", before, _everything(other, another)) else ["nothing would be loaded"]
    loaded = _state_dicts(other, another, helpers)
    dcp.load(loaded, checkpoint_id=folder)
    if helpers:
        set_state_dict(other, another, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    else:
        other.load_state_dict(loaded["model"])
        another.load_state_dict(loaded["optimizer"])
    return wrong + _unequal("loaded", before, _everything(other, another))


def untrained_with_dcp(rank: int, kind: str, optimiser: str) -> list[str]:
    """What get_state_dict changes that asks an optimiser which has not stepped yet for its state."""
    model, optimizer = _trained(kind, optimiser, 0)
    before = _everything(model, optimizer)
    get_state_dict(model, optimizer)
    wrong = _unequal("by looking", before, _everything(model, optimizer))
    _train(model, optimizer, 1)
    return wrong + ([] if _unequal("", before, _everything(model, optimizer)) else ["nothing is trained"])


def _trained(kind: str, optimiser: str, steps: int) -> tuple[hmf.HyperMask, torch.optim.Optimizer]:
    """A sharded model in task 1, and its optimiser."""
    config = hmf.HypernetConfig(embedding=8, hidden=(12,), chunk_size={"dense": None, "chunks": 10}[kind])
    model = hmf.distributed.shard(blob_model(2, hypernetwork=config))
    model.begin_task(1)
    optimizer = OPTIMISERS[optimiser](model)
    _train(model, optimizer, steps)
    return model, optimizer


def _train(model: hmf.HyperMask, optimizer: torch.optim.Optimizer, steps: int) -> None:
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    for _ in range(steps):
        optimizer.zero_grad()
        mask = model.mask(1)
        (model(x, mask).square().mean() + model.regularizer(mask)).backward()
        optimizer.step()


def _state_dicts(model: hmf.HyperMask, optimizer: torch.optim.Optimizer, helpers: bool) -> dict[str, Any]:
    states = get_state_dict(model, optimizer) if helpers else (model.state_dict(), optimizer.state_dict())
    return dict(zip(("model", "optimizer"), states, strict=True))


def _everything(model: hmf.HyperMask, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """What this rank has of model and moments."""
    found = dict(model.state_dict())
    found |= {f"{name} {key}": t for name, p in model.named_parameters() for key, t in optimizer.state[p].items()}
    return {name: local(tensor).detach().clone() for name, tensor in found.items()}


def _unequal(told: str, before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> list[str]:
    alike = [name for name in before if name in after and torch.equal(before[name], after[name])]
    return [f"{name} {told}" for name in before if name not in alike]
