"""Figures over several runs, as the published study has them: learning against the end, and the mean matrix."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..drawing import figure_class, wrapped
from ..errors import InputError
from .describe import task_names
from .report import matrix_heat_map
from .study import LEVEL, METRIC_UNITS, Group, estimate, estimate_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PERCENT = f"{100 * LEVEL:.0f}\N{NO-BREAK SPACE}%"


def learning_figure(groups: Sequence[Group]) -> "Figure":
    """Accuracy on each task just after learning it and after all tasks, with 95 % intervals over seeds.

    A panel per group, all with the same axis.

    Raises:
        InputError: no group, or groups of different scenarios or numbers of tasks.
    """
    if not groups:
        raise InputError("no runs to draw")
    kinds = {(group.config.data.scenario, len(group.runs[0].matrix)) for group in groups}
    if len(kinds) > 1:
        names = " and ".join(f"{scenario} of {tasks} tasks" for scenario, tasks in sorted(kinds))
        raise InputError(f"runs of {names} don't go into one figure")
    tasks = len(groups[0].runs[0].matrix)
    width = max(6.4, 1.6 + 0.42 * tasks)
    lines = wrapped(groups[0].title if len(groups) == 1 else groups[0].title.partition("\n")[0], int(11 * width))
    height = 0.9 + 0.2 * len(lines) + 3.1 * len(groups)
    figure = figure_class()(figsize=(width, height), dpi=110, layout="constrained")
    figure.suptitle("\n".join(lines), fontsize=11)
    panels = figure.subplots(len(groups), 1, squeeze=False, sharex=True, sharey=True)[:, 0]
    for axes, group in zip(panels, groups, strict=True):
        _learning(axes, group)
        means = [f"{values.mean():.2f} %" for values in (group.just_learned, group.at_the_end)]
        words = f"mean over tasks: {means[0]} just after learning, {means[1]} after all"
        axes.set_title("\n".join(wrapped(f"{group.label}\n{words}", int(12 * width))), fontsize=10)
    _task_names(panels[-1], groups[0])
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", fontsize=9, ncols=2)
    return figure


def _learning(axes: "Axes", group: Group) -> None:
    several = len(group.runs) > 1
    shown = f"mean and {_PERCENT} interval over {len(group.runs)} seeds" if several else "one seed: no interval"
    series = {
        "just after learning it": (group.just_learned, -0.1, "o"),
        "after all tasks": (group.at_the_end, 0.1, "s"),
    }
    for name, (values, offset, marker) in series.items():
        estimates = [estimate(of_task) for of_task in values.T]
        places, means = np.arange(len(estimates)) + offset, [each.mean for each in estimates]
        halves = [each.half_width for each in estimates] if several else None
        axes.errorbar(places, means, halves, fmt=marker, ms=5, capsize=3, label=name)
    axes.set_ylabel(f"test accuracy (%)\n{shown}", fontsize=9)
    axes.grid(axis="y", alpha=0.3)
    axes.tick_params(labelsize=9)


def _task_names(axes: "Axes", group: Group) -> None:
    """Tasks by number, and by name where there is room."""
    tasks = len(group.runs[0].matrix)
    named = {task_names(run.config)[:tasks] for run in group.runs}
    names = named.pop() if tasks <= 10 and len(named) == 1 else ()  # classes of a task may depend on the seed
    labels = [f"{i}\n{names[i]}" if i < len(names) and len(names[i]) <= 14 else str(i) for i in range(tasks)]
    step = 1 if tasks <= 20 else 5
    axes.set_xticks(range(0, tasks, step), labels[::step])
    axes.set_xlabel("task")


def mean_matrix_figure(group: Group) -> "Figure":
    """The accuracy matrix, mean over the group's seeds, with the metrics and their 95 % intervals above it."""
    known = [name for name in METRIC_UNITS if all(getattr(run.summary, name) is not None for run in group.runs)]
    shown = [name for name in ("average_accuracy", "forgetting") if name in known]
    words = [f"{n.replace('_', ' ')} {estimate_text(group.estimate(n))} {METRIC_UNITS[n]}" for n in shown]
    count = len(group.runs)
    interval = f" ({_PERCENT} interval over {count} seeds)" if count > 1 else ""
    caption = f"{group.title}\n{', '.join(words)}{interval}"
    return matrix_heat_map(
        group.mean_matrix, caption, f"accuracy (%), mean of {count} runs" if count > 1 else "accuracy (%)"
    )
