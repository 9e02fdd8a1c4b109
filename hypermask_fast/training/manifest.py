"""checkpoint.json: which files a run's checkpoint is in, what is in which, and the values that are no tensors.

Format 1, where every process has all tensors:

    file, sha256        one safetensors file in the run's folder

Format 2, where tensors are sharded over processes:

    folder              in the run's folder, of safetensors files: replicated.safetensors, which has the tensors that
                        every process has whole, and rank-NNNN.safetensors, which have slices of the others
    files               {file: {sha256, bytes}}
    sharded             {tensor: {dtype, shape, dim, slices}}, shape: of the whole; slices: {file: [from, to]} of dim

Both: format, state, and manifest_sha256, the digest of all others.
"""

import hashlib
import json
import math
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..errors import InputError
from .slices import Region, extent
from .tensor_files import MANIFEST, REMEDY, Written, settle

SCRATCH = ".checkpoint"  # a folder for what is not whole yet
REPLICATED = "replicated.safetensors"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # as safetensors
_ONE_FILE, _FOLDER = 1, 2  # formats
_KINDS = {
    _ONE_FILE: {"format": int, "file": str, "sha256": str, "state": dict},
    _FOLDER: {"format": int, "folder": str, "files": dict, "sharded": dict, "state": dict},
}
_LARGEST = 2**48  # entries in a dimension


