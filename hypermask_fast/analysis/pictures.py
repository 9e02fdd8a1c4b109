"""Pictures of an inspection, which say themselves what they show; and its files."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..drawing import figure_class, png, wrapped
from ..errors import InputError
from ..files import check_writable, write_atomic, writing
from .inspection import Inspection, Masks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NUMBERS = "masks.json"
OVERLAP, CAPACITY, TENSORS, DRIFT = (f"masks-{name}.png" for name in ("overlap", "capacity", "tensors", "drift"))
FILES = (NUMBERS, OVERLAP, CAPACITY, TENSORS, DRIFT)
_NUMBERED = 12  # tasks up to which cells show their numbers
_MOST = 40  # tensors that a picture shows
_CHANCE = "if the masks were unrelated"
_NARROWEST = 0.1  # span of a colour scale: smaller differences should look small


def check_free(folder: Path | str, flag: str = "") -> None:
    """Raises InputError where `write` would replace a file or can't write, or matplotlib is missing.

    flag: see `check_writable`.
    """
    check_writable(Path(folder), flag)
    for name in FILES:
        if (Path(folder) / name).exists():
            raise InputError(f"{Path(folder) / name} exists: choose another folder")
    figure_class()


def write(found: Inspection, folder: Path | str, title: str = "") -> list[Path]:
    """Writes masks.json and the pictures that say something to a folder, which is made where it is not there.

    Returns:
        The files.

    Raises:
        InputError: one of them exists, can't be written, or matplotlib is missing.
    """
    folder = Path(folder)
    check_free(folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    content = json.dumps({"title": title, **found.to_dict()}, allow_nan=False) + "\n"
    files = {NUMBERS: content} | {name: png(figure) for name, figure in figures(found, title).items()}
    for name, data in files.items():
        write_atomic(folder / name, data)
    return [folder / name for name in files]


def figures(found: Inspection, title: str = "") -> "dict[str, Figure]":
    """File name -> picture; those that would show nothing are left out, see `left_out`."""
    drawn = {TENSORS: _tensors(found, title)}
    if len(found.tasks) > 1:
        drawn[OVERLAP] = _overlap(found, title)
        if not found.keeps_all:
            drawn[CAPACITY] = _capacity(found, title)
    if found.drift:
        drawn[DRIFT] = _drift(found, title)
    return drawn


def left_out(found: Inspection) -> list[str]:
    """Which pictures say nothing here, and why; a line each."""
    if len(found.tasks) == 1:
        return ["one task: no picture of overlap and capacity, which compare tasks"]
    return ["every mask keeps every entry: no picture of capacity, and of overlap the values alone"] * found.keeps_all


def _figure(width: float, height: float, title: str, what: str) -> "Figure":
    """height: in inches, without what is written above."""
    lines = wrapped(f"{what}\n{title}", int(11 * width))
    figure = figure_class()(figsize=(width, height + 0.2 * len(lines)), dpi=110, layout="constrained")
    figure.suptitle("\n".join(lines), fontsize=11)
    return figure


def _overlap(found: Inspection, title: str) -> "Figure":
    tasks = len(found.tasks)
    side = max(0.5 * tasks, 2.6) if tasks <= _NUMBERED else 5.0
    panels = [] if found.keeps_all else [("Jaccard index of the kept entries", found.whole.jaccard, found.chance)]
    panels += [("cosine of the masks' values", found.whole.cosine, None)]
    panels += [("cosine of the task embeddings", found.embeddings, None)]
    what = "What the masks of two tasks have in common"
    if found.keeps_all:
        what += " (every mask keeps every entry, so their Jaccard index is 1)"
    figure = _figure(len(panels) * (side + 1.7), side + 1.2, title, what)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for panel, (label, matrix, chance) in zip(axes, panels, strict=True):
        signed = matrix is found.embeddings
        values = np.array(matrix, dtype=np.float64)
        np.fill_diagonal(values, np.nan)
        low, high = (-1.0, 1.0) if signed else _scale(values, chance)
        image = panel.imshow(values, vmin=low, vmax=high, cmap="coolwarm" if signed else "viridis")
        panel.set_facecolor("0.88")  # of a task with itself
        _task_ticks(panel.xaxis, found.tasks)
        _task_ticks(panel.yaxis, found.tasks)
        panel.set(xlabel="task", ylabel="task")
        panel.set_title(label, fontsize=10)
        bar = figure.colorbar(image, ax=panel, shrink=0.8)
        bar.ax.tick_params(labelsize=8)
        if chance is not None:
            bar.ax.axhline(chance, color="red", linewidth=2)
            bar.set_label(f"red: {chance:.2f}, {_CHANCE}", fontsize=8)
        if tasks <= _NUMBERED:
            _numbers(panel, values, low, high, middle_is_light=signed)
    return figure


def _scale(values: np.ndarray, chance: float | None) -> tuple[float, float]:
    """Between which values colours differ: those that there are."""
    there = [*values[~np.isnan(values)], *([] if chance is None else [chance])] or [0.0]
    low, high = min(there), max(there)
    missing = max(_NARROWEST - (high - low), 0.05 * (high - low)) / 2  # a little at both ends, for the red line
    return low - missing, high + missing


def _numbers(axes: "Axes", values: np.ndarray, low: float, high: float, middle_is_light: bool = False) -> None:
    for i, j in np.argwhere(~np.isnan(values)).tolist():
        share = (values[i, j] - low) / (high - low)
        dark = abs(share - 0.5) > 0.4 if middle_is_light else share < 0.6
        text = f"{round(values[i, j], 2) + 0.0:.2f}"  # no -0.00
        axes.text(j, i, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")


def _task_ticks(axis: Any, tasks: Sequence[int]) -> None:
    step = 1 if len(tasks) <= 20 else 5
    shown = range(0, len(tasks), step)
    axis.set_ticks(list(shown), [str(tasks[i]) for i in shown], fontsize=9)


def _shown(found: Inspection) -> tuple[list[Masks], str]:
    """The tensors that a picture has room for, and a word on it."""
    if len(found.tensors) <= _MOST:
        return list(found.tensors), ""
    largest = sorted(found.tensors, key=lambda masks: masks.entries)[-_MOST:]
    return [masks for masks in found.tensors if masks in largest], f" (the {_MOST} largest of {len(found.tensors)})"


def _labels(masks: Sequence[Masks]) -> list[str]:
    return [f"{each.name if len(each.name) <= 40 else '...' + each.name[-37:]} ({each.entries:,})" for each in masks]


def _capacity(found: Inspection, title: str) -> "Figure":
    tasks, used, (tensors, of_all) = len(found.tasks), np.array(found.whole.used), _shown(found)
    height, across = max(3.8, 1.2 + 0.26 * (len(tensors) + 1)), max(4.5, 0.16 * tasks)
    what = f"Capacity: {found.whole.free:.1f} % of the entries are kept by no task"
    figure = _figure(7.5 + across, height, title, what)
    left, right = figure.subplots(1, 2, width_ratios=[across, 6])
    before = np.array([0.0, *used[:-1]])
    places = np.arange(tasks)
    left.bar(places, before, color="C0", label="kept by an earlier task")
    left.bar(places, used - before, bottom=before, color="C1", label="kept by this task first")
    left.bar(places, 100 - used, bottom=used, color="0.85", label="free")
    share = np.array(found.whole.kept) / 100
    left.plot(places, 100 * (1 - np.cumprod(1 - share)), "k_", ms=12, mew=1.5, label=f"kept so far, {_CHANCE}")
    left.set(ylim=(0, 101), xlabel="after task", ylabel="masked entries (%)", yticks=range(0, 101, 20))
    left.set_title("what the tasks so far keep", fontsize=10)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower left", fontsize=8, ncols=2)
    _task_ticks(left.xaxis, found.tasks)
    _stacks(right, [*tensors, found.whole], tasks)
    right.set_title(f"how many tasks keep an entry{of_all}", fontsize=10)
    return figure


def _stacks(axes: "Axes", rows: Sequence[Masks], tasks: int) -> None:
    """A bar per tensor: its entries by how many tasks keep them."""
    from matplotlib import colormaps

    parts = np.array([masks.by_tasks for masks in rows])
    starts = np.hstack([np.zeros((len(rows), 1)), parts.cumsum(1)[:, :-1]])
    named = {0, 1, tasks // 4, tasks // 2, 3 * tasks // 4, tasks} if tasks > 8 else set(range(tasks + 1))
    for count in range(tasks + 1):
        colour = "0.85" if count == 0 else colormaps["viridis"](1 - (count - 1) / max(tasks - 1, 1))
        label = "0 (free)" if count == 0 else f"{count} (all)" if count == tasks else str(count)
        axes.barh(range(len(rows)), parts[:, count], left=starts[:, count], color=colour, label=label)
        if count not in named:
            axes.containers[-1].set_label("_")  # a legend leaves it out
    axes.set_yticks(range(len(rows)), _labels(rows), fontsize=8)
    axes.invert_yaxis()
    axes.set(xlim=(0, 100), xlabel="entries of the tensor (%)", ylabel="tensor (entries)")
    axes.legend(title="tasks", loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8, title_fontsize=8)


def _tensors(found: Inspection, title: str) -> "Figure":
    tasks, (tensors, of_all) = len(found.tasks), _shown(found)
    rows = [*tensors, found.whole]
    across = max(0.5 * tasks, 1.2) if tasks <= _NUMBERED else min(0.2 * tasks, 8)
    paired = tasks > 1
    width, height = across + 3.6 + 3.2 * paired, max(2.2, 1.1 + 0.26 * len(rows))
    kept = "every entry kept" if found.keeps_all else f"{found.whole.kept[0]:.1f} % kept"
    figure = _figure(width, height, title, f"The masks of each tensor{of_all}; {kept}")
    panels = figure.subplots(1, 1 + paired, squeeze=False, width_ratios=[across + 2] + [3] * paired)[0]
    values = np.array([masks.mean_kept_value for masks in rows])
    image = panels[0].imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    panels[0].set_yticks(range(len(rows)), _labels(rows), fontsize=8)
    panels[0].set(xlabel="task", ylabel="tensor (entries)")
    panels[0].set_title("mean value of the kept entries", fontsize=10)
    _task_ticks(panels[0].xaxis, found.tasks)
    if tasks <= _NUMBERED:
        _numbers(panels[0], values, 0, 1)
    figure.colorbar(image, ax=panels[0]).ax.tick_params(labelsize=8)
    if paired:
        _pairs(panels[1], found, rows)
    return figure


def _pairs(axes: "Axes", found: Inspection, rows: Sequence[Masks]) -> None:
    """A bar per tensor: what two tasks' masks have in common, mean over pairs."""
    pairs = [np.array(m.cosine if found.keeps_all else m.jaccard, dtype=np.float64) for m in rows]
    off = ~np.eye(len(found.tasks), dtype=bool)
    axes.barh(range(len(rows)), [np.nanmean(matrix[off]) for matrix in pairs], color="C0")
    what = "cosine of the values" if found.keeps_all else "Jaccard index of the kept entries"
    axes.set_title(f"two tasks, mean over all pairs:\n{what}", fontsize=10)
    if not found.keeps_all:
        axes.axvline(found.chance, color="red", linewidth=1.5)
        axes.set_xlabel(f"red: {found.chance:.2f}, {_CHANCE}", fontsize=8)
    axes.set(xlim=(0, 1), ylim=(len(rows) - 0.5, -0.5), yticks=[])


