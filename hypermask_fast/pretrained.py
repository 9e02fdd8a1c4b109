"""A model in a folder: hypermask.json says what it is, and names the safetensors file of its weights.

The tensor file is whole before hypermask.json is replaced, and the older one is deleted after that: at every moment
hypermask.json names a whole file. Nothing is ever pickled or unpickled.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, fields
from glob import escape
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .errors import InputError
from .files import write_atomic, writing
from .hypernet import HypernetConfig
from .life import TaskLife
from .masking.layout import MaskLayout
from .masking.norms import OWN
from .masking.selection import MASKED, PER_TASK, Row
from .model_state import PREFIX, first_names
from .processes import whole
from .regularizers import DriftConfig

MANIFEST = "hypermask.json"
_FORMAT = 1
_PLAIN = "plain."  # before the name of a statistic that the network came with


def save(model: TaskLife, drift: DriftConfig, config: HypernetConfig, folder: Path) -> None:
    """Writes a model's folder; see `HyperMask.save_pretrained`."""
    tensors, tied = _once({name: whole(tensor) for name, tensor in _tensors(model).items()})
    processes = model.hypernet.processes
    if processes is None:
        _write(model, tensors, tied, drift, config, folder)
    else:
        processes.on_first(lambda: _write(model, tensors, tied, drift, config, folder))


def _write(
    model: TaskLife,
    tensors: dict[str, Tensor],
    tied: dict[str, str],
    drift: DriftConfig,
    config: HypernetConfig,
    folder: Path,
) -> None:
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".model.{os.getpid()}.partial"
        try:
            save_file(tensors, partial)
            partial.chmod(folder.stat().st_mode & 0o666)  # safetensors lets the owner alone read its files
            digest = _digest(partial)
            target = folder / f"model-{digest[:16]}.safetensors"
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
    manifest = {
        "format": _FORMAT,
        "file": target.name,
        "sha256": digest,
        "tied": tied,
        "num_tasks": model.num_tasks,
        "classes": model.classes,
        "sparsity": model.sparsity,
        "drift": asdict(drift),
        "hypernetwork": asdict(config),
        "parameters": [_described(row, model) for row in model.layout.rows],
        "heads": model.heads(),
    }
    write_atomic(folder / MANIFEST, json.dumps(manifest, indent=1))
    for old in folder.glob("model-*.safetensors"):
        if old != target:
            old.unlink(missing_ok=True)


def _described(row: Row, model: TaskLife) -> dict[str, Any]:
    dtype = dict(model.net.named_parameters())[row.name].dtype
    return {"name": row.name, "shape": row.shape, "dtype": _name(dtype), "kind": row.kind, "why": row.why}


def _tensors(model: TaskLife) -> dict[str, Tensor]:
    """The state_dict, and the statistics that the network came with, which `disabled` and `add_task` use."""
    plain = {name: buffer for name, buffer in model.named_buffers() if name.rpartition(".")[2].startswith(OWN)}
    return {**model.state_dict(), **{_PLAIN + name: buffer for name, buffer in plain.items()}}


