"""Checkpoints: tensors as safetensors, everything else as JSON, written so that a kill at any moment harms nothing.

A run's folder holds `checkpoint.json`, which names one `checkpoint-TASK-ITERATION.safetensors`, or, where tensors are
sharded over processes, one folder `checkpoint-TASK-ITERATION` of such files; see `manifest`. All of it is complete on
disk before checkpoint.json is replaced, and the older one is deleted after that: at every moment checkpoint.json names
a whole checkpoint. Nothing is ever unpickled.
"""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import InputError
from ..files import writing
from ..model import HyperMask
from ..model_state import load_network_state, network_state
from ..ranks import Ranks
from . import manifest, sharded
from .lock import taken
from .manifest import Manifest
from .slices import Layout
from .tensor_files import MANIFEST, settle, write

MODEL, BEST, OPTIMIZER = "model.", "best.", "optimizer."  # what names of tensors begin with
MOMENTS = "moments"  # the state's entry that names the parameters with moments; version 0.1.0 wrote none


class Checkpoint(NamedTuple):
    """What `load` reads: tensors by name, JSON values, and the file or folder that the tensors are from."""

    tensors: dict[str, Tensor]
    state: dict[str, Any]
    file: Path


# -- saving -----------------------------------------------------------------------------------------------------------


def save(
    run_dir: Path, name: str, tensors: dict[str, Tensor], state: dict[str, Any], ranks: Ranks | None = None
) -> None:
    """Makes (tensors, state) the run's checkpoint.

    Several processes make this call together, with the same names. Where DTensors are among the tensors, each process
    writes its slices, to a folder of files; other tensors are the first process's. Where none is, it alone writes.

    Args:
        run_dir: the run's folder, which exists.
        name: tells checkpoints of one run apart, such as "003-0001000".
        tensors: by name; state: JSON values (floats survive exactly).
        ranks: the processes; None: those among which the tensors are spread.

    Raises:
        InputError: it can't be written, on whichever process; the one before is still there.
    """
    ranks = sharded.spread_over(tensors.values()) if ranks is None else ranks
    layouts = {key: layout for key, tensor in tensors.items() if (layout := sharded.layout(key, tensor)) is not None}
    if layouts:
        sharded.save(run_dir, f"checkpoint-{name}", tensors, layouts, state, ranks)
        return
    with ranks.together():
        if ranks.first:
            target = f"checkpoint-{name}.safetensors"
            with writing(run_dir / target):
                partial = manifest.scratch(run_dir) / target
                written = write({key: sharded.whole(tensor) for key, tensor in tensors.items()}, partial)
                settle(partial, run_dir / target)
                manifest.replace(run_dir, Manifest(state, target, {target: written}))


class Consolidated(NamedTuple):
    """The file that has the checkpoint's tensors, and the folder whose place it has taken; None: it was so before."""

    file: Path
    parts: Path | None


def consolidate(run_dir: Path | str) -> Consolidated:
    """Makes the run's checkpoint the one that a single process would have saved; a kill at any moment harms nothing.

    Raises:
        InputError: there is none, it is damaged, the run is in use, or the file can't be written; the checkpoint is
            then as it was.
    """
    run_dir = Path(run_dir)
    there = manifest.read(run_dir)[0]
    if there.in_folder:
        with taken(run_dir):
            found = load(run_dir)  # by now the run may have saved another one
            if found.file.is_dir():
                save(run_dir, found.file.name.removeprefix("checkpoint-"), found.tensors, found.state)
                return Consolidated(Path(f"{found.file}.safetensors"), found.file)
            return Consolidated(found.file, None)
    return Consolidated(run_dir / there.target, None)


# -- loading ----------------------------------------------------------------------------------------------------------


def exists(run_dir: Path) -> bool:
    """Whether the run has saved a checkpoint.

    Raises:
        InputError: it has, but checkpoint.json was taken away. A kill while the first one is saved leaves tensors
            without it as well, but then with the scratch folder.
    """
    path = run_dir / MANIFEST
    if path.exists():
        return True
    orphan = next(run_dir.glob("checkpoint-*"), None)
    if orphan is not None and not (run_dir / manifest.SCRATCH).exists():
        if path.exists():  # the run has saved its first one since
            return True
        raise InputError(f"{path} is missing: restore it, or remove {orphan.name} to start the run over")
    return False


