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
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import hypermask_fast as hmf
from hypermask_fast import InputError
from hypermask_fast.model_state import local
from hypermask_fast.training import checkpoint, run, stored, tensor_files
from hypermask_fast.training.config import RunConfig, load_preset, stored_config
from hypermask_fast.training.ranks import Ranks

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
    """Of the first ranks; two dimensions: replicas of shards."""
    numbers = torch.arange(torch.tensor(shape).prod()).view(shape)
    return DeviceMesh("cpu", numbers, mesh_dim_names=("replicate", "shard")[-len(shape) :])


def shard(model: hmf.HyperMask, mesh: DeviceMesh) -> hmf.HyperMask:
    hypernet: Any = model.hypernet
    chunked = hasattr(hypernet, "chunk_embeddings")
    owner, names = (hypernet, ["chunk_embeddings"]) if chunked else (hypernet.output, ["weight", "bias"])
    placements = [Replicate()] * (mesh.ndim - 1) + [Shard(0)]
    for name in names:
        value = getattr(owner, name).detach()
        setattr(owner, name, nn.Parameter(distribute_tensor(value, mesh, placements)))
    return model


def loaded(run_dir: Path, model: hmf.HyperMask) -> checkpoint.Checkpoint:
    """The run's checkpoint, as the Trainer loads it; the model is what it goes into."""
    config = stored_config(run_dir)
    samples = [len(task.train) for task in scenario().tasks]
    tensors, state = stored.load(run_dir, model, len(samples), config.training, config.digests(), samples)
    return checkpoint.Checkpoint(tensors, state, run_dir)


def sharded_model(run_dir: Path, shape: tuple[int, ...]) -> hmf.HyperMask | None:
    """The run's model, sharded over the first ranks; None on the others."""
    mesh, config = mesh_of(shape), stored_config(run_dir)
    if mesh.get_coordinate() is None:
        return None
    return shard(run.build_model(config, scenario()), mesh)


def save_again(rank: int, run_dir: Path, shape: tuple[int, ...]) -> None:
    """The run's checkpoint, whoever has saved it, saved by a mesh of ranks."""
    model = sharded_model(run_dir, shape)
    if model is not None:
        tensors, state, _ = loaded(run_dir, model)
        name = f"{state['task']:03d}-{state['iteration']:07d}"
        checkpoint.save(run_dir, name, tensors, state, Ranks.of_model(model))


def differences(rank: int, sources: list[Path], ordinary: Path, shape: tuple[int, ...]) -> dict[str, Any]:
    """By source, the tensors of which this rank has not exactly its slice, and how many DTensors it has."""
    model = sharded_model(ordinary, shape)
    return {} if model is None else {source.name: _difference(source, ordinary, model, shape[-1]) for source in sources}


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


def refusals(rank: int, folders: list[Path], shape: tuple[int, ...]) -> list[str]:
    """What this rank is told of each run's checkpoint."""
    told = []
    model = sharded_model(folders[0], shape)
    for folder in folders if model is not None else ():
        told.append(_told(functools.partial(loaded, folder, model)))
    return told


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
    (Ranks, "gathered"),
)


def whole(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors: two that are sharded, and one that is not."""
    first = 100.0 * state["task"]
    return {
        "rows": torch.arange(first, first + 15).view(5, 3),
        "columns": torch.arange(first, first + 21).view(3, 7),
        "rest": torch.full((3,), first),
    }


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
            told[f"{victim} {name}"] = _told(lambda: save(rank, run_dir, NEW))
            setattr(owner, name, call)
    for victim in range(dist.get_world_size()):  # what the system itself does
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        if rank == victim:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20, limits[1]))
        told[f"{victim} limit"] = _told(lambda: save(rank, run_dir, NEW))
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return told


def _told(call: Callable[[], object]) -> str:
    try:
        call()
    except InputError as error:
        return str(error)
    return "accepted"
