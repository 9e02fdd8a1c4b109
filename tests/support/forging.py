"""Checkpoints that are altered and given the right digests again: every entry and tensor, in every wrong way."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hypermask_fast.training import manifest as manifests
from hypermask_fast.training import tensor_files

MISSING = object()
TENSOR_FILE = "checkpoint-000-0000000.safetensors"
NO_NUMBERS = {
    "missing": MISSING,
    "null": None,
    "text": "3",
    "list": [1],
    "table": {},
    "true": True,
    "NaN": math.nan,
    "infinite": math.inf,
    "minus 1e30": -(10**30),
    "huge": 10**30,
}
NO_COUNTS = NO_NUMBERS | {"minus 1": -1, "a half": 1.5, "a whole float": 1.0, "a million": 10**6}


@dataclass
class Forged:
    """A checkpoint taken apart: what its files will hold."""

    manifest: dict[str, Any]
    tensors: dict[str, Tensor]
    raw: dict[str, bytes] = field(default_factory=dict)  # in place of a file as it would be

    @property
    def state(self) -> dict[str, Any]:
        return self.manifest["state"]


Edit = Callable[[Forged], object]


def forge(run_dir: Path, edit: Edit) -> None:
    """Alters the run's checkpoint and makes its digests right."""
    manifest = json.loads((run_dir / tensor_files.MANIFEST).read_text())
    path = run_dir / manifest["file"]
    manifest.pop("manifest_sha256")
    digest = manifest["sha256"]
    forged = Forged(manifest, load_file(path))
    edit(forged)
    if "tensors" in forged.raw:
        path.write_bytes(forged.raw["tensors"])
    else:
        save_file({name: tensor.contiguous().clone() for name, tensor in forged.tensors.items()}, path)
    if forged.manifest.get("sha256") == digest:
        with path.open("rb") as file:
            forged.manifest["sha256"] = tensor_files.digest(file)
    forged.manifest["manifest_sha256"] = manifests.digest(forged.manifest)
    content = forged.raw.get("manifest") or json.dumps(forged.manifest, indent=1).encode()
    (run_dir / tensor_files.MANIFEST).write_bytes(content)


def manifest_edits() -> Iterator[tuple[str, Edit]]:
    """checkpoint.json around the state."""
    for key in ("format", "file", "sha256", "state"):
        for name, value in NO_NUMBERS.items():
            yield f"manifest {key} {name}", partial(_put, value=value, key=key, table=lambda f: f.manifest)
    for name, value in (("up", "../x"), ("folder", "."), ("NUL", "checkpoint-\0.safetensors"), ("long", "x" * 5000)):
        yield f"manifest file {name}", partial(_put, value=value, key="file", table=lambda f: f.manifest)
    yield "manifest nested", lambda f: f.raw.update(manifest=b'{"a":' + b"[" * 200_000)
    yield "manifest long number", lambda f: f.raw.update(manifest=b'{"format": ' + b"9" * 10_000 + b"}")
    yield "manifest entry added", lambda f: f.manifest.update(more=1)


