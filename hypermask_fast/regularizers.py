"""What keeps earlier tasks as they were: output drift of the hypernetwork, weight drift of the target."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import reference
from .errors import InputError
from .hypernet import HyperNetwork

FIDELITIES = ("default", "official")


@dataclass(frozen=True)
class DriftConfig:
    """Strength and kind of both regularisers.

    Attributes:
        beta: weight of the output drift R / t, a mean over earlier tasks of squared distances.
        lam: weight of the weight drift D.
        norm: D's norm, 1 or 2.
        masked: whether D weighs each entry's change with the current mask.
        fidelity: "official" divides the output drift by t once more, as the authors' code does: beta R / t^2.
    """

    beta: float = 0.01
    lam: float = 0.01
    norm: int = 1
    masked: bool = True
    fidelity: str = "default"

    def __post_init__(self) -> None:
        for name in ("beta", "lam"):
            if not getattr(self, name) >= 0:
                raise InputError(f"{name} must be a number >= 0, not {getattr(self, name)!r}")
        if self.norm not in (1, 2):
            raise InputError(f"the weight drift's norm must be 1 or 2, not {self.norm!r}")
        if self.fidelity not in FIDELITIES:
            raise InputError(f"fidelity must be one of {', '.join(FIDELITIES)}, not {self.fidelity!r}")

    def output_scale(self, task: int) -> float:
        """Factor of R = sum_j ||h*(e*_j) - h(e_j)||^2 in the loss of task `task`; 0 for the first task."""
        if task == 0:
            return 0.0
        return self.beta / (task * task if self.fidelity == "official" else task)

    def loss(self, drifts: "Drifts", task: int) -> Tensor:
        """output_scale(task) R + lam D: what task `task` adds to its cross-entropy; a scalar."""
        return self.output_scale(task) * drifts.output + self.lam * drifts.weight


class Drifts(NamedTuple):
    """Both drifts, unscaled scalars: `output` is R summed over earlier tasks, `weight` is D."""

    output: Tensor
    weight: Tensor


class Anchor(NamedTuple):
    """How things stood when a task began, without gradient.

    Attributes:
        task: the task t that began.
        targets: (t, N) logits of every earlier task.
        weights: (N,) flat target weights.
    """

    task: int
    targets: Tensor
    weights: Tensor


@torch.no_grad()
def earlier_logits(hypernet: HyperNetwork, task: int) -> Tensor:
    """(t, N) logits of tasks 0..t-1 as they are now: the output drift's targets while task t trains."""
    if task == 0:
        return hypernet.output.weight.new_empty(0, hypernet.size)
    return hypernet(range(task))


def output_drift(hypernet: HyperNetwork, anchor: Anchor) -> Tensor:
    """R = sum_{j<t} ||h*(e*_j) - h(e_j)||^2 over raw logits; one read of the output layer for all tasks.

    Returns:
        Scalar; 0 for the first task.
    """
    if anchor.task == 0:
        return anchor.weights.new_zeros(())
    hidden = hypernet.hidden(range(anchor.task))
    return reference.output_drift(hidden, hypernet.output.weight, hypernet.output.bias, anchor.targets)
