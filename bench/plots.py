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
from .case import OURS
from .growth import WIDTHS, memory_floor
from .table import number

# Text stays text, and a picture drawn again from the same rows is the same file.
plt.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "hypermask_fast", "font.size": 9}
FORMAT = "svg"

# A contender has the same colour in every picture. Colour-blind people can tell them apart (Okabe and Ito's palette).
COLOURS = {
    OURS: "#0072b2",
    "ours in any loop": "#56b4e9",
    "hypnettorch": "#d55e00",
    "batched torch": "#009e73",
    "torch.compile": "#cc79a7",
    "plain network": "#7f7f7f",
    "pass in place": "#e69f00",
}
OTHERS = ("#f0e442", "#999933", "#882255", "#44aa99", "#332288", "#aa4499")


def plot(path: Path, folder: Path) -> list[Path]:
    """Draws a results file's newest rows, but those beside other work; returns the pictures, named after the file."""
    rows = of_one_run(results.latest(results.read(path)))
    rows = rows[~rows.case.str.contains(" beside ")]
    new = [name for name in rows.contender.unique() if name not in COLOURS]
    colours = COLOURS | {name: OTHERS[i % len(OTHERS)] for i, name in enumerate(new)}
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
            made.append(_save(_ratios(last, colours, "Training step, last task"), f"{stem}-step-ratios"))
        if (ops.contender != OURS).any():
            made.append(_save(_ratios(ops, colours, "Ops"), f"{stem}-op-ratios"))
    return made


def of_one_run(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of each case that are of the same run as the library's: contenders took turns within a run, and times of
    two runs can't be compared."""
    run = rows.commit + " " + rows.command
    ours = rows.assign(run=run)[rows.contender == OURS].set_index(["case", "malloc", "threads"]).run.to_dict()
    keys = zip(rows.case, rows.malloc, rows.threads, strict=True)
    return rows[[ours.get(key, mine) == mine for key, mine in zip(keys, run, strict=True)]]


def _save(figure: plt.Figure, stem: str) -> Path:
    file = Path(f"{stem}.{FORMAT}")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150, metadata={"Date": None} if FORMAT == "svg" else None)
    plt.close(figure)
    return file


def _caption(rows: pd.DataFrame) -> str:
    """Where and when the rows were measured."""
    row = rows.iloc[-1]
    days, commits = (", ".join(dict.fromkeys(column)) for column in (rows.date.str[:10], rows.commit))
    setting = f"{row.device}, {row.threads} threads, PyTorch {row.torch}, allocator {row.malloc}"
    return f"{setting}\n{days}, commit {commits}"


def _plain_numbers(axis: matplotlib.axis.Axis) -> None:
    """A logarithmic axis that says 20, 50, 100 and not 2 x 10^1."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _legend(figure: plt.Figure, panels: np.ndarray) -> None:
    """One legend below all panels."""
    labelled = {}
    for panel in panels.flat:
        labelled |= dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    figure.legend(labelled.values(), labelled, loc="outside lower center", ncols=3, frameon=False)


def _against_tasks(rows: pd.DataFrame, colours: dict[str, str]) -> plt.Figure:
    """Step time against the task's index, one panel per experiment, bars from the 20th to the 80th percentile."""
    experiments = rows.experiment.unique()
    high = -(-len(experiments) // 2)
    figure, panels = plt.subplots(high, 2, figsize=(7, 1.2 + 2.6 * high), squeeze=False, layout="constrained")
    for panel in panels.flat[len(experiments) :]:
        panel.set_axis_off()
    for panel, experiment in zip(panels.flat, experiments, strict=False):
        here = rows[rows.experiment == experiment].sort_values("task_index", kind="stable")
        for contender, line in here.groupby("contender", sort=False):
            at, times = line.task_index.astype(int), line.median_ms
            spread = [times - line.p20_ms, line.p80_ms - times]
            panel.errorbar(at, times, spread, label=contender, color=colours[contender], marker="o", ms=4, capsize=2)
        floor = here.groupby("task_index").floor_ms.last()
        panel.plot(floor.index.astype(int), floor, "k_:", ms=10, label="floor")
        panel.set(title=experiment, xlabel="task, counted from 0", yscale="log", ylabel="milliseconds per step")
        panel.set_xticks(sorted(here.task_index.unique()))
        panel.margins(x=0.15)
        _plain_numbers(panel.yaxis)
        panel.grid(alpha=0.3)
    _legend(figure, panels)
    figure.suptitle(_caption(rows), fontsize=8)
    return figure


def _growth(rows: pd.DataFrame, colours: dict[str, str]) -> plt.Figure:
    """Time and peak memory of a step against the number of tasks, a column per size of the hypernetwork."""
    sizes = [f"growth/{size}" for size in WIDTHS if f"growth/{size}" in set(rows.experiment)]
    figure, panels = plt.subplots(
        2,
        len(sizes),
        figsize=(max(7, 0.4 + 2.2 * len(sizes)), 6.4),
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
        column[0].set_title(f"{size.removeprefix('growth/').removesuffix('M')} million weights")
        column[1].set_xlabel("number of tasks")
        for panel in column:
            panel.set(xscale="log", yscale="log")
            panel.set_xticks(counts, counts)
            panel.xaxis.set_minor_formatter(NullFormatter())
            panel.grid(alpha=0.3)
    for panel, label in zip(panels[:, 0], ("milliseconds per step, last task", "peak memory, GB"), strict=True):
        panel.set_ylabel(label)
        _plain_numbers(panel.yaxis)
    _legend(figure, panels)
    figure.suptitle(_caption(rows), fontsize=8)
    return figure


def _ratios(rows: pd.DataFrame, colours: dict[str, str], title: str) -> plt.Figure:
    """How many times as long as the library each peer takes, a group of bars per case."""
    rows = rows[rows.ratio.notna() & (rows.contender != OURS)]
    cases = rows.groupby("case", sort=False).ngroup()
    rows = rows.assign(place=cases).sort_values("place", kind="stable")
    at = np.arange(len(rows)) + 1.3 * rows.place  # above each case a line for its name
    figure, panel = plt.subplots(figsize=(7, 0.25 * (len(rows) + 1.3 * cases.nunique()) + 1.3), layout="constrained")
    bars = panel.barh(at, rows.ratio - 1, left=1, color=rows.contender.map(colours))  # from 1, the library's own time
    panel.axvline(1, color="black", linewidth=0.8)
    ends = [number(ratio) for ratio in rows.ratio]
    panel.set(title=f"{title}: times as long as hypermask_fast takes", xscale="log")
    for bar, ratio, end in zip(bars, rows.ratio, ends, strict=True):
        place = {"ha": "left", "xytext": (3, 0)} if ratio >= 1 else {"ha": "right", "xytext": (-3, 0)}
        middle = bar.get_y() + bar.get_height() / 2
        panel.annotate(end, (ratio, middle), va="center", fontsize=8, textcoords="offset points", **place)
    ground = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # a name on the line at 1 can be read
    for case, group in at.groupby(rows.case, sort=False):
        style = {"transform": panel.get_yaxis_transform(), "va": "center", "weight": "bold", "bbox": ground}
        panel.text(0.01, group.min() - 0.95, case.replace("/task", ", task "), **style)
    panel.set_yticks(at, rows.contender)
    panel.set_ylim(at.max() + 0.8, -1.5)
    _plain_numbers(panel.xaxis)
    panel.set_xlim(min(0.9, 0.6 * rows.ratio.min()), 1.5 * max(rows.ratio.max(), 1.1))
    panel.set_xlabel(_caption(rows), fontsize=8)
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
