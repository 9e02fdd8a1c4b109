"""Checkpoints: tensors as safetensors, everything else as JSON, written so that a kill at any moment harms nothing.

A run's folder holds `checkpoint.json`, which names one `checkpoint-TASK-ITERATION.safetensors` and its SHA-256.
The tensor file is complete on disk before checkpoint.json is replaced, and the older one is deleted after that:
at every moment checkpoint.json names a whole file. Nothing is ever unpickled.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import InputError
from ..files import writing
from ..model_state import PREFIX, load_network_state, network_state

MANIFEST = "checkpoint.json"
_SCRATCH = ".checkpoint"
_FORMAT = 1
_REMEDY = ": restore it, or start a new run in another folder"
_MODEL = "model."
_OPTIMIZER = "optimizer."


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


def load(run_dir: Path, device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The run's checkpoint as (tensors, state); the newest where the run replaces it meanwhile.

    Raises:
        InputError: there is none, or it is cut off, altered or unreadable.
    """
    while True:
        manifest = _read_manifest(run_dir / MANIFEST)
        try:
            return _read_tensors(run_dir / manifest["file"], manifest["sha256"], device), manifest["state"]
        except InputError:
            if _read_manifest(run_dir / MANIFEST) == manifest:
                raise
        # The run has saved another checkpoint and removed this one.


def _read_tensors(path: Path, digest: str, device: torch.device | str) -> dict[str, Tensor]:
    """The tensors of exactly the file that has the digest."""
    try:
        with path.open("rb") as file:
            if _digest(file) != digest:
                raise InputError(
                    f"{path} is cut off or was altered (its SHA-256 is not the one in {MANIFEST}){_REMEDY}"
                )
            tensors = load_file(path, device=str(device))
            if not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                raise InputError(f"{path} was replaced while it was read{_REMEDY}")
            return tensors
    except FileNotFoundError as error:
        raise InputError(f"{path.parent / MANIFEST} names {path.name}, which is missing{_REMEDY}") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise InputError(f"{path} is not a safetensors file: {error}{_REMEDY}") from error


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"no checkpoint in {path.parent}: {path.name} is missing") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(f"{path} is cut off or was altered ({error}){_REMEDY}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise InputError(f"{path} is not a checkpoint of format {_FORMAT}{_REMEDY}")
    digest = manifest.pop("manifest_sha256", None)
    if digest != _manifest_digest(manifest) or Path(manifest["file"]).name != manifest["file"]:
        raise InputError(f"{path} was altered (its own checksum does not match){_REMEDY}")
    return manifest


# -- what a checkpoint holds -----------------------------------------------------------------------------------------


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's weights, tied ones once; the anchor is the Trainer's to save, only within a task."""
    return {_MODEL + name: tensor for name, tensor in network_state(model).items()}


def restore_model(model: nn.Module, tensors: dict[str, Tensor], prefix: str = _MODEL) -> None:
    """Copies a checkpoint's weights into `model`.

    Raises:
        InputError: names or shapes differ: the checkpoint is of another network.
    """
    stored = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    own = network_state(model)
    for name in sorted(name for name in own.keys() | stored.keys() if not name.startswith(PREFIX)):
        if name not in stored or name not in own:
            where = "the checkpoint" if name not in stored else "this network"
            raise InputError(f"the checkpoint is of another network: {name} is not in {where}")
        if own[name].shape != stored[name].shape or own[name].dtype != stored[name].dtype:
            raise InputError(
                f"the checkpoint is of another network: {name} is {_describe(stored[name])} there, "
                f"{_describe(own[name])} here"
            )
    load_network_state(model, stored)


def check_settings(run_dir: Path, state: dict[str, Any], settings: Sequence[str]) -> None:
    """Raises InputError unless the checkpoint was saved under one of these settings, see `RunConfig.digest`."""
    if state.get("settings") not in settings:
        raise InputError(
            f"the checkpoint in {run_dir} was saved under other settings than its config.toml has: restore that file, "
            "or start a new run in another folder"
        )


def load_model(run_dir: Path, model: nn.Module, *settings: str) -> int:
    """Loads the run's newest weights into `model`; returns how many tasks are learned to the end."""
    tensors, state = load(run_dir)
    restore_model(model, tensors)
    check_settings(run_dir, state, settings)
    return state["task"]


def optimizer_tensors(optimizer: Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Moments and step counts of every parameter that has them, by the parameter's name in `model`."""
    return {
        f"{_OPTIMIZER}{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(optimizer: Optimizer, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    for key, value in tensors.items():
        if key.startswith(_OPTIMIZER):
            name, entry = key.removeprefix(_OPTIMIZER).split("/")
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


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
