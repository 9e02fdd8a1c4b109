"""Pictures of a results file, and of nothing else: `python -m bench.plots [CSV...]`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from . import results
from .results import Row

FORMATS = ("png", "svg")


def plot(path: Path, folder: Path) -> list[Path]:
    """Draws a results file's newest rows; returns the pictures, named after the file."""
    rows = results.latest(results.read(path))
    made = []
    for malloc in dict.fromkeys(row.malloc for row in rows):
        chosen = [row for row in rows if row.malloc == malloc]
        tag = f"{path.stem}-{malloc.replace(' ', '-')}"
        if steps := [row for row in chosen if row.task_index != ""]:
            made += _save(_against_tasks(steps), folder / f"{tag}-step-time")
            made += _save(_ratios(_at_last_task(steps), "whole step, last task"), folder / f"{tag}-step-ratios")
        if ops := [row for row in chosen if row.task_index == ""]:
            made += _save(_ratios(ops, "ops"), folder / f"{tag}-op-ratios")
    return made


def _save(figure: plt.Figure, stem: Path) -> list[Path]:
    stem.parent.mkdir(parents=True, exist_ok=True)
    files = [stem.with_name(f"{stem.name}.{kind}") for kind in FORMATS]
    for file in files:
        figure.savefig(file, dpi=150, bbox_inches="tight")
    plt.close(figure)
    return files


def _unique(values: Sequence) -> list:
    return list(dict.fromkeys(values))


def _caption(rows: Sequence[Row]) -> str:
    row = rows[-1]
    return f"{row.device}, {row.threads} threads, torch {row.torch}, malloc {row.malloc}, commit {row.commit}"


def _against_tasks(rows: Sequence[Row]) -> plt.Figure:
    """Step time against the task's index, one panel per experiment, bars from the 20th to the 80th percentile."""
    experiments = _unique([row.experiment for row in rows])
    figure, panels = plt.subplots(1, len(experiments), figsize=(4 * len(experiments), 3.6), squeeze=False)
    colours = {name: f"C{i}" for i, name in enumerate(_unique([row.contender for row in rows]))}
    for panel, experiment in zip(panels[0], experiments, strict=True):
        here = [row for row in rows if row.experiment == experiment]
        for contender in _unique([row.contender for row in here]):
            line = sorted((row for row in here if row.contender == contender), key=lambda row: row.task_index)
            times = [row.median_ms for row in line]
            spread = [[row.median_ms - row.p20_ms for row in line], [row.p80_ms - row.median_ms for row in line]]
            at = [row.task_index for row in line]
            panel.errorbar(at, times, spread, label=contender, color=colours[contender], marker="o", capsize=2)
        floor = sorted({(row.task_index, row.floor_ms) for row in here})
        panel.plot(*zip(*floor, strict=True), color="black", linestyle=":", label="floor")
        panel.set(title=experiment, xlabel="task index", ylabel="ms per step", yscale="log")
        panel.grid(alpha=0.3)
    panels[0][0].legend(fontsize=7)
    figure.text(0.5, -0.03, _caption(rows), ha="center", fontsize=7)
    return figure


def _at_last_task(rows: Sequence[Row]) -> list[Row]:
    last = {row.experiment: max(r.task_index for r in rows if r.experiment == row.experiment) for row in rows}
    return [row for row in rows if row.task_index == last[row.experiment]]


def _ratios(rows: Sequence[Row], title: str) -> plt.Figure:
    """How many times as long as the library each peer takes, per case."""
    rows = [row for row in rows if row.ratio != "" and row.ratio != 1]
    labels = [f"{row.case}: {row.contender}" for row in rows]
    figure, panel = plt.subplots(figsize=(7, 0.22 * len(rows) + 1.2))
    colours = {name: f"C{i % 10}" for i, name in enumerate(_unique([row.contender for row in rows]))}
    bars = panel.barh(labels, [row.ratio for row in rows], color=[colours[row.contender] for row in rows])
    panel.bar_label(bars, [f"{row.ratio:.3g}" for row in rows], fontsize=7, padding=2)
    panel.axvline(1, color="black", linewidth=0.8)
    panel.set(title=f"{title}: time over the library's", xscale="log")
    panel.margins(x=0.15)
    panel.invert_yaxis()
    panel.tick_params(axis="y", labelsize=7)
    if rows:
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
