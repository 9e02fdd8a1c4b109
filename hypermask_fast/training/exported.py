"""Exported networks: one task's plain network in a safetensors file, with what it takes and gives as metadata."""

import copy
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from .. import exporting
from ..checks import is_whole, shown
from ..data import Compose, Normalize, PermutePixels, Scale, Scenario, TensorSplit, Transform
from ..errors import InputError
from ..files import write_atomic
from ..masking.norms import tracks
from ..model import HyperMask
from ..model_state import load_network_state, network_state
from ..own_code import is_own
from .targets import TargetConfig, build_target


@dataclass(frozen=True)
class Exported:
    """What an exported network takes and gives.

    Attributes:
        scenario: its name.
        task: the task's number, from 0.
        task_name: its name in the scenario.
        class_names: of output 0, 1, ...
        input_shape: of one sample as the network takes it, without the batch.
        prepare: (B, ...) images as the data set stores them, uint8 of 0 to 255 with channels first, to (B,
            *input_shape) float32; such as `Normalize`, which has mean and std. None: not known, so inputs must be as
            they were in training.
    """

    scenario: str
    task: int
    task_name: str
    class_names: tuple[str, ...]
    input_shape: tuple[int, ...]
    prepare: Callable[[Tensor], Tensor] | None


def export_model(
    model: HyperMask,
    scenario: Scenario,
    task: int,
    path: Path | str,
    target: TargetConfig | None = None,
    format: str = "safetensors",
) -> None:
    """Writes the plain network of one task, mask baked in, as safetensors (see `load_exported`), pt2 or onnx.

    The tensors of a safetensors file are the network's state_dict. The file's metadata (strings; numbers and lists as
    JSON) has format, scenario, task, task_name, class_names, input_shape, num_classes (outputs), task_classes (how many
    of them are this task's), prepare (the name and settings of each transform from stored images to inputs; null where
    that is not known), and target where it is given.

    Args:
        model: trained.
        scenario: what it was trained on.
        task: which of its tasks.
        path: a new file.
        target: from which `load_exported` builds the network; None for a network of one's own.
        format: "safetensors"; "pt2", for torch.export.load; or "onnx".

    Raises:
        InputError: there is no such task, or `path` exists.
    """
    path = check_new_file(path)
    if not is_whole(task) or not 0 <= task < len(scenario.tasks):
        raise InputError(f"task {shown(task)} is not one of {scenario.name}'s: 0 to {len(scenario.tasks) - 1}")
    data = scenario.tasks[task]
    metadata = {
        "scenario": scenario.name,
        "task": str(task),
        "task_name": data.name,
        "class_names": json.dumps(data.class_names or [str(label) for label in range(scenario.classes[task])]),
        "task_classes": str(scenario.classes[task]),
        "input_shape": json.dumps(scenario.input_shape),
        "num_classes": str(scenario.num_classes),
        "prepare": json.dumps(_described(data.test.prepare) if isinstance(data.test, TensorSplit) else None),
    }
    if target is not None:
        known = {name: value for name, value in asdict(target).items() if value is not None}
        metadata["target"] = json.dumps(known)
    net = model.export(task).cpu()
    if format != "safetensors":
        example = torch.zeros(2, *scenario.input_shape)
        exporting.write(net, format, path, example, metadata=metadata)
        return
    tensors = {name: tensor.contiguous() for name, tensor in network_state(net).items()}
    write_atomic(path, save(tensors, {"format": "pt", **metadata}))


def check_new_file(path: Path | str) -> Path:
    """`path`; InputError where there is a file, or no folder for it."""
    path = Path(path)
    if path.exists():
        raise InputError(f"{path} already exists: choose another file")
    if not path.absolute().parent.is_dir():
        raise InputError(f"{path.absolute().parent} is not a folder: make it first, or choose another file")
    return path


def load_exported(path: Path | str, net: nn.Module | None = None) -> nn.Module:
    """The plain nn.Module in a file by `export_model`, in evaluation mode on the CPU; nothing is unpickled.

    Args:
        path: the file.
        net: where the network is one's own: an nn.Module made like the one that was given to HyperMask, which stays
            as it is.

    Returns:
        The network, a copy of `net` where that is given. Its attribute `exported` says what it takes and gives; see
        `Exported`.

    Raises:
        InputError: not such a file, one of another network, or one of a network of one's own without `net`.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        exported = _exported(metadata)
        plain = _built(metadata) if net is None and "target" in metadata else copy.deepcopy(net)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} is not a network exported by hypermask-fast: {reason}") from error
    if plain is None:
        raise InputError(f"{path} is of a network of one's own: load_exported(path, net) needs one made like it")
    _without_absent_statistics(plain, tensors)
    try:
        load_network_state(plain, tensors)
    except RuntimeError as error:
        raise InputError(f"{path} is of another network: {' '.join(str(error).split())}") from error
    plain.exported = exported  # pyright: ignore[reportArgumentType] (an attribute like any, no Parameter or Module)
    return plain.eval()


def _built(metadata: dict[str, str]) -> nn.Module:
    values = json.loads(metadata["target"])
    target = TargetConfig(**{**values, "hidden": tuple(values["hidden"])})
    if is_own(target.name):  # a file must not say which code runs here
        raise ValueError(f"it names code, {target.name}: give the network itself, load_exported(path, net)")
    return build_target(target, json.loads(metadata["input_shape"]), int(metadata["num_classes"]))


def _exported(metadata: dict[str, str]) -> Exported:
    """What the metadata say; files of version 0.1.0 have neither names nor `prepare`."""
    count = int(metadata.get("task_classes", metadata["num_classes"]))
    classes = json.loads(metadata.get("class_names", "null")) or range(count)
    if len(classes) != count:
        raise ValueError(f"it names {len(classes)} of {count} classes")
    return Exported(
        metadata["scenario"],
        int(metadata["task"]),
        metadata.get("task_name", metadata["task"]),
        tuple(map(str, classes)),
        tuple(json.loads(metadata["input_shape"])),
        _made(json.loads(metadata.get("prepare", "null"))),
    )


def _described(transform: Transform) -> list[dict[str, Any]] | None:
    """A transform as JSON values: its steps in order; None where one of them is not the library's own."""
    if isinstance(transform, Compose):
        parts = [_described(part) for part in transform.transforms]
        return None if None in parts else [step for part in parts if part is not None for step in part]
    if isinstance(transform, Scale):
        return [{"name": "Scale"}]
    if isinstance(transform, Normalize):
        return [{"name": "Normalize", "mean": list(transform.mean), "std": list(transform.std)}]
    if isinstance(transform, PermutePixels):
        return [{"name": "PermutePixels", "permutation": transform.permutation.tolist(), "pad": transform.pad}]
    return None


def _made(steps: list[dict[str, Any]] | None) -> Transform | None:
    """The transform that `_described` has described."""
    if steps is None:
        return None
    transforms: list[Transform] = []
    for step in steps:
        if step["name"] == "Scale":
            transforms.append(Scale())
        elif step["name"] == "Normalize":
            transforms.append(Normalize(tuple(step["mean"]), tuple(step["std"])))
        elif step["name"] == "PermutePixels":
            transforms.append(PermutePixels(torch.tensor(step["permutation"]), step["pad"]))
        else:
            raise ValueError(f"no transform is called {step['name']!r}")
    return transforms[0] if len(transforms) == 1 else Compose(*transforms)


def _without_absent_statistics(net: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Batch norm of an official-fidelity run has no running statistics: it uses each batch's own."""
    module: Any
    for name, module in net.named_modules():
        if tracks(module) and f"{name}.running_mean".lstrip(".") not in tensors:
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
