"""A task's optimiser, and how its learning rate goes."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from ..model import HyperMask
from ..optim import Adam
from ..processes import local
from .tables import PLATEAU_FACTOR, PLATEAU_LOWEST, PLATEAU_PATIENCE, TrainingConfig


def optimizer(model: HyperMask, config: TrainingConfig, device: torch.device) -> torch.optim.Adam:
    on_gpu = device.type == "cuda"
    lr = torch.tensor(config.lr, device=device) if on_gpu else config.lr
    if config.gradient == "dense":
        return torch.optim.Adam(_groups(model), lr, fused=True, capturable=on_gpu)
    return Adam(model, lr, capturable=on_gpu, moments=config.moments, step_in_backward=True)


def _groups(model: HyperMask) -> list[dict[str, Any]]:
    """All parameters. Those that are sharded are a group of their own: PyTorch's fused step takes no DTensors."""
    whole = [p for p in model.parameters() if local(p) is p]
    sharded = [p for p in model.parameters() if local(p) is not p]
    groups: list[dict[str, Any]] = [{"params": whole}]
    return [*groups, {"params": sharded, "fused": False}] if sharded else groups


def plateau(optimizer: torch.optim.Adam, config: TrainingConfig) -> ReduceLROnPlateau | None:
    """What lowers the learning rate; None where it stays."""
    if config.schedule == "constant":
        return None
    return ReduceLROnPlateau(
        optimizer, mode="max", factor=PLATEAU_FACTOR, patience=PLATEAU_PATIENCE, min_lr=PLATEAU_LOWEST
    )


def restore_schedule(optimizer: torch.optim.Adam, plateau: ReduceLROnPlateau | None, state: dict[str, Any]) -> None:
    """The learning rate and what it goes by, as a checkpoint's state has them."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(state["lr"])
        else:
            group["lr"] = state["lr"]
    if plateau is not None:
        plateau.best, plateau.num_bad_epochs = state["plateau"]["best"], state["plateau"]["num_bad_epochs"]
