"""What a run has measured, and the same as text."""

import math
from dataclasses import dataclass

from torch import Tensor

from ..data import Scenario
from ..errors import InputError
from ..text import text_table
from .metrics import METRIC_UNITS, Summary, summarize, tasks_learned

WIDE = 10  # tasks up to which accuracies are shown with a decimal


@dataclass
class Result:
    """What a run has measured so far. Printed, it is the table that the command line shows.

    Attributes:
        matrix: (T, T) float64 percent: row t after training task t, column j on task j's test split; NaN: not yet.
        baseline: (T,) float64 percent of the untrained model.
        seconds: spent in training steps (validation included, evaluation after a task not); steps: their number.
        peak_memory: bytes; see `peak_memory`.
    """

    matrix: Tensor
    baseline: Tensor
    seconds: float = 0.0
    steps: int = 0
    peak_memory: int = 0

    @property
    def summary(self) -> Summary:
        """Its metrics, such as summary.average_accuracy in percent."""
        return summarize(self.matrix, self.baseline)

    def __str__(self) -> str:
        try:
            return text_matrix(self)
        except InputError:  # the package rich is missing: printing must not fail for that
            return repr(self)


def text_matrix(result: Result) -> str:
    """The learned rows of the matrix as aligned text with the metrics below, several lines."""
    tasks = range(len(result.matrix))
    cell = "6.2f" if len(tasks) <= WIDE else "3.0f"
    rows = [["after task", *map(str, tasks)]]
    for label, values in learned_rows(result, "none"):
        rows.append([label, *("-" if math.isnan(value) else format(value, cell) for value in values)])
    matrix = text_table(rows, ">" * len(rows[0]))
    return "\n".join([matrix, "", *summary_lines(result.summary)])


def text_after_task(result: Result, scenario: Scenario) -> str:
    """ "after task 1 (digits 2, 3): 99.1 98.7 (average 98.90 %)": accuracies on the tasks learned so far."""
    summary = result.summary
    row = result.matrix[summary.tasks_learned - 1, : summary.tasks_learned].tolist()
    accuracies = " ".join(f"{value:.1f}" for value in row)
    last = scenario.label(summary.tasks_learned - 1)
    return f"after {last}: {accuracies} (average {summary.average_accuracy:.2f} %)"


def learned_rows(result: Result, untrained: str) -> list[tuple[str, list[float]]]:
    """Label and percentages of the untrained model's row, then of each learned task's."""
    learned = tasks_learned(result.matrix)
    return [(untrained, result.baseline.tolist()), *((str(i), result.matrix[i].tolist()) for i in range(learned))]


def summary_lines(summary: Summary) -> list[str]:
    """One line per metric that is known, with its unit."""
    known = ((name, unit, getattr(summary, name)) for name, unit in METRIC_UNITS.items())
    return [f"{name.replace('_', ' '):<18}{value:8.2f} {unit}" for name, unit, value in known if value is not None]