def tensor_file_edits() -> Iterator[tuple[str, Edit]]:
    """The file of tensors as such: empty, no safetensors, types and sizes that there are not."""

    def header(**fields: Any) -> bytes:
        table = {"model.a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | fields}
        text = json.dumps(table).encode()
        return len(text).to_bytes(8, "little") + text + bytes(4)

    yield "file empty", lambda f: f.raw.update(tensors=b"")
    yield "file of zeros", lambda f: f.raw.update(tensors=bytes(100))
    yield "file of text", lambda f: f.raw.update(tensors=b"not a safetensors file" * 10)
    yield "file without tensors", lambda f: f.tensors.clear()
    changes = [
        {"dtype": "F4"},
        {"dtype": "F8_E8M0", "shape": [4]},
        {"dtype": "C64"},
        {"dtype": "X"},
        {"dtype": 3},
        {"shape": [2**62]},
        {"shape": [-1]},
        {"shape": "1"},
        {"data_offsets": [0, 2**63]},
        {"data_offsets": [4, 0]},
    ]
    for change in changes:
        yield f"header {change}", lambda f, change=change: f.raw.update(tensors=header(**change))


def state_edits(within_task: bool, plateau: bool) -> Iterator[tuple[str, Edit]]:
    """Entries of the state."""
    counts = {"task": (), "iteration": (), "steps": (), "peak_memory": ("a million",)}
    for key, allowed in counts.items():
        for name, value in NO_COUNTS.items():
            if name not in allowed:
                yield f"{key} {name}", partial(_put, value=value, key=key)
    for key in ("seconds", "best_accuracy", *(["lr"] if within_task else ())):
        for name, value in NO_NUMBERS.items():
            yield f"{key} {name}", partial(_put, value=value, key=key)
    for name in ("missing", "null", "text", "list", "true", "huge"):
        yield f"settings {name}", partial(_put, value=NO_NUMBERS[name], key="settings")
    yield "seconds negative", lambda f: f.state.update(seconds=-1.0)
    yield "best_accuracy of 101 percent", lambda f: f.state.update(best_accuracy=101.0)
    yield "best_accuracy of none", lambda f: f.state.update(best_accuracy=-0.5)
    yield "task after the last", lambda f: f.state.update(task=3)
    yield "next task", lambda f: f.state.update(task=f.state["task"] + 1)
    yield "task before", lambda f: f.state.update(task=f.state["task"] - 1)
    yield "next iteration", lambda f: f.state.update(iteration=f.state["iteration"] + 1)
    yield "one more step", lambda f: f.state.update(steps=f.state["steps"] + 1)
    yield "entry added", lambda f: f.state.update(more=1)
    for length in (
        None,
        [],
        {},
        {"iterations": 6},
        {"iterations": 0, "epochs": None},
        {"iterations": None, "epochs": 6},
    ):
        yield f"length {length}", partial(_put, value=length, key="length")
    for iterations in (7, 6.0, "6", True, -1):
        yield f"length of {iterations!r}", partial(_put, value={"iterations": iterations, "epochs": None}, key="length")
    if not within_task:
        return
    yield "lr above", lambda f: f.state.update(lr=f.state["lr"] * 2)
    yield "lr below", lambda f: f.state.update(lr=f.state["lr"] / 2)
    yield "lr 0", lambda f: f.state.update(lr=0.0)
    yield "iteration of a task's end", lambda f: f.state.update(iteration=6, steps=f.state["steps"] + 1)
    yield "iteration 0", lambda f: f.state.update(iteration=0, steps=f.state["steps"] - f.state["iteration"])
    if not plateau:
        yield "plateau added", lambda f: f.state.update(plateau={"best": 50.0, "num_bad_epochs": 0})
        return
    for name in ("missing", "null", "text", "list", "table", "true"):
        yield f"plateau {name}", partial(_put, value=NO_NUMBERS[name], key="plateau")
    for name, value in NO_NUMBERS.items():
        yield f"plateau best {name}", partial(_put, value=value, key="best", table=lambda f: f.state["plateau"])
    for name, value in NO_COUNTS.items():
        edit = partial(_put, value=value, key="num_bad_epochs", table=lambda f: f.state["plateau"])
        yield f"plateau num_bad_epochs {name}", edit


def tensor_edits(names: list[str]) -> Iterator[tuple[str, Edit]]:
    """One tensor each of the given names, in every wrong shape, type and value; and tensors that belong to nothing."""
    for name in names:
        for change, of in _changes(name).items():
            yield f"{name} {change}", partial(_replace, name=name, of=of)
    for extra in ("model.more", "best.more", "optimizer.more/step", "anchor.targets.7", "result.more", "more", "a\nb"):
        yield f"{extra!r} added", partial(_replace, name=extra, of=lambda _: torch.zeros(2))


def _changes(name: str) -> dict[str, Callable[[Tensor], Tensor] | None]:
    changes: dict[str, Callable[[Tensor], Tensor] | None] = {
        "missing": None,
        "one entry more": lambda t: torch.cat([t.flatten(), t.flatten()[:1]]),
        "flat in a row": lambda t: t.flatten()[None, None],
        "empty": lambda t: t.flatten()[:0],
        "another type": lambda t: t.to(torch.int64 if t.dtype != torch.int64 else torch.float32),
        "half": lambda t: t.to(torch.float16),
        "double": lambda t: t.to(torch.float64 if t.dtype != torch.float64 else torch.float32),
        "bool": lambda t: t != 0,
    }
    if name.startswith("generator"):
        return changes | {"zeros": torch.zeros_like, "ones": lambda t: torch.full_like(t, 255)}
    if not name.endswith("num_batches_tracked"):
        changes |= {"NaN": partial(_first, value=math.nan), "infinite": partial(_first, value=math.inf)}
    if name.startswith("result.") or name.endswith(("/step", "/exp_avg_sq", "running_var", "num_batches_tracked")):
        changes["negative"] = partial(_first, value=-1)
    if name.startswith("result."):
        changes["101 percent"] = partial(_first, value=101)
    if name == "result.matrix":
        changes["of the future"] = lambda t: torch.full_like(t, 50.0)
    if name.endswith("/step"):
        changes |= {"huge": partial(_first, value=1e30), "0": torch.zeros_like, "more": lambda t: t + 1}
        changes["a half"] = lambda t: t - 0.5
    return changes


def _first(tensor: Tensor, value: float) -> Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[0] = value
    return tensor


def _put(
    forged: Forged, value: object, key: str, table: Callable[[Forged], dict[str, Any]] = lambda f: f.state
) -> None:
    if value is MISSING:
        table(forged).pop(key)
    else:
        table(forged)[key] = value


def _replace(forged: Forged, name: str, of: Callable[[Tensor], Tensor] | None) -> None:
    if of is None:
        del forged.tensors[name]
    else:
        forged.tensors[name] = of(forged.tensors.get(name, torch.zeros(())))
