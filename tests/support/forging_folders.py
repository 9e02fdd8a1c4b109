"""Checkpoints of several processes that are altered and given the right digests again, or damaged as files are."""

import copy
import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hypermask_fast.training import manifest as manifests
from hypermask_fast.training import tensor_files

from .forging import MISSING, NO_NUMBERS

WEIGHT, MOMENT, TARGET = "model.hypernet.output.weight", "optimizer.hypernet.output.bias/exp_avg_sq", "anchor.targets.0"
FIRST, SECOND, REST = "rank-0000.safetensors", "rank-0001.safetensors", "replicated.safetensors"


@dataclass
class Forged:
    """A checkpoint taken apart: what its files will hold. Files whose entries are altered keep these."""

    manifest: dict[str, Any]
    files: dict[str, dict[str, Tensor]]

    def sharded(self, name: str = WEIGHT) -> dict[str, Any]:
        return self.manifest["sharded"][name]


Edit = Callable[[Forged], object]


def forge(run_dir: Path, edit: Edit) -> None:
    """Alters the run's checkpoint and makes its digests right."""
    manifest = json.loads((run_dir / tensor_files.MANIFEST).read_text())
    manifest.pop("manifest_sha256")
    before, folder = copy.deepcopy(manifest["files"]), run_dir / manifest["folder"]
    forged = Forged(manifest, {name: load_file(folder / name) for name in before})
    edit(forged)
    for name, tensors in forged.files.items():
        save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, folder / name)
        there = forged.manifest.get("files")
        if isinstance(there, dict) and name in there and there[name] == before.get(name):
            with (folder / name).open("rb") as file:
                there[name] = {"sha256": tensor_files.digest(file), "bytes": (folder / name).stat().st_size}
    forged.manifest["manifest_sha256"] = manifests.digest(forged.manifest)
    (run_dir / tensor_files.MANIFEST).write_text(json.dumps(forged.manifest))


def edits() -> Iterator[tuple[str, Edit]]:
    yield from _manifest_edits()
    yield from _slice_edits()
    yield from _tensor_edits()


def damages() -> Iterator[tuple[str, Callable[[Path], object]]]:
    """What happens to files, of which no digest knows."""
    for name in (FIRST, SECOND, REST):
        yield f"{name} missing", lambda folder, name=name: (folder / name).unlink()
        yield f"{name} cut off", lambda folder, name=name: _write(folder / name, lambda b: b[:-1])
        yield f"{name} empty", lambda folder, name=name: _write(folder / name, lambda b: b"")
        yield f"{name} longer", lambda folder, name=name: _write(folder / name, lambda b: b + b"\0")
        yield f"{name} altered", lambda folder, name=name: _write(folder / name, lambda b: b[:-1] + bytes([b[-1] ^ 1]))
        yield f"{name} a folder", lambda folder, name=name: ((folder / name).unlink(), (folder / name).mkdir())
    yield "files swapped", _swap
    yield "folder missing", shutil.rmtree
    yield "folder a file", lambda folder: (shutil.rmtree(folder), folder.write_bytes(b"x"))
    manifest = tensor_files.MANIFEST
    yield "manifest cut off", lambda folder: _write(folder.parent / manifest, lambda b: b[:-9])
    yield "manifest altered", lambda folder: _write(folder.parent / manifest, lambda b: b.replace(b": 0,", b": 1,"))
    yield "manifest empty", lambda folder: _write(folder.parent / manifest, lambda b: b"")