def _once(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors without those that are tied to another, and of each such the other's name."""
    first = first_names(tensors)
    kept = {name: tensor.detach().contiguous() for name, tensor in tensors.items() if first[name] == name}
    storages: set[int] = set()
    for name, tensor in kept.items():
        start = tensor.untyped_storage().data_ptr()
        if start in storages:  # a part of another one, which a file can't say
            kept[name] = tensor.clone()
        storages.add(start)
    return kept, {name: other for name, other in first.items() if other != name}


class Saved:
    """What a folder holds, read and found whole.

    Raises:
        InputError: no such folder, or it is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = self._read()
        while True:
            try:
                self.tensors = self._load()
                return
            except InputError:  # unless another model was saved meanwhile
                before, self.manifest = self.manifest, self._read()
                if self.manifest == before:
                    raise

    def _read(self) -> dict[str, Any]:
        path = self.folder / MANIFEST
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise InputError(f"no model in {self.folder}: {MANIFEST} is missing") from error
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror or error}") from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path} is cut off or was altered ({error})") from error
        if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
            raise InputError(f"{path} is not a model of format {_FORMAT}")
        if not isinstance(manifest.get("file"), str) or Path(manifest["file"]).name != manifest["file"]:
            raise InputError(f"{path} was altered: the file that it names is no model's")
        return manifest

    def _load(self) -> dict[str, Tensor]:
        path = self.folder / self.manifest["file"]
        try:
            if _digest(path) != self.manifest["sha256"]:
                raise InputError(f"{path} is cut off or was altered (its SHA-256 is not the one in {MANIFEST})")
            tensors = load_file(path)
            return {**tensors, **{name: tensors[first] for name, first in self.manifest["tied"].items()}}
        except FileNotFoundError as error:
            raise InputError(f"{self.folder / MANIFEST} names {path.name}, which is missing") from error
        except (OSError, SafetensorError, KeyError, AttributeError) as error:
            raise InputError(f"cannot read {path}: {str(error).splitlines()[0]}") from error

    def settings(self, net: nn.Module) -> dict[str, Any]:
        """What HyperMask(net, **settings) takes to be the same model.

        Raises:
            InputError: the network is another one; the line names the first difference.
        """
        try:
            rows = {row["name"]: row for row in self.manifest["parameters"]}
            self._check_network(net, rows)
            drift = dict(self.manifest["drift"])
            classes = self.manifest["classes"]
            settings = {
                "num_tasks": self.manifest["num_tasks"],
                "sparsity": self.manifest["sparsity"],
                "hypernetwork": HypernetConfig(**_known(HypernetConfig, self.manifest["hypernetwork"])),
                "beta": drift["beta"],
                "lam": drift["lam"],
                "drift_norm": drift["norm"],
                "drift_masked": drift["masked"],
                "fidelity": drift["fidelity"],
                "classes": None if classes is None else tuple(classes),
                "heads": None if self.manifest["heads"] is None else list(map(escape, self.manifest["heads"])),
            }
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{self.folder / MANIFEST} was altered: {error}") from error
        kinds = {name: row["kind"] for name, row in rows.items()}
        own = _named(kinds, PER_TASK) if PER_TASK in kinds.values() else None
        if _default_kinds(net) != kinds:
            settings |= {"include": _named(kinds, MASKED), "per_task": own}
        return settings

    def _check_network(self, net: nn.Module, rows: Mapping[str, Any]) -> None:
        if not isinstance(net, nn.Module):
            raise InputError(f"the target network must be an nn.Module, not {net!r}")
        mine = dict(net.named_parameters())
        for name in [*rows, *(name for name in mine if name not in rows)]:
            if name not in mine or name not in rows:
                where = "the network given" if name in rows else f"the network in {self.folder}"
                raise InputError(f"{name} is not a parameter of {where}: it is another network")
            shape = tuple(rows[name]["shape"])
            if tuple(mine[name].shape) != shape:
                raise InputError(
                    f"{name} is {shape} in {self.folder}, and {tuple(mine[name].shape)} in the network given"
                )

    def fill(self, model: TaskLife) -> None:
        """Gives a fresh model of these settings the weights. Their dtypes are the file's.

        Raises:
            InputError: the file's tensors are not this model's.
        """
        state = {name: tensor for name, tensor in self.tensors.items() if not name.startswith(_PLAIN)}
        mine = model.state_dict()
        for name in [*state, *mine]:
            if not name.startswith(PREFIX) and (name not in state or name not in mine):
                raise InputError(
                    f"{name} is not in {'the model' if name in state else self.folder}: it is another model"
                )
        mine = {name: value for name, value in (*model.named_parameters(), *model.named_buffers()) if name in state}
        before = {name: value.data for name, value in mine.items()}
        for name, value in mine.items():
            if value.is_floating_point():
                value.data = value.data.to(state[name].dtype)
        try:
            model.load_state_dict(state)
        except InputError:
            for name, value in mine.items():
                value.data = before[name]
            raise
        buffers = dict(model.named_buffers())
        for name, tensor in self.tensors.items():
            if name.startswith(_PLAIN):
                buffers[name.removeprefix(_PLAIN)].copy_(tensor)


def _default_kinds(net: nn.Module) -> dict[str, str] | None:
    """What is done with each parameter unless rules are given; None where nothing would be masked."""
    try:
        return {row.name: row.kind for row in MaskLayout.of(net).rows}
    except InputError:
        return None


def _named(kinds: Mapping[str, str], kind: str) -> Any:
    """A rule for exactly the parameters of a kind."""
    return lambda name, parameter: kinds[name] == kind


def _known(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """A dataclass's values out of JSON."""
    unknown = values.keys() - {field.name for field in fields(kind)}
    if unknown:
        raise InputError(f"{', '.join(sorted(unknown))}: not a setting of this version's {kind.__name__}")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
