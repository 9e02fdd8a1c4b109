"""Continual-learning metrics from an accuracy matrix.

R[i, j]: accuracy in percent on task j's test split after training task i; b[j]: the same of the untrained model.
t tasks are learned, so row t - 1 is the last one; tasks count from 0. NaN stands for what was not measured.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import InputError

METRIC_UNITS = {  # fields of `Summary`, in the order in which they are shown
    "average_accuracy": "%",
    "learning_accuracy": "%",
    "forgetting": "points",
    "backward_transfer": "points",
    "forward_transfer": "points",
}


@dataclass(frozen=True)
class Summary:
    """The metrics of a run; None where a metric needs more tasks or measurements than there are.

    Attributes:
        tasks_learned: t.
        average_accuracy: percent; see `average_accuracy`, and so on for the others.
        learning_accuracy: percent.
        forgetting: points (differences of percentages), 0 is best.
        backward_transfer: points, higher is better.
        forward_transfer: points, higher is better.
    """

    tasks_learned: int
    average_accuracy: float | None
    learning_accuracy: float | None
    forgetting: float | None
    backward_transfer: float | None
    forward_transfer: float | None

    def to_dict(self) -> dict[str, float | None]:
        return dataclasses.asdict(self)


def summarize(matrix: npt.ArrayLike, baseline: npt.ArrayLike | None = None) -> Summary:
    """Every metric of one run.

    Args:
        matrix: R, (T, T) percent, array or CPU tensor.
        baseline: b, (T,) percent; without it there is no forward transfer.

    Raises:
        InputError: shapes that do not fit, or a row measured after one that was not.
    """
    learned = tasks_learned(matrix)
    values = np.asarray(matrix, dtype=np.float64)
    untrained = np.full(len(values), np.nan) if baseline is None else np.asarray(baseline, dtype=np.float64)
    if untrained.shape != (len(values),):
        raise InputError(f"the baseline of {len(values)} tasks is ({len(values)},) percentages, not {untrained.shape}")
    if learned == 0:
        return Summary(0, None, None, None, None, None)
    return Summary(
        learned,
        average_accuracy(values),
        learning_accuracy(values),
        forgetting(values),
        backward_transfer(values),
        forward_transfer(values, untrained),
    )


def tasks_learned(matrix: npt.ArrayLike) -> int:
    """t, the number of leading rows of R with a measured diagonal."""
    values = np.asarray(matrix, dtype=np.float64)
    if values.ndim != 2 or values.shape[0] != values.shape[1]:
        raise InputError(f"an accuracy matrix is square (tasks, tasks), not {values.shape}")
    measured = ~np.isnan(np.diagonal(values))
    learned = int(measured.sum())
    if not measured[:learned].all():
        raise InputError("an accuracy matrix has its rows measured in order, without gaps")
    return learned


def _metric(formula: Callable[..., npt.ArrayLike]) -> Callable[..., float | None]:
    """Turns `formula(learned rows, ...) -> terms` into their mean; None for no terms or an unmeasured one."""

    def metric(matrix: npt.ArrayLike, *others: npt.ArrayLike) -> float | None:
        learned = tasks_learned(matrix)
        values = np.asarray(matrix, dtype=np.float64)[:learned, :learned]
        terms = np.asarray(formula(values, *others)) if learned else np.empty(0)
        return float(terms.mean()) if terms.size and not np.isnan(terms).any() else None

    metric.__name__, metric.__doc__ = formula.__name__, formula.__doc__
    return metric


@_metric
def average_accuracy(matrix: np.ndarray) -> np.ndarray:
    """mean_{j < t} R[t-1, j], percent: how good the model is now on all it has learned.

    Source: Lopez-Paz and Ranzato 2017, equation 2.
    """
    return matrix[-1]


@_metric
def learning_accuracy(matrix: np.ndarray) -> np.ndarray:
    """mean_{j < t} R[j, j], percent: how good it was on each task right after learning it.

    Source: Riemer et al. 2019 (there: learning accuracy).
    """
    return np.diagonal(matrix)


@_metric
def forgetting(matrix: np.ndarray) -> np.ndarray:
    """mean_{j < t-1} (max_{i < t-1} R[i, j] - R[t-1, j]), points: how far each earlier task fell from its best.

    Every earlier row counts for the best, also those from before the task was learned, as in the definition.
    Negative where tasks have become better than they ever were. Two tasks or more.

    Source: Chaudhry et al. 2018 (there: forgetting measure).
    """
    if len(matrix) < 2:
        return np.empty(0)
    return np.nanmax(matrix[:-1, :-1], axis=0) - matrix[-1, :-1]


@_metric
def backward_transfer(matrix: np.ndarray) -> np.ndarray:
    """mean_{j < t-1} (R[t-1, j] - R[j, j]), points: what later learning did to earlier tasks. Two tasks or more.

    Source: Lopez-Paz and Ranzato 2017, equation 3.
    """
    return matrix[-1, :-1] - np.diagonal(matrix)[:-1]


@_metric
def forward_transfer(matrix: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    """mean_{0 < j < t} (R[j-1, j] - b[j]), points: what earlier learning gave a task before its own. Two tasks or more.

    Source: Lopez-Paz and Ranzato 2017, equation 4.
    """
    return np.diagonal(matrix, offset=1) - np.asarray(baseline)[1 : len(matrix)]
