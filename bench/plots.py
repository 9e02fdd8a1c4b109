"""Pictures of a results file, and of nothing else: `python -m bench.plots [CSV...]`."""

import argparse
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from . import results
from .growth import WIDTHS, memory_floor
from .table import number

# Text stays text, and a picture drawn again from the same rows is the same file.
plt.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "hypermask_fast", "font.size": 9}
FORMAT = "svg"


def plot(path: Path, folder: Path) -> list[Path]:
    """Draws a results file's newest rows; returns the pictures, named after the file."""
    rows = results.latest(results.read(path))
    colours = {name: f"C{i % 10}" for i, name in enumerate(rows.contender.unique())}
    made = []
    for malloc, chosen in rows.groupby("malloc", sort=False):
        stem = folder / f"{path.stem}-{malloc.replace(' ', '-')}"
        is_step = chosen.task_index.notna()
        steps, ops = chosen[is_step], chosen[~is_step]
        grown = steps[steps.experiment.str.startswith("growth/")]
        if len(grown):
            made.append(_save(_growth(grown, colours), f"{stem}-growth"))
        steps = steps.drop(grown.index)
        if len(steps):
            last = steps[steps.task_index == steps.groupby("experiment").task_index.transform("max")]
            made.append(_save(_against_tasks(steps, colours), f"{stem}-step-time"))
            made.append(_save(_ratios(last, colours, "Whole step, last task"), f"{stem}-step-ratios"))
        if len(ops):
            made.append(_save(_ratios(ops, colours, "Ops"), f"{stem}-op-ratios"))
    return made


def _save(figure: plt.Figure, stem: str) -> Path:
    file = Path(f"{stem}.{FORMAT}")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150, metadata={"Date": None} if FORMAT == "svg" else None)
    plt.close(figure)
    return file


def _caption(rows: pd.DataFrame) -> str:
    row = rows.iloc[-1]
    return f"{row.device}, {row.threads} threads, torch {row.torch}, malloc {row.malloc}, commit {row.commit}"


def _plain_numbers(axis: matplotlib.axis.Axis) -> None:
    """A logarithmic axis that says 20, 50, 100 and not 2 x 10^1."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _against_tasks(rows: pd.DataFrame, colours: dict[str, str]) -> plt.Figure:
    """Step time against the task's index, one panel per experiment, bars from the 20th to the 80th percentile."""
    experiments = rows.experiment.unique()
    figure, panels = plt.subplots(
        1, len(experiments), figsize=(1 + 2.6 * len(experiments), 3.8), squeeze=False, layout="constrained"
    )
    for panel, experiment in zip(panels[0], experiments, strict=True):
        here = rows[rows.experiment == experiment].sort_values("task_index", kind="stable")
        for contender, line in here.groupby("contender", sort=False):
            at, times = line.task_index.astype(int), line.median_ms
            spread = [times - line.p20_ms, line.p80_ms - times]
            panel.errorbar(at, times, spread, label=contender, color=colours[contender], marker="o", ms=4, capsize=2)
        floor = here.groupby("task_index").floor_ms.last()
        panel.plot(floor.index.astype(int), floor, "k_:", ms=10, label="floor")
        panel.set(title=experiment, xlabel="task", yscale="log", xticks=sorted(here.task_index.unique()))
        panel.margins(x=0.15)
        _plain_numbers(panel.yaxis)
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("ms per step")
    labelled = {}
    for panel in panels[0]:
        labelled |= dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    figure.legend(labelled.values(), labelled, loc="outside lower center", ncols=len(labelled), frameon=False)
    figure.suptitle(_caption(rows), fontsize=7)
    return figure


def _growth(rows: pd.DataFrame, colours: dict[str, str]) -> plt.Figure:
    """Time and peak memory of a step against the number of tasks, a column per size of the hypernetwork."""
    sizes = [f"growth/{size}" for size in WIDTHS if f"growth/{size}" in set(rows.experiment)]
    figure, panels = plt.subplots(
        2,
        len(sizes),
        figsize=(1 + 2.6 * len(sizes), 6.4),
        squeeze=False,
        sharex=True,
        sharey="row",
        layout="constrained",
    )
    for column, size in zip(panels.T, sizes, strict=True):
        here = rows[rows.experiment == size].assign(tasks=rows.task_index.astype("Int64") + 1).sort_values("tasks")
        for contender, line in here.groupby("contender", sort=False):
            style = {"label": contender, "color": colours[contender], "marker": "o", "ms": 4}
            column[0].plot(line.tasks.astype(int), line.median_ms, **style)
            column[1].plot(line.tasks.astype(int), line.peak_memory.astype(float) / 1e9, **style)
        counts = sorted(here.tasks.astype(int).unique())
        floors = here.groupby("tasks").floor_ms.last()
        column[0].plot(counts, floors, "k_:", ms=10, label="floor")
        column[1].plot(counts, [memory_floor(size, n) / 1e9 for n in counts], "k_:", ms=10, label="floor")
        column[0].set_title(f"{size.removeprefix('growth/')} weights")
        column[1].set_xlabel("tasks")
        for panel in column:
            panel.set(xscale="log", yscale="log")
            panel.set_xticks(counts, counts)
            panel.xaxis.set_minor_formatter(NullFormatter())
            panel.grid(alpha=0.3)
    for panel, label in zip(panels[:, 0], ("ms per step, last task", "peak memory, GB"), strict=True):
        panel.set_ylabel(label)
        _plain_numbers(panel.yaxis)
    lines = dict(zip(*reversed(panels[0][0].get_legend_handles_labels()), strict=True))
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=len(lines), frameon=False)
    figure.suptitle(_caption(rows), fontsize=7)
    return figure


def _ratios(rows: pd.DataFrame, colours: dict[str, str], title: str) -> plt.Figure:
    """How many times as long as the library each peer takes, a group of bars per case."""
    rows = rows[rows.ratio.notna() & (rows.ratio != 1)]
    cases = rows.groupby("case", sort=False).ngroup()
    rows = rows.assign(place=cases).sort_values("place", kind="stable")
    at = np.arange(len(rows)) + 0.8 * rows.place  # a gap between cases
    figure, panel = plt.subplots(figsize=(7, 0.24 * (len(rows) + 0.8 * cases.nunique()) + 1), layout="constrained")
    bars = panel.barh(at, rows.ratio, color=rows.contender.map(colours))
    panel.axvline(1, color="black", linewidth=0.8)
    ground = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # a number on the line at 1 can be read
    panel.bar_label(bars, [number(ratio) for ratio in rows.ratio], fontsize=7, padding=3, bbox=ground)
    panel.set_yticks(at, rows.case + ": " + rows.contender, fontsize=7)
    panel.set(title=f"{title}: time over the library's", xscale="log")
    _plain_numbers(panel.xaxis)
    panel.margins(x=0.12, y=0.02)
    panel.invert_yaxis()
    if len(rows):
        panel.set_xlabel(_caption(rows), fontsize=7)
    return figure


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.plots", description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, metavar="CSV", help="default: all in bench/results")
    parser.add_argument("--out", type=Path, help="folder of the pictures; default: beside each file")
    arguments = parser.parse_args(argv)
    files = arguments.files or sorted(results.FOLDER.glob("*.csv"))
    if not files:
        print(f"no results in {results.FOLDER}: python -m bench makes them", file=sys.stderr)
        return 1
    for file in files:
        for picture in plot(file, arguments.out or file.parent):
            print(picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
