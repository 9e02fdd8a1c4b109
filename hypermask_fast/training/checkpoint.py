"""Checkpoints: tensors as safetensors, everything else as JSON, written so that a kill at any moment harms nothing.

A run's folder holds `checkpoint.json`, which names one `checkpoint-TASK-ITERATION.safetensors` and its SHA-256.
The tensor file is complete on disk before checkpoint.json is replaced, and the older one is deleted after that:
at every moment checkpoint.json names a whole file. Nothing is ever unpickled.
"""

import hashlib
import json
import os
import re
import shutil
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import InputError
from ..files import writing
from ..model import HyperMask
from ..model_state import load_network_state, network_state

MANIFEST = "checkpoint.json"
REMEDY = ": restore it, or start a new run in another folder"
MODEL, BEST, OPTIMIZER = "model.", "best.", "optimizer."  # what names of tensors begin with
MOMENTS = "moments"  # the state's entry that names the parameters with moments; version 0.1.0 wrote none
_SCRATCH = ".checkpoint"
_FORMAT = 1


class Checkpoint(NamedTuple):
    """What `load` reads: tensors by name, JSON values, and the file that the tensors are from."""

    tensors: dict[str, Tensor]
    state: dict[str, Any]
    file: Path


def save(run_dir: Path, name: str, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Makes (tensors, state) the run's checkpoint.

    Args:
        run_dir: the run's folder, which exists.
        name: tells checkpoints of one run apart, such as "003-0001000".
        tensors: by name; state: JSON values (floats survive exactly).

    Raises:
        InputError: it can't be written; the one before is still there.
    """
    target = run_dir / f"checkpoint-{name}.safetensors"
    with writing(target):
        _save(run_dir, target, tensors, state)


def _save(run_dir: Path, target: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    partial = _scratch(run_dir) / target.name
    save_file({key: value.detach().contiguous() for key, value in tensors.items()}, partial)
    partial.chmod(partial.parent.stat().st_mode & 0o666)  # safetensors lets the owner alone read its files
    with partial.open("rb") as file:
        digest = _digest(file)
    _settle(partial, target)
    manifest = {"format": _FORMAT, "file": target.name, "sha256": digest, "state": state}
    manifest["manifest_sha256"] = _manifest_digest(manifest)
    partial = partial.with_name(MANIFEST)
    partial.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    _settle(partial, run_dir / MANIFEST)
    partial.parent.rmdir()
    for old in run_dir.glob("checkpoint-*"):
        if old != target:
            old.unlink()


def _scratch(run_dir: Path) -> Path:
    """An empty folder for files that are not whole yet, safetensors' own temporary ones among them, which a kill may
    leave there until the next checkpoint."""
    folder = run_dir / _SCRATCH
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()
    return folder


def exists(run_dir: Path) -> bool:
    """Whether the run has saved a checkpoint.

    Raises:
        InputError: it has, but checkpoint.json was taken away. A kill while the first one is saved leaves tensors
            without it as well, but then with the scratch folder.
    """
    manifest = run_dir / MANIFEST
    if manifest.exists():
        return True
    orphan = next(run_dir.glob("checkpoint-*"), None)
    if orphan is not None and not (run_dir / _SCRATCH).exists():
        if manifest.exists():  # the run has saved its first one since
            return True
        raise InputError(f"{manifest} is missing: restore it, or remove {orphan.name} to start the run over")
    return False


def load(run_dir: Path, device: torch.device | str = "cpu") -> Checkpoint:
    """The run's checkpoint; the newest where the run replaces it meanwhile. See `stored.load` for what it must hold.

    Raises:
        InputError: there is none, or it is cut off, altered or unreadable.
    """
    while True:
        manifest = _read_manifest(run_dir / MANIFEST)
        path = run_dir / manifest["file"]
        try:
            return Checkpoint(_read_tensors(path, manifest["sha256"], device), manifest["state"], path)
        except InputError:
            if _read_manifest(run_dir / MANIFEST) == manifest:
                raise
        # The run has saved another checkpoint and removed this one.


def state(run_dir: Path) -> dict[str, Any] | None:
    """The state of the run's checkpoint without its tensors; None where the run has saved none.

    Raises:
        InputError: checkpoint.json is damaged.
    """
    return _read_manifest(run_dir / MANIFEST)["state"] if (run_dir / MANIFEST).exists() else None


def _read_tensors(path: Path, digest: str, device: torch.device | str) -> dict[str, Tensor]:
    """The tensors of exactly the file that has the digest."""
    try:
        with path.open("rb") as file:
            if _digest(file) != digest:
                raise InputError(f"{path} is cut off or was altered (its SHA-256 is not the one in {MANIFEST}){REMEDY}")
            tensors = load_file(path, device=str(device))
            if not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                raise InputError(f"{path} was replaced while it was read{REMEDY}")
            return tensors
    except FileNotFoundError as error:
        raise InputError(f"{path.parent / MANIFEST} names {path.name}, which is missing{REMEDY}") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except (SafetensorError, KeyError) as error:  # KeyError: a dtype that PyTorch lacks
        reason = textwrap.shorten(str(error), 120)
        raise InputError(f"{path} is not a safetensors file of ours: {reason}{REMEDY}") from error


def _read_manifest(path: Path) -> dict[str, Any]:
    """checkpoint.json without its own digest, which is right; its entries have their types."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"no checkpoint in {path.parent}: {path.name} is missing") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is cut off or was altered ({error}){REMEDY}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise InputError(f"{path} is not a checkpoint of format {_FORMAT}{REMEDY}")
    digest = manifest.pop("manifest_sha256", None)
    if digest != _manifest_digest(manifest):
        raise InputError(f"{path} was altered (its own checksum does not match){REMEDY}")
    kinds = {name: type(value) for name, value in manifest.items()}
    if kinds != {"format": int, "file": str, "sha256": str, "state": dict}:
        raise InputError(f"{path} was altered (its entries are not those of a checkpoint){REMEDY}")
    if not re.fullmatch(r"checkpoint-[\w-]{1,100}\.safetensors", manifest["file"]):
        raise InputError(f"{path} was altered (the file that it names is no checkpoint's){REMEDY}")
    return manifest


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


# -- files ------------------------------------------------------------------------------------------------------------


def _settle(partial: Path, target: Path) -> None:
    """Puts a written file in its place, on the disk and not only in the cache."""
    for path in (partial, target.parent):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
        if path == partial:
            os.replace(partial, target)


def _digest(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 22):
        digest.update(block)
    return digest.hexdigest()


def _manifest_digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
