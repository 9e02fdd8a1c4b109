"""Packed tasks: the masks of several tasks and what they share, in one safetensors file, without a hypernetwork.

Of every masked tensor W lies in it once, and of every task the mask's values where it is not 0, with a bitmap of where
that is, left out where it is everywhere. W * m itself would take as much as the values and could not share W.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from .checks import is_whole, shown
from .errors import InputError
from .files import write_atomic
from .masking.layout import MaskLayout
from .masking.selection import MASKED, PER_TASK, SHARED

FORMAT = 1
DTYPES = ("float32", "bfloat16", "int8")
_LEVELS = 255  # of int8: a mask is not negative, so 8 bits without a sign
_KEY = "hypermask_packed"  # of the metadata
_WEIGHT, _SHARED, _MASK = "weights.", "shared.", "masks."


@dataclass(frozen=True)
class Network:
    """Which network the tasks are of, and how it is masked.

    Attributes:
        parameters: of each, its name, shape, dtype and kind, and whether its mask is applied.
        batch_statistics: whether batch norm uses the batch's own statistics.
        classes: of each packed task; None: all outputs.
    """

    parameters: tuple[dict[str, Any], ...]
    batch_statistics: bool
    classes: tuple[int, ...] | None

    @property
    def applied(self) -> list[dict[str, Any]]:
        return [row for row in self.parameters if row["kind"] == MASKED and row["applied"]]

    def check(self, net: nn.Module, where: object) -> None:
        """Raises InputError where `net` is another network; the line names the first difference."""
        if not isinstance(net, nn.Module):
            raise InputError(f"the network to run {where} on must be an nn.Module, not {type(net).__name__}")
        check_no_state_of_modules(net)
        mine = {name: tuple(parameter.shape) for name, parameter in net.named_parameters()}
        packed = {row["name"]: tuple(row["shape"]) for row in self.parameters}
        for name in [*packed, *mine]:
            if name not in mine or name not in packed:
                other = "the network given" if name in packed else f"the network in {where}"
                raise InputError(f"{name} is not a parameter of {other}: it is another network")
            if mine[name] != packed[name]:
                raise InputError(f"{name} is {packed[name]} in {where}, and {mine[name]} in the network given")

    def layout(self, net: nn.Module) -> MaskLayout:
        """How `net`, which is like it, is masked. Raises InputError where it can't be."""
        kinds = {row["name"]: row["kind"] for row in self.parameters}
        own = (lambda name, parameter: kinds[name] == PER_TASK) if PER_TASK in kinds.values() else None
        layout = MaskLayout.of(net, lambda name, parameter: kinds[name] == MASKED, per_task=own)
        unused = [row["name"] for row in self.parameters if row["kind"] == MASKED and not row["applied"]]
        return layout.with_output_biases(unused)


