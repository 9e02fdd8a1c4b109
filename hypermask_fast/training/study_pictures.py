"""Figures over several runs: learning against the end and the mean matrix, as the published study has them; groups of
runs side by side, over tasks, and seed by seed."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..drawing import figure_class, wrapped
from ..errors import InputError
from . import describe
from .report import matrix_heat_map
from .study import LEVEL, METRIC_UNITS, Group, differences, estimate, estimate_text, known_metrics

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


def matrices_figure(groups: Sequence[Group]) -> "Figure":
    """The mean accuracy matrix of each group, side by side, up to three in a row, all in the same colours."""
    make = figure_class()
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    tasks = len(groups[0].runs[0].matrix)
    columns = min(len(groups), 3)
    rows = -(-len(groups) // columns)
    side = min(max(2.6, 0.45 * tasks), 9.0)
    width = max(6.4, columns * (side + 0.7) + 1)
    lines = wrapped(describe.title(groups[0].config), int(11 * width))
    figure = make(figsize=(width, rows * (side + 1.1) + 0.4), dpi=110, layout="constrained")
    figure.suptitle("\n".join(lines), fontsize=11)
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.flat[len(groups) :]:
        axes.set_axis_off()
    colours = Normalize(0, 100)
    for axes, group in zip(panels.flat, groups, strict=False):
        axes.imshow(group.mean_matrix, norm=colours, cmap="viridis")
        step = 1 if tasks <= 12 else 5
        axes.set(xticks=range(0, tasks, step), yticks=range(0, tasks, step))
        axes.set_xlabel("accuracy on task", fontsize=9)
        axes.set_ylabel("after training task", fontsize=9)
        axes.tick_params(labelsize=8)
        average = estimate_text(group.estimate("average_accuracy"))
        interval = f" ({_PERCENT} interval)" if len(group.runs) > 1 else ""
        words = f"{group.label}\naverage {average} %{interval}, {describe.seed_words(group.seeds)}".strip()
        axes.set_title("\n".join(wrapped(words, max(24, int(16 * side)))), fontsize=9)
        for (i, j), value in np.ndenumerate(group.mean_matrix):
            if tasks <= 12 and not np.isnan(value):
                colour = "black" if value > 60 else "white"
                axes.text(
                    j, i, f"{value:.1f}", ha="center", va="center", color=colour, fontsize=7, alpha=0.55 if j > i else 1
                )
    figure.colorbar(ScalarMappable(colours, "viridis"), ax=panels, label="accuracy (%), mean over seeds", shrink=0.8)
    return figure


def accuracy_figure(groups: Sequence[Group]) -> "Figure":
    """After each task, the mean accuracy on all tasks learned until then, with 95 % intervals over seeds; a line per
    group."""
    tasks = len(groups[0].runs[0].matrix)
    width = max(6.4, 1.6 + 0.42 * tasks)
    labels = [f"{group.label or describe.title(group.config)} ({describe.seed_words(group.seeds)})" for group in groups]
    figure = figure_class()(figsize=(width, 4.2 + 0.2 * len(groups)), dpi=110, layout="constrained")
    axes = figure.subplots()
    spread = np.linspace(-0.08, 0.08, len(groups)) if len(groups) > 1 else [0.0]
    for group, label, offset in zip(groups, labels, spread, strict=True):
        estimates = [estimate(values) for values in group.average_so_far.T]
        halves = [each.half_width for each in estimates] if len(group.runs) > 1 else None
        places, means = np.arange(tasks) + offset, [each.mean for each in estimates]
        axes.errorbar(
            places, means, halves, fmt="o-", ms=4, capsize=3, label="\n".join(wrapped(label, int(11 * width)))
        )
    axes.set_title("\n".join(wrapped(describe.title(groups[0].config) if len(groups) > 1 else "", int(11 * width))))
    axes.title.set_fontsize(11)
    axes.set_ylabel(
        f"mean test accuracy on tasks learned so far (%)\nmean and {_PERCENT} interval over seeds", fontsize=9
    )
    axes.grid(axis="y", alpha=0.3)
    axes.tick_params(labelsize=9)
    _task_names(axes, groups[0])
    axes.set_xlabel("after training task")
    figure.legend(loc="outside lower center", fontsize=9)
    return figure


def differences_figure(groups: Sequence[Group]) -> "Figure":
    """Average accuracy of each group less the first one's, seed by seed, with the mean and its 95 % interval.

    Raises:
        InputError: no group has a seed in common with the first.
    """
    first, compared = groups[0], differences(groups, "average_accuracy")
    if not compared:
        raise InputError("no settings with a seed in common, so there are no differences to draw")
    figure = figure_class()(figsize=(7.6, 1.8 + 0.62 * len(compared)), dpi=110, layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color="0.4", linewidth=1)
    for row, (_, pair) in enumerate(compared):
        first_label = row == 0
        axes.plot(
            pair.differences,
            [row] * len(pair.seeds),
            "o",
            ms=5,
            alpha=0.6,
            color="tab:blue",
            label="one seed" if first_label else None,
        )
        half = None if len(pair.seeds) == 1 else pair.estimate.half_width
        axes.errorbar(
            pair.estimate.mean,
            row + 0.22,
            xerr=half,
            fmt="D",
            ms=5,
            capsize=3,
            color="tab:orange",
            label=f"mean and {_PERCENT} interval" if first_label else None,
        )
    labels = ["\n".join(wrapped(f"{group.label} ({describe.seed_words(pair.seeds)})", 40)) for group, pair in compared]
    axes.set_yticks(range(len(compared)), labels, fontsize=9)
    axes.set_ylim(len(compared) - 0.4, -0.6)
    axes.grid(axis="x", alpha=0.3)
    axes.tick_params(axis="x", labelsize=9)
    axes.set_xlabel("average accuracy (points), seed by seed")
    axes.set_title("\n".join(wrapped(f"difference from {first.label}", 80)), fontsize=10)
    figure.legend(loc="outside lower center", fontsize=9, ncols=2)
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
    named = {describe.task_names(run.config)[:tasks] for run in group.runs}
    names = named.pop() if tasks <= 10 and len(named) == 1 else ()  # classes of a task may depend on the seed
    labels = [f"{i}\n{names[i]}" if i < len(names) and len(names[i]) <= 14 else str(i) for i in range(tasks)]
    step = 1 if tasks <= 20 else 5
    axes.set_xticks(range(0, tasks, step), labels[::step])
    axes.set_xlabel("task")


def mean_matrix_figure(group: Group) -> "Figure":
    """The accuracy matrix, mean over the group's seeds, with the metrics and their 95 % intervals above it."""
    shown = [name for name in ("average_accuracy", "forgetting") if name in known_metrics([group])]
    words = [f"{n.replace('_', ' ')} {estimate_text(group.estimate(n))} {METRIC_UNITS[n]}" for n in shown]
    count = len(group.runs)
    interval = f" ({_PERCENT} interval over {count} seeds)" if count > 1 else ""
    caption = f"{group.title}\n{', '.join(words)}{interval}"
    return matrix_heat_map(
        group.mean_matrix, caption, f"accuracy (%), mean of {count} runs" if count > 1 else "accuracy (%)"
    )