def load(
    run_dir: Path,
    device: torch.device | str = "cpu",
    layouts: Mapping[str, Layout] | None = None,
    ranks: Ranks | None = None,
) -> Checkpoint:
    """The run's checkpoint, saved by any number of processes; the newest where the run replaces it meanwhile.

    See `stored.load` for what it must hold.

    Args:
        run_dir: the run's folder.
        device: where the tensors go.
        layouts: which tensors are to be DTensors, and how. Of these only this process's slice is read. See
            `slices.layouts`.
        ranks: the processes that make this call together; None: this one alone.

    Raises:
        InputError: there is none, or it is cut off, altered or unreadable; on all processes where on one.
    """
    ranks = Ranks() if ranks is None else ranks
    while True:
        with ranks.together():
            found, read = _newest(run_dir, device, layouts or {})
        if len(set(ranks.told(read))) == 1:  # else the run has replaced it between two processes' reading
            return found


def _newest(run_dir: Path, device: torch.device | str, layouts: Mapping[str, Layout]) -> tuple[Checkpoint, str]:
    """What this process reads, and the digest of the manifest that it has read."""
    while True:
        there, digest = manifest.read(run_dir)
        try:
            return Checkpoint(
                sharded.read(run_dir, there, device, layouts), there.state, run_dir / there.target
            ), digest
        except InputError:
            if manifest.read(run_dir)[1] == digest:
                raise
        # The run has saved another checkpoint and removed this one.


def state(run_dir: Path) -> dict[str, Any] | None:
    """The state of the run's checkpoint without its tensors; None where the run has saved none.

    Raises:
        InputError: checkpoint.json is damaged.
    """
    return manifest.read(run_dir)[0].state if (run_dir / MANIFEST).exists() else None


# -- what a checkpoint holds -----------------------------------------------------------------------------------------


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's weights, tied ones once; the anchor is the Trainer's to save, only within a task."""
    return {MODEL + name: tensor for name, tensor in network_state(model).items()}


def restore_model(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copies a checkpoint's weights, which `stored.load` has checked, into `model`."""
    weights = {name.removeprefix(MODEL): value for name, value in tensors.items() if name.startswith(MODEL)}
    load_network_state(model, weights)


def warn_of_threads(state: dict[str, Any]) -> None:
    """A warning where a run on the CPU goes on with another number of threads than it was saved on: PyTorch's own
    products, such as the target network's, may add up in another order. Version 0.1.0 did not save the number."""
    before, now = state.get("threads"), torch.get_num_threads()
    if before not in (None, now):
        warnings.warn(
            f"the run was saved on {before} thread{'' if before == 1 else 's'} and goes on with {now}: its last digits "
            f"may differ from those of a run on one number of threads (OMP_NUM_THREADS={before} keeps it)",
            stacklevel=2,
        )


def model_settings(model: HyperMask) -> dict[str, Any]:
    """What decides a model's outputs besides its tensors, as JSON values."""
    return {"sparsity": float(model.sparsity), "fidelity": model.drift.fidelity, "masked": list(model.layout.names)}


def check_settings(run_dir: Path, state: dict[str, Any], settings: Sequence[str]) -> None:
    """Raises InputError unless the checkpoint was saved under one of these settings, see `RunConfig.digest`."""
    if state.get("settings") not in settings:
        raise InputError(
            f"the checkpoint in {run_dir} was saved under other settings than its config.toml has: restore that file, "
            "or start a new run in another folder"
        )


def optimizer_tensors(optimizer: Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Moments and step counts of every parameter that has them, by the parameter's name in `model`."""
    return {
        f"{OPTIMIZER}{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(optimizer: Optimizer, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    for key, value in tensors.items():
        if key.startswith(OPTIMIZER):
            name, entry = key.removeprefix(OPTIMIZER).split("/")
            optimizer.state[parameters[name]][entry] = value


def generator_tensors(device: torch.device) -> dict[str, Tensor]:
    """States of the default generators a run draws from."""
    states = {"generator.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["generator.cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_generators(tensors: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(tensors["generator.cpu"].cpu())
    if device.type == "cuda" and "generator.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["generator.cuda"].cpu(), device)