@dataclass(frozen=True)
class Packed:
    """Packed tasks in memory; `HyperMask.pack` makes them. `print(packed)` says how large they are.

    Attributes:
        tasks: their ids.
        dtype: of mask values: "float32", "bfloat16" or "int8"; see `HyperMask.pack`.
        network: which network they are of.
        tensors: by name: "weights.NAME", W of each masked tensor; "masks.TASK.values", (kept,) and, unless all are
            kept, "masks.TASK.kept", (ceil(N / 8),) uint8, bit i % 8 of byte i // 8 says whether entry i is not 0;
            with int8 "masks.TASK.scales", (S,) float32; "shared.NAME", all else that the network has, with one row per
            packed task where tasks have their own.
    """

    tasks: tuple[int, ...]
    dtype: str
    network: Network
    tensors: Mapping[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors; a file has besides a header of a few kilobytes."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def sizes(self) -> dict[str, int]:
        """Bytes by what they are for: "values" and "bitmaps" of all tasks' masks, "weights", and "rest"."""
        sizes: dict[str, int] = dict.fromkeys(("values", "bitmaps", "weights", "rest"), 0)
        for name, tensor in self.tensors.items():
            part = name.rpartition(".")[2]
            if name.startswith(_MASK):
                sizes["bitmaps" if part == "kept" else "values"] += tensor.nbytes
            else:
                sizes["weights" if name.startswith(_WEIGHT) else "rest"] += tensor.nbytes
        return sizes

    def __str__(self) -> str:
        """Sizes: of what is once for all tasks, and of each task."""
        sizes, count = self.sizes(), len(self.tasks)
        of_masks = sizes["values"] + sizes["bitmaps"]
        return (
            f"{count} tasks packed in {self.dtype}: {self.nbytes:,} bytes\n"
            f"  {of_masks:,} of masks, {of_masks // count:,} a task "
            f"({sizes['values'] // count:,} values, {sizes['bitmaps'] // count:,} bitmap)\n"
            f"  {sizes['weights']:,} of weights, once for all tasks\n"
            f"  {sizes['rest']:,} of everything else: parameters without a mask, statistics, what is per task"
        )

    def unpack(self, task: int) -> dict[str, Tensor]:
        """Parameter name -> the task's mask, float32 on the CPU, of the parameter's shape, as far as it is applied.

        Raises:
            InputError: the task was not packed.
        """
        self.check_task(task)
        rows, name = self.network.applied, f"{_MASK}{task}."
        sizes = [int(np.prod(row["shape"])) for row in rows]
        values, bits = self.tensors[name + "values"], self.tensors.get(name + "kept")
        kept = None if bits is None else _bools(bits, sum(sizes))
        if self.dtype == "int8":
            counts = sizes if kept is None else [int(part.sum()) for part in kept.split(sizes)]
            values = values.float() * self.tensors[name + "scales"].repeat_interleave(torch.tensor(counts))
        flat = values.float() if kept is None else torch.zeros(sum(sizes)).masked_scatter_(kept, values.float())
        return {row["name"]: part.view(row["shape"]) for row, part in zip(rows, flat.split(sizes), strict=True)}

    def check_task(self, task: object) -> None:
        """Raises InputError where a task is not among them."""
        if not is_whole(task) or task not in self.tasks:
            raise InputError(f"task {shown(task)} is not packed here: there are {', '.join(map(str, self.tasks))}")

    def weights(self) -> dict[str, Tensor]:
        """Parameter name -> W, in the dtype that the network has."""
        dtypes = {row["name"]: getattr(torch, row["dtype"]) for row in self.network.applied}
        return {name: self.tensors[_WEIGHT + name].to(dtype) for name, dtype in dtypes.items()}

    def shared(self) -> dict[str, Tensor]:
        """All else, by its name in a `PackedModel`."""
        return {name.removeprefix(_SHARED): t for name, t in self.tensors.items() if name.startswith(_SHARED)}

    # -- files ----------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one safetensors file, which appears whole or not at all.

        Raises:
            InputError: it can't be written.
        """
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors.items()}
        network = self.network
        described = {
            "format": FORMAT,
            "tasks": self.tasks,
            "dtype": self.dtype,
            "parameters": network.parameters,
            "batch_statistics": network.batch_statistics,
            "classes": network.classes,
            "sha256": _digest(tensors),
        }
        write_atomic(Path(path), save(tensors, {"format": "pt", _KEY: json.dumps(described)}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Packed":
        """What `save` has written, on the CPU. Nothing is unpickled.

        Raises:
            InputError: no such file, another kind of file, or a damaged one.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                text = (file.metadata() or {}).get(_KEY)
                if text is None:
                    raise InputError(f"{path} holds no packed tasks (HyperMask.pack makes them)")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            described = json.loads(text)
            if described["format"] != FORMAT:
                raise InputError(f"{path} is of format {described['format']}, this version reads {FORMAT}")
            if described["sha256"] != _digest(tensors):
                raise InputError(f"{path} is damaged: its tensors are not those that were packed (SHA-256)")
            classes = described["classes"]
            network = Network(
                tuple(described["parameters"]),
                bool(described["batch_statistics"]),
                None if classes is None else tuple(classes),
            )
            packed = cls(tuple(described["tasks"]), described["dtype"], network, tensors)
            packed._check()
            return packed
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror or error}") from error
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(f"{path} is not a file of packed tasks, or is damaged: {reason}") from error

    def _check(self) -> None:
        """Raises one of the errors that `load` reports where the parts do not fit together."""
        if self.dtype not in DTYPES:
            raise ValueError(f"values in {self.dtype}")
        for row in self.network.parameters:
            if row["kind"] not in (MASKED, PER_TASK, SHARED):
                raise ValueError(f"{row['name']} is {row['kind']}")
        for row in self.network.applied:
            if list(self.tensors[_WEIGHT + row["name"]].shape) != list(row["shape"]):
                raise ValueError(f"{row['name']} has another shape than it says")
        for task in self.tasks:
            self.unpack(task)


def check(tasks: Sequence[int], dtype: object) -> None:
    """Raises InputError where nothing can be packed so."""
    if dtype not in DTYPES:
        raise InputError(f"mask values are packed in {', '.join(DTYPES)}, not {dtype!r}")
    if not tasks:
        raise InputError("no task to pack: pack() packs all, pack([0, 2]) these")
    if len(set(tasks)) != len(tasks):
        raise InputError(f"each task is packed once: {', '.join(map(str, tasks))}")


def check_no_state_of_modules(net: nn.Module) -> None:
    """Raises InputError where a module has a state besides parameters and buffers, which packed tasks can't hold."""
    for name, module in net.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise InputError(
                f"packed tasks hold parameters and buffers alone, and {name or 'the network'} "
                f"({type(module).__name__}) has another state, from get_extra_state: make it a buffer"
            )


def packed_mask(task: int, masks: Sequence[Tensor], dtype: str) -> dict[str, Tensor]:
    """The tensors of one task's masks, one per applied segment; see `Packed`."""
    parts = [mask.detach().float().cpu().flatten() for mask in masks]
    flat = torch.cat(parts)
    kept, name = flat != 0, f"{_MASK}{task}."
    tensors: dict[str, Tensor] = {}
    if dtype == "int8":
        scales = torch.stack([part.max() if part.numel() else part.new_zeros(()) for part in parts]) / _LEVELS
        rows = zip(parts, scales, strict=True)
        flat = torch.cat([(part / scale.clamp_min(1e-30)).round().clamp(0, _LEVELS) for part, scale in rows])
        tensors[name + "scales"] = scales
    values = flat if bool(kept.all()) else flat[kept]
    tensors[name + "values"] = values.to({"float32": torch.float32, "bfloat16": torch.bfloat16}.get(dtype, torch.uint8))
    if len(values) < len(flat):
        tensors[name + "kept"] = torch.from_numpy(np.packbits(kept.numpy(), bitorder="little"))
    return tensors


def packed_weight(name: str, weight: Tensor, dtype: str) -> tuple[str, Tensor]:
    """W of a masked tensor: as it is for float32, or else rounded to bfloat16."""
    own = weight.detach().cpu().clone()
    return _WEIGHT + name, own if dtype == "float32" or not own.is_floating_point() else own.bfloat16()


def packed_rest(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {_SHARED + name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}


def _bools(bits: Tensor, count: int) -> Tensor:
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=count, bitorder="little")).bool()


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