class Sharded(NamedTuple):
    """A tensor whose slices are in several files."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    dim: int
    slices: dict[str, tuple[int, int]]

    def region(self, file: str) -> Region:
        """What the file has of it."""
        return tuple(self.slices[file] if dim == self.dim else (0, size) for dim, size in enumerate(self.shape))

    def size(self, file: str) -> int:
        """Bytes of that."""
        return self.dtype.itemsize * math.prod(extent(self.region(file)))


@dataclass(frozen=True)
class Manifest:
    """A checkpoint's contents, but for the tensors.

    Attributes:
        state: JSON values.
        target: the file or folder of the tensors, by its name in the run's folder.
        files: of tensors, by their names in the run's folder.
        sharded: tensors in slices, by name; the other tensors are whole, in the file that has no slices.
    """

    state: dict[str, Any]
    target: str
    files: dict[str, Written]
    sharded: dict[str, Sharded] = field(default_factory=dict)

    @property
    def in_folder(self) -> bool:
        return self.target not in self.files

    def slices(self, file: str) -> dict[str, Region]:
        """What a file has of sharded tensors, by their names."""
        return {name: tensor.region(file) for name, tensor in self.sharded.items() if file in tensor.slices}

    def text(self) -> str:
        """checkpoint.json"""
        entries: dict[str, Any]
        if self.in_folder:
            files = {Path(name).name: {"sha256": w.sha256, "bytes": w.size} for name, w in self.files.items()}
            sharded = {name: _entry(tensor) for name, tensor in self.sharded.items()}
            entries = {"format": _FOLDER, "folder": self.target, "files": files, "sharded": sharded}
        else:
            entries = {"format": _ONE_FILE, "file": self.target, "sha256": self.files[self.target].sha256}
        entries["state"] = self.state
        entries["manifest_sha256"] = digest(entries)
        return json.dumps(entries, indent=1)


def digest(entries: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def read(run_dir: Path) -> tuple[Manifest, str]:
    """A run's manifest and its digest, which is right; its entries are as they must be.

    Raises:
        InputError: there is none, or it is cut off or altered.
    """
    path = run_dir / MANIFEST
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"no checkpoint in {path.parent}: {path.name} is missing") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is cut off or was altered ({error}){REMEDY}") from error
    number = entries.get("format") if isinstance(entries, dict) else None
    if type(number) is not int or number not in _KINDS:
        raise InputError(f"{path} is not a checkpoint of format {_ONE_FILE} or {_FOLDER}{REMEDY}")
    found = entries.pop("manifest_sha256", None)
    if found != digest(entries):
        raise InputError(f"{path} was altered (its own checksum does not match){REMEDY}")
    if {name: type(value) for name, value in entries.items()} != _KINDS[number]:
        raise InputError(f"{path} was altered (its entries are not those of a checkpoint){REMEDY}")
    try:
        return (_one_file(entries) if number == _ONE_FILE else _folder(entries)), found
    except _Altered as error:
        raise InputError(f"{path} was altered ({error}){REMEDY}") from error


class _Altered(ValueError):
    """What in a manifest no checkpoint has."""


def _one_file(entries: dict[str, Any]) -> Manifest:
    file = entries["file"]
    if not re.fullmatch(r"checkpoint-[\w-]{1,100}\.safetensors", file):
        raise _Altered("the file that it names is no checkpoint's")
    return Manifest(entries["state"], file, {file: Written(entries["sha256"])})


def _folder(entries: dict[str, Any]) -> Manifest:
    folder = entries["folder"]
    if not re.fullmatch(r"checkpoint-[\w-]{1,100}", folder):
        raise _Altered("the folder that it names is no checkpoint's")
    files = {f"{folder}/{name}": _written(name, entry) for name, entry in entries["files"].items()}
    if f"{folder}/{REPLICATED}" not in files:
        raise _Altered(f"it names no {REPLICATED}")
    sharded = {name: _sharded(name, entry, folder) for name, entry in entries["sharded"].items()}
    manifest = Manifest(entries["state"], folder, files, sharded)
    check_slices(manifest)
    return manifest


def _written(name: str, entry: Any) -> Written:
    if name != REPLICATED and not re.fullmatch(r"rank-\d{4,9}\.safetensors", name, re.ASCII):
        raise _Altered("a file that it names is no checkpoint's")
    right = isinstance(entry, dict) and {key: type(value) for key, value in entry.items()} == {
        "sha256": str,
        "bytes": int,
    }
    if not right:
        raise _Altered(f"it does not say what {name} is")
    return Written(entry["sha256"], entry["bytes"])


def _sharded(name: str, entry: Any, folder: str) -> Sharded:
    what = f"it does not say what {name!r:.100} is"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "dim", "slices"}:
        raise _Altered(what)
    dtype, shape, dim, slices = (entry[key] for key in ("dtype", "shape", "dim", "slices"))
    if not isinstance(dtype, str) or dtype not in DTYPES or not isinstance(slices, dict):
        raise _Altered(what)
    if not isinstance(shape, list) or not all(type(size) is int and 0 < size <= _LARGEST for size in shape):
        raise _Altered(what)
    if type(dim) is not int or not 0 <= dim < len(shape):
        raise _Altered(what)
    for ends in slices.values():
        if not isinstance(ends, list) or len(ends) != 2 or any(type(end) is not int for end in ends):
            raise _Altered(what)
    return Sharded(
        DTYPES[dtype], tuple(shape), dim, {f"{folder}/{file}": (ends[0], ends[1]) for file, ends in slices.items()}
    )


def check_slices(manifest: Manifest) -> None:
    """Raises ValueError unless the slices of every tensor lie side by side and are all of it, in files that have room
    for them. The files' sizes are the disk's: so nothing is allocated that a manifest only claims."""
    room = {file: written.size or 0 for file, written in manifest.files.items()}
    for name, tensor in manifest.sharded.items():
        end = 0
        for file, (start, stop) in sorted(tensor.slices.items(), key=lambda item: item[1]):
            if file not in room or file.endswith(REPLICATED):
                raise _Altered(f"a slice of {name!r:.100} is in a file that has none")
            if start != end or stop <= start:
                raise _Altered(f"the slices of {name!r:.100} overlap, or something is missing between them")
            room[file] -= tensor.size(file)
            end = stop
        if end != tensor.shape[tensor.dim]:
            raise _Altered(f"the slices of {name!r:.100} are not all of it")
    if any(left < 0 for left in room.values()):
        raise _Altered("a file is smaller than the slices that it is to have")


def _entry(tensor: Sharded) -> dict[str, Any]:
    """A sharded tensor, as JSON values."""
    dtype = next(name for name, dtype in DTYPES.items() if dtype == tensor.dtype)
    slices = {Path(file).name: list(ends) for file, ends in tensor.slices.items()}
    return {"dtype": dtype, "shape": list(tensor.shape), "dim": tensor.dim, "slices": slices}


# -- replacing it -----------------------------------------------------------------------------------------------------


def scratch(run_dir: Path) -> Path:
    """An empty folder for files that are not whole yet, safetensors' own temporary ones among them, which a kill may
    leave there until the next checkpoint."""
    folder = run_dir / SCRATCH
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()
    return folder


def replace(run_dir: Path, new: Manifest) -> None:
    """Makes what is in its place the run's checkpoint, and removes all others and the scratch folder."""
    partial = run_dir / SCRATCH / MANIFEST
    partial.write_text(new.text(), encoding="utf-8")
    settle(partial, run_dir / MANIFEST)
    partial.parent.rmdir()
    for old in run_dir.glob("checkpoint-*"):
        if old.name != new.target:
            _remove(old)


def free(run_dir: Path, target: str) -> None:
    """Removes a folder that a kill has left before checkpoint.json named it.

    Raises:
        InputError: checkpoint.json names it.
    """
    if (run_dir / target).exists():
        if (run_dir / MANIFEST).exists() and read(run_dir)[0].target == target:
            raise InputError(f"{run_dir / target} is the run's checkpoint already")
        _remove(run_dir / target)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()
