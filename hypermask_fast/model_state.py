"""What a model's state_dict has besides its tensors: the anchor, and the settings that decide its numbers.

All of it are tensors, under names that begin with `PREFIX`, so that safetensors and torch.load(weights_only=True) take
them. A state_dict without them, from an earlier version, still loads.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InputError
from .files import check_tensors
from .masking.layout import MaskLayout
from .masking.norms import STATISTICS
from .processes import local
from .regularizers import Anchor

PREFIX = "state."
FITTED = "fitted."


def entries(
    layout: MaskLayout,
    sparsity: float,
    marks: Sequence[int],
    classes: Sequence[int] | None,
    known: MaskLayout | None,
    anchor: Anchor | None,
) -> dict[str, Tensor]:
    """By name:

    - sparsity: float64 scalar, percent; layout: (32,) uint8, the digest of all segments' names and shapes;
    - tasks: (T,) uint8, of each task 0, or 1 removed, or 2 frozen; classes: (T,) int64, where tasks differ in them;
    - selected: (S,) bool, which segments have a threshold, once the output layers are known;
    - anchor.task: int64 scalar, anchor.weights: (N,), anchor.targets.0, ...: the anchor's tensors themselves.
    """
    found = {
        "sparsity": torch.tensor(sparsity, dtype=torch.float64),
        "layout": digest(layout),
        "tasks": torch.tensor(list(marks), dtype=torch.uint8),
    }
    if classes is not None:
        found["classes"] = torch.tensor(list(classes), dtype=torch.int64)
    if known is not None:
        found["selected"] = torch.tensor([segment.selected for segment in known.segments])
    if anchor is not None:
        found |= {"anchor.task": torch.tensor(anchor.task), "anchor.weights": anchor.weights.detach()}
        found |= {f"anchor.targets.{i}": target.detach() for i, target in enumerate(anchor.targets)}
    return {PREFIX + name: tensor for name, tensor in found.items()}


def fitted_entries(method: str, entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a method of inference has fitted, under names of its own among the others."""
    return {f"{PREFIX}{FITTED}{method}.{name}": tensor for name, tensor in entries.items()}


def fitted(found: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The same back: by method, its entries."""
    methods: dict[str, dict[str, Tensor]] = {}
    for name in (name for name in found if name.startswith(FITTED)):
        method, _, entry = name.removeprefix(FITTED).partition(".")
        methods.setdefault(method, {})[entry] = found[name]
    return methods


def digest(layout: MaskLayout) -> Tensor:
    """(32,) uint8: SHA-256 of all segments' names and shapes."""
    text = json.dumps([[segment.name, *segment.shape] for segment in layout.segments])
    return torch.tensor(list(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8)


def taken(state_dict: dict[str, Any], prefix: str) -> dict[str, Tensor]:
    """Takes the entries out of a state_dict; {} where it has none."""
    names = [name for name in state_dict if name.startswith(prefix + PREFIX)]
    return {name.removeprefix(prefix + PREFIX): state_dict.pop(name) for name in names}


def check(
    found: Mapping[str, Tensor], layout: MaskLayout, sparsity: float, num_tasks: int, classes: Sequence[int] | None
) -> None:
    """Raises InputError where a state is of a model with another layout, sparsity, number of tasks or of classes."""
    if "layout" in found and not torch.equal(found["layout"].cpu(), digest(layout)):
        raise InputError(
            "the state is of another layout: what is masked differs from this model's (network, include, exclude)"
        )
    if "sparsity" in found and found["sparsity"].item() != sparsity:
        raise InputError(
            f"the state is of a model of {found['sparsity'].item():g} % sparsity, this one has {sparsity:g} %"
        )
    if "tasks" in found and len(found["tasks"]) != num_tasks:
        raise InputError(f"the state is of {len(found['tasks'])} tasks, this model has {num_tasks} (add_task adds one)")
    counts = found["classes"].tolist() if "classes" in found else None
    mine = None if classes is None else list(classes)
    if "sparsity" in found and counts != mine:
        raise InputError(f"the state is of a model with classes {counts}, this one has {mine}")


def check_shapes(model: nn.Module, state_dict: Mapping[str, Any], prefix: str) -> None:
    """Raises InputError where a state_dict has a tensor of another shape than the model's. PyTorch says so, too, after
    it has loaded all others. (Running statistics of a plain network serve every task.)"""
    named = model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    for name, tensor in chain(*named):
        value = state_dict.get(prefix + name)
        if not isinstance(value, Tensor) or value.shape == tensor.shape or (tensor.dim() == 0 and value.numel() == 1):
            continue
        if name.rpartition(".")[2] in STATISTICS and value.shape == tensor.shape[1:]:
            continue
        raise InputError(
            f"the state is of another model: size mismatch for {name}, {tuple(value.shape)} there and "
            f"{tuple(tensor.shape)} here"
        )


def output_biases(found: Mapping[str, Tensor], layout: MaskLayout) -> list[str] | None:
    """Names of the segments without a threshold; None where the state does not say."""
    if "selected" not in found:
        return None
    return [s.name for s, chosen in zip(layout.segments, found["selected"].tolist(), strict=True) if not chosen]


def anchor(found: Mapping[str, Tensor], size: int) -> Anchor | None:
    """The anchor in a state; None where there was none."""
    if "anchor.task" not in found:
        return None
    targets = sorted((name for name in found if name.startswith("anchor.targets.")), key=lambda n: int(n.split(".")[2]))
    if found["anchor.weights"].shape != (size,):
        raise InputError(f"the state is of another layout: its anchor has {len(found['anchor.weights'])} entries")
    return Anchor(int(found["anchor.task"]), found["anchor.weights"], tuple(found[name] for name in targets))


class Entries:
    """Has every name of an entry, for who looks each name of a state_dict up as an attribute of the model's."""

    def __getattr__(self, name: str) -> "Entries":
        if name.startswith("_"):  # of another protocol, such as copying
            raise AttributeError(name)
        return self


# -- without them, and each tensor once -------------------------------------------------------------------------------


def network_state(model: nn.Module) -> dict[str, Tensor]:
    """A model's state_dict for a checkpoint: tied tensors once, under their first name, and of the entries above
    only which tasks are removed or frozen, where some are, and what methods of inference have fitted."""
    state, tasks = model.state_dict(), PREFIX + "tasks"
    wanted = (PREFIX + FITTED, tasks) if tasks in state and state[tasks].any() else (PREFIX + FITTED,)
    kept = {name: t for name, t in state.items() if not name.startswith(PREFIX) or name.startswith(wanted)}
    names = first_names(kept)
    return {name: tensor for name, tensor in kept.items() if names[name] == name}


def load_network_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Loads what `network_state` gave; see nn.Module.load_state_dict."""
    names = first_names({name: t for name, t in model.state_dict().items() if not name.startswith(PREFIX)})
    model.load_state_dict({**state, **{name: state[first] for name, first in names.items() if first in state}})


def first_names(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Of each name, the first one of the same tensor: its own, or that of the one that it is tied to.

    Raises:
        InputError: an entry is no tensor.
    """
    check_tensors(tensors)
    first: dict[tuple, str] = {}
    names = {}
    for name, value in tensors.items():
        tensor = local(value.detach())  # a DTensor has no address of its own
        key = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        names[name] = first.setdefault(key, name) if tensor.numel() and tensor.device.type != "meta" else name
    return names
