"""What keeps earlier tasks as they were: output drift of the hypernetwork, weight drift of the target."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import is_whole, shown
from .dense import HyperNetwork, Layer
from .errors import InputError
from .masking.layout import MaskLayout
from .processes import local, ranks_of

FIDELITIES = ("default", "official")


@dataclass(frozen=True)
class DriftConfig:
    """Strength and kind of both regularisers.

    Attributes:
        beta: weight of the output drift R / t, a mean over earlier tasks of squared distances.
        lam: weight of the weight drift D, from the second task on.
        norm: D's norm, 1 or 2.
        masked: whether D weighs each entry's change with the current mask.
        fidelity: "official" divides the output drift by t once more, beta R / t^2.
    """

    beta: float = 0.01
    lam: float = 0.01
    norm: int = 1
    masked: bool = True
    fidelity: str = "default"

    def __post_init__(self) -> None:
        for name in ("beta", "lam"):
            value: float = getattr(self, name)
            if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= value < inf:
                raise InputError(f"{name} must be a finite number >= 0, not {value!r}")
        if self.norm not in (1, 2) or isinstance(self.norm, bool):
            raise InputError(f"the weight drift's norm must be 1 or 2, not {self.norm!r}")
        if self.fidelity not in FIDELITIES:
            raise InputError(f"fidelity must be one of {', '.join(FIDELITIES)}, not {self.fidelity!r}")

    def output_scale(self, task: int) -> float:
        """Factor of R = sum_j ||h*(e*_j) - h(e_j)||^2 in a task's loss; 0 for the first task.

        task: how many earlier tasks there are, which is the task's id unless some have been removed.
        """
        if task == 0:
            return 0.0
        return self.beta / (task * task if self.fidelity == "official" else task)

    def weight_scale(self, task: int) -> float:
        """Factor of D in the loss of task `task`: lam; 0 for the first task, which has none to protect."""
        return 0.0 if task == 0 else self.lam

    def loss(self, drifts: "Drifts", task: int) -> Tensor:
        """output_scale(task) R + weight_scale(task) D: what task `task` adds to its cross-entropy; a scalar."""
        return self.output_scale(task) * drifts.output + self.weight_scale(task) * drifts.weight

    def added_to(self, cross_entropy: Tensor, drifts: "Drifts", task: int) -> Tensor:
        """cross_entropy + `loss`, a scalar: two operations instead of four, each of which is a launch on a GPU."""
        scales = self.output_scale(task), self.weight_scale(task)
        if max(scales) > torch.finfo(cross_entropy.dtype).max:  # no factor of an addition can be that large
            return cross_entropy + self.loss(drifts, task)
        return cross_entropy.add(drifts.output, alpha=scales[0]).add(drifts.weight, alpha=scales[1])

    def slopes(self, cross_entropy: Tensor, drifts: "Drifts", task: int) -> list[Tensor]:
        """Derivatives of `added_to` by cross_entropy, output drift and weight drift: constants, scalars."""
        parts = cross_entropy, *drifts
        scales = 1.0, self.output_scale(task), self.weight_scale(task)
        return [
            part.new_full((), scale if scale <= torch.finfo(part.dtype).max else inf)
            for part, scale in zip(parts, scales, strict=True)
        ]


class Drifts(NamedTuple):
    """Both drifts, unscaled scalars: `output` is R summed over earlier tasks, `weight` is D."""

    output: Tensor
    weight: Tensor


class Anchor(NamedTuple):
    """How things stood when a task began, without gradient.

    Attributes:
        task: the task t that began.
        weights: (N,) flat target weights.
        targets: the earlier tasks' `HyperNetwork.drift_targets`; empty where there is no earlier task.
    """

    task: int
    weights: Tensor
    targets: tuple[Tensor, ...]

    def map(self, function: Callable[[Tensor], Tensor]) -> "Anchor":
        """The same with `function` of every tensor."""
        return Anchor(self.task, function(self.weights), tuple(function(target) for target in self.targets))

    def without(self, row: int) -> "Anchor":
        """The same without the earlier task of this number among those that are there."""
        of_tasks, *others = self.targets  # of every hypernetwork, the first one has a row per task
        if len(of_tasks) == 1:
            return Anchor(self.task, self.weights, ())
        return Anchor(self.task, self.weights, (torch.cat([of_tasks[:row], of_tasks[row + 1 :]]), *others))


def anchor(hypernet: HyperNetwork, layout: MaskLayout, weights: Sequence[Tensor], task: int) -> Anchor:
    """How things stand as `task` begins; weights: one tensor per segment of the layout."""
    targets = hypernet.drift_targets(task) if len(hypernet.tasks(task)) > 1 else ()
    dtype = hypernet.output.weight.dtype  # a network of other dtypes is compared in the hypernetwork's
    return Anchor(task, layout.flatten([weight.detach().to(dtype) for weight in weights]), targets)


def output_drift(
    hypernet: HyperNetwork,
    anchor: Anchor,
    earlier: tuple[Tensor, Layer] | None = None,
    drawn: Tensor | None = None,
) -> Tensor:
    """R = sum_{j<t} ||h*(e*_j) - h(e_j)||^2 over raw logits, a scalar; 0 for the first task.

    Args:
        earlier: the hypernetwork's `earlier` of this task, where it is at hand.
        drawn: (K,) int64 rows of the earlier tasks, from `draw`, in place of all t: R is then t / K times their sum.
    """
    if not anchor.targets:
        return anchor.weights.new_zeros(())
    hidden, layer = hypernet.earlier(anchor.task) if earlier is None else earlier
    if drawn is None:
        return hypernet.output_drift(hidden, anchor.targets, layer)
    of_tasks, *others = anchor.targets  # of every hypernetwork, the first one has a row per task
    targets = (local(of_tasks).index_select(0, drawn), *others)
    return len(hidden) / len(drawn) * hypernet.output_drift(hidden.index_select(0, drawn), targets, layer)


def check_drift_tasks(tasks: int | None) -> None:
    """Raises InputError where that can't be how many earlier tasks are drawn."""
    if tasks is not None and (not is_whole(tasks) or tasks < 1):
        raise InputError(f"the output drift is over a positive number of tasks, or None for all, not {shown(tasks)}")


def draw(hypernet: HyperNetwork, task: int, tasks: int | None) -> Tensor | None:
    """(K,) int64 rows, in order, of K = `tasks` of the tasks before `task`; None where these are no more than K.

    Drawn without replacement from PyTorch's default generator of the hypernetwork's device, whose state a checkpoint
    has. Processes that train together take the draw of the first one.
    """
    if tasks is None:
        return None
    check_drift_tasks(tasks)
    earlier = len(hypernet.tasks(task)) - 1
    if tasks >= earlier:
        return None
    drawn = torch.randperm(earlier, device=hypernet.output.weight.device)[:tasks].sort().values
    ranks_of(hypernet.processes).make_equal([drawn])
    return drawn