def _drift(found: Inspection, title: str) -> "Figure":
    tasks, drift = [each.task for each in found.drift], found.drift
    bars: dict[str, list[float | None]] = {
        "entries of the mask that are kept now and were not, or the reverse": [each.whole.flipped for each in drift],
        "distance of the mask's values, in percent of their norm then": [each.whole.mask_change for each in drift],
        f"predictions on {max(each.samples for each in drift)} samples": [each.predictions_changed for each in drift],
    }
    bars = {name: values for name, values in bars.items() if any(value is not None for value in values)}
    figure = _figure(max(6.4, 0.3 * len(tasks)), 3.4, title, "What has changed for each task since it was learned")
    axes = figure.subplots()
    places, width = np.arange(len(tasks)), 0.8 / len(bars)
    for number, (name, values) in enumerate(bars.items()):
        heights = [np.nan if value is None else value for value in values]
        drawn = axes.bar(places + (number - (len(bars) - 1) / 2) * width, heights, width, label=name)
        if len(tasks) <= _NUMBERED:
            axes.bar_label(drawn, ["" if np.isnan(h) else f"{h:.1f}" for h in heights], fontsize=7)
    _task_ticks(axes.xaxis, tasks)
    axes.set(xlabel="task", ylabel="change (%)")
    axes.margins(y=0.35)
    axes.legend(loc="upper right", fontsize=8)
    return figure