def _write(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


def _swap(folder: Path) -> None:
    (folder / FIRST).rename(folder / "x")
    (folder / SECOND).rename(folder / FIRST)
    (folder / "x").rename(folder / SECOND)


def _manifest_edits() -> Iterator[tuple[str, Edit]]:
    """checkpoint.json around the state, and what it says of files."""
    for key in ("format", "folder", "files", "sharded", "state"):
        for name, value in NO_NUMBERS.items():
            yield f"manifest {key} {name}", lambda f, key=key, value=value: _put(f.manifest, key, value)
    yield "format 1", lambda f: f.manifest.update(format=1)
    yield "format 3", lambda f: f.manifest.update(format=3)
    yield "entry added", lambda f: f.manifest.update(more=1)
    for folder in (
        "..",
        ".",
        "",
        "../run/checkpoint-1",
        "checkpoint-1/../x",
        "checkpoint-\0",
        "checkpoint-" + "x" * 500,
    ):
        yield f"folder {folder[:30]!r}", lambda f, folder=folder: f.manifest.update(folder=folder)
    for key in ("sha256", "bytes"):
        for name, value in NO_NUMBERS.items():
            yield f"{key} {name}", lambda f, key=key, value=value: _put(f.manifest["files"][SECOND], key, value)
    yield "a file's entry added", lambda f: f.manifest["files"][SECOND].update(more=1)
    yield "another size", lambda f: f.manifest["files"][SECOND].update(bytes=f.manifest["files"][SECOND]["bytes"] - 1)
    for name, value in NO_NUMBERS.items():
        yield f"file {name}", lambda f, value=value: _put(f.manifest["files"], SECOND, value)
    for name in (
        f"../{SECOND}",
        f"/tmp/{SECOND}",
        "rank-1.safetensors",
        "rank-0001",
        "x",
        "",
        "rank-0001.safetensors\n",
    ):
        yield f"file {name!r} named", lambda f, name=name: _rename(f, name)
    yield "a file too many", lambda f: f.manifest["files"].update({"rank-0007.safetensors": {"sha256": "", "bytes": 1}})
    yield "no file of the rest", lambda f: f.manifest["files"].pop(REST)


def _slice_edits() -> Iterator[tuple[str, Edit]]:
    """What it says of slices."""
    for key in ("dtype", "shape", "dim", "slices"):
        for name, value in NO_NUMBERS.items():
            yield f"sharded {key} {name}", lambda f, key=key, value=value: _put(f.sharded(), key, value)
    for name, value in NO_NUMBERS.items():
        yield f"weight {name}", lambda f, value=value: _put(f.manifest["sharded"], WEIGHT, value)
        yield f"slice {name}", lambda f, value=value: _put(f.sharded()["slices"], SECOND, value)
        yield f"slice from {name}", lambda f, value=value: _end(f, 0, None if value is MISSING else value)
        yield f"slice to {name}", lambda f, value=value: _end(f, 1, None if value is MISSING else value)
    yield "a sharded tensor's entry added", lambda f: f.sharded().update(more=1)
    yield "a tensor nobody has", lambda f: f.manifest["sharded"].update(more=copy.deepcopy(f.sharded()))
    yield "a tensor without slices", lambda f: f.sharded().update(slices={})
    for dtype in ("F64", "F16", "BF16", "I32", "float32", "X"):
        yield f"dtype {dtype}", lambda f, dtype=dtype: f.sharded().update(dtype=dtype)
    for change in (-1, 1, 2**40, 2**62):
        yield f"rows {change:+}", lambda f, change=change: _reshape(f, 0, change)
        yield f"columns {change:+}", lambda f, change=change: _reshape(f, 1, change)
    yield "no columns", lambda f: _reshape(f, 1, -f.sharded()["shape"][1])
    yield "rows on the disk that are not there", _grown
    yield "another dimension", lambda f: f.sharded().update(dim=1)
    yield "no such dimension", lambda f: f.sharded().update(dim=2)
    yield "three dimensions", lambda f: f.sharded()["shape"].append(1)
    yield "overlap", lambda f: _end(f, 0, f.sharded()["slices"][SECOND][0] - 1)
    yield "gap", lambda f: _end(f, 0, f.sharded()["slices"][SECOND][0] + 1)
    yield "overlap that the file has", lambda f: _grow(f, -1, lambda t: torch.cat([t[:1], t]))
    yield "gap that the file has", lambda f: _grow(f, 1, lambda t: t[1:])
    yield "short of the end", lambda f: _end(f, 1, f.sharded()["slices"][SECOND][1] - 1)
    yield "beyond the end", lambda f: _end(f, 1, f.sharded()["slices"][SECOND][1] + 1)
    yield "backwards", lambda f: f.sharded()["slices"][SECOND].reverse()
    yield "slices swapped", lambda f: _swapped(f.sharded()["slices"])
    yield "slice dropped", lambda f: f.sharded()["slices"].pop(SECOND)
    yield "slice in no file", lambda f: _moved(f.sharded()["slices"], "rank-0009.safetensors")
    yield "slice outside", lambda f: _moved(f.sharded()["slices"], f"../{SECOND}")
    yield "slice in the file of the rest", lambda f: _moved(f.sharded()["slices"], REST)


def _tensor_edits() -> Iterator[tuple[str, Edit]]:
    """What is in the files."""
    for file in (FIRST, SECOND):
        for name in (WEIGHT, MOMENT, TARGET):
            yield f"{name} not in {file}", lambda f, file=file, name=name: f.files[file].pop(name)
            changes: dict[str, Callable[[Tensor], Tensor]] = {
                "a row less": lambda t: t[1:] if t.dim() == 1 or len(t) > 1 else t[:, 1:],
                "a row more": lambda t: torch.cat([t, t[:1]]),
                "flat": lambda t: t.flatten()[None, None],
                "empty": lambda t: t.flatten()[:0],
                "double": lambda t: t.double(),
                "half": lambda t: t.half(),
                "of integers": lambda t: t.int(),
                "NaN": lambda t: _with(t, math.nan),
                "infinite": lambda t: _with(t, math.inf),
            }
            if name == MOMENT:
                changes["negative"] = lambda t: _with(t, -1.0)
            for told, change in changes.items():
                yield (
                    f"{name} {told} in {file}",
                    lambda f, file=file, name=name, change=change: _change(f, file, name, change),
                )
        yield f"a tensor more in {file}", lambda f, file=file: f.files[file].update(more=torch.zeros(2))
        yield (
            f"a tensor of the rest in {file}",
            lambda f, file=file: f.files[file].update({"generator.cpu": f.files[REST]["generator.cpu"]}),
        )
    yield "a sharded one in the rest", lambda f: f.files[REST].update({WEIGHT: f.files[FIRST][WEIGHT]})
    yield "one of the rest missing", lambda f: f.files[REST].pop("model.net.3.weight")
    yield "a tensor more in the rest", lambda f: f.files[REST].update(more=torch.zeros(2))
    yield "the rest of another type", lambda f: _change(f, REST, "model.net.3.weight", lambda t: t.double())
    yield "NaN in the rest", lambda f: _change(f, REST, "model.net.3.weight", lambda t: _with(t, math.nan))


def _put(table: dict[str, Any], key: str, value: Any) -> None:
    if value is MISSING:
        table.pop(key)
    else:
        table[key] = value


def _end(forged: Forged, number: int, value: Any) -> None:
    forged.sharded()["slices"][SECOND][number] = value


def _grow(forged: Forged, by: int, change: Callable[[Tensor], Tensor]) -> None:
    """Another beginning of the second slice, of which the file has exactly so much."""
    _end(forged, 0, forged.sharded()["slices"][SECOND][0] + by)
    _change(forged, SECOND, WEIGHT, change)


def _rename(forged: Forged, name: str) -> None:
    forged.manifest["files"][name] = forged.manifest["files"].pop(SECOND)
    for tensor in forged.manifest["sharded"].values():
        tensor["slices"][name] = tensor["slices"].pop(SECOND)


def _reshape(forged: Forged, dim: int, change: int) -> None:
    shape = forged.sharded()["shape"]
    shape[dim] += change
    if dim == 0:
        _end(forged, 1, shape[0])


def _grown(forged: Forged) -> None:
    """A size on the disk that the manifest claims as well."""
    _reshape(forged, 0, 10**12)
    forged.manifest["files"][SECOND]["bytes"] = 10**15


def _swapped(slices: dict[str, Any]) -> None:
    slices[FIRST], slices[SECOND] = slices[SECOND], slices[FIRST]


def _moved(slices: dict[str, Any], file: str) -> None:
    slices[file] = slices.pop(SECOND)


def _with(tensor: Tensor, value: float) -> Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[0] = value
    return tensor


def _change(forged: Forged, file: str, name: str, change: Callable[[Tensor], Tensor]) -> None:
    forged.files[file][name] = change(forged.files[file][name])
