"""Losses and weights that are not finite: seen before a checkpoint keeps them, and told with their cause."""

from math import isfinite

import torch
from torch import Tensor, nn

from ..data import Split
from ..processes import local
from ..regularizers import DriftConfig

_LARGE_INPUT = 1e6  # beyond it even a network of two layers has activations that Adam's first steps blow up
_LARGE_LR = 1.0  # Adam moves each weight by about lr per step; weights begin well below 1


def finite_weights(model: nn.Module) -> bool:
    """Whether every parameter and buffer is finite, as far as this process has them. Waits for the device once."""
    floats = [local(value) for value in (*model.parameters(), *model.buffers()) if value.is_floating_point()]
    return bool(torch.stack([value.isfinite().all() for value in floats]).all())


@torch.no_grad()
def cause(split: Split, values: dict[str, Tensor], drift: DriftConfig, lr: float, batch: int) -> str:
    """The likeliest reason why training on `split` has left the finite numbers, and what would help; one line.

    Args:
        split: the task's training data, which is read through once.
        values: of the step in which it showed, see `TaskWork.step`.
        drift: the weights of both drifts.
        lr: the learning rate.
        batch: samples to look at at a time.
    """
    largest = seen = 0
    for x, _ in split.chunks(batch):
        finite = x.isfinite().reshape(len(x), -1).all(1)
        if not finite.all():
            sample = seen + int(finite.logical_not().nonzero()[0])
            return f"sample {sample} of the task's training data is not finite: mend the data"
        largest, seen = max(largest, x.abs().max().item()), seen + len(x)
    if largest > _LARGE_INPUT:
        return f"the task's training data reach {largest:.3g}, out of all proportion: scale them to about 1"
    parts = {name: values[name].item() for name in ("cross_entropy", "output_drift", "weight_drift")}
    if all(map(isfinite, parts.values())) and not isfinite(values["loss"].item()):
        told = ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in parts.items())
        return f"beta {drift.beta:g} or lam {drift.lam:g} is out of all proportion ({told}): lower it"
    if lr >= _LARGE_LR:
        return f"training.lr {lr:g} is out of all proportion, each step moves every weight by about as much: lower it"
    return "training has diverged: lower training.lr"
