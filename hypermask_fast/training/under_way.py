"""Where a run stands, and what a checkpoint within a task has besides the model: all that the rest of the task depends
on."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from ..model import HyperMask
from ..regularizers import Anchor
from . import checkpoint
from .optimizers import restore_schedule

_TARGETS = "anchor.targets."


@dataclass
class Position:
    """Where a run stands: `iteration` steps into `task`. What is None or empty belongs to no running task."""

    task: int = 0
    iteration: int = 0
    best_accuracy: float = -1.0
    best_model: dict[str, Tensor] = field(default_factory=dict)


def add(
    tensors: dict[str, Tensor],
    state: dict[str, Any],
    model: HyperMask,
    optimizer: torch.optim.Adam,
    plateau: ReduceLROnPlateau | None,
    best_model: dict[str, Tensor],
) -> None:
    """Adds to a checkpoint: moments, the learning rate and what it goes by, the anchor, and the task's best model."""
    tensors |= checkpoint.optimizer_tensors(optimizer, model)
    anchor = model.anchor
    assert anchor is not None, "begin_task made it"
    tensors["anchor.weights"] = anchor.weights
    tensors |= {f"{_TARGETS}{i}": target for i, target in enumerate(anchor.targets)}
    tensors |= {checkpoint.BEST + name: tensor for name, tensor in best_model.items()}
    state["lr"] = float(optimizer.param_groups[0]["lr"])
    state[checkpoint.MOMENTS] = sorted(n for n, p in model.named_parameters() if optimizer.state.get(p))
    if plateau is not None:
        state["plateau"] = {"best": plateau.best, "num_bad_epochs": plateau.num_bad_epochs}


def restore(
    tensors: dict[str, Tensor],
    state: dict[str, Any],
    model: HyperMask,
    optimizer: torch.optim.Adam,
    plateau: ReduceLROnPlateau | None,
) -> None:
    """Puts back what `add` has added, but for the best model."""
    targets = sorted(key for key in tensors if key.startswith(_TARGETS))
    model.anchor = Anchor(state["task"], tensors["anchor.weights"], tuple(tensors[key] for key in targets))
    checkpoint.restore_optimizer(optimizer, model, tensors)
    restore_schedule(optimizer, plateau, state)


def best_model(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The task's best model so far; empty where there is none."""
    prefix = checkpoint.BEST
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
