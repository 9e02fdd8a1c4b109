"""What a run leaves in its folder for people and programs: numbers, a table, a picture. No file is half written."""

import json
import math
import platform
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .. import __version__
from ..drawing import figure_class, png, wrapped
from ..errors import InputError
from ..files import write_atomic
from .describe import About
from .metrics import Summary, summarize, tasks_learned
from .result import WIDE, Result, learned_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

METRICS, TIMING = "metrics.json", "timing.json"
MATRIX_TABLE, MATRIX_PICTURE = "accuracy_matrix.csv", "accuracy_matrix.png"
FILES = (METRICS, TIMING, MATRIX_TABLE, MATRIX_PICTURE)
_CELL = 0.75  # inches of such a number's cell


def check_no_reports(folder: Path) -> None:
    """Raises InputError where reports would replace another run's."""
    for name in FILES:
        if (folder / name).exists():
            raise InputError(f"{folder} holds the reports of a run ({name}): choose another folder")


def write_reports(folder: Path, about: About, result: Result, device: torch.device | str) -> None:
    """All four files of `folder`, from the result so far."""
    write_metrics(folder, about, result)
    write_timing(folder, result, device)
    write_matrix_table(folder, result)
    write_matrix_picture(folder, result, f"{about.title}\n{about.details}")


def write_metrics(run_dir: Path, about: About, result: Result) -> None:
    """metrics.json: the run's deterministic numbers and nothing else, so that equal runs give equal bytes.

    Keys: title, seed, fidelity; summary (see `Summary`); baseline (T,) and matrix (T, T), percent, null where not
    measured.
    """
    content = {
        "title": about.title,
        "seed": about.seed,
        "fidelity": about.fidelity,
        "summary": summarize(result.matrix, result.baseline).to_dict(),
        "baseline": _nullable(result.baseline.tolist()),
        "matrix": [_nullable(row) for row in result.matrix.tolist()],
    }
    write_atomic(run_dir / METRICS, _json(content))


def write_timing(run_dir: Path, result: Result, device: torch.device | str) -> None:
    """timing.json: seconds in training steps, steps, steps_per_second, peak_memory_bytes, device, threads, versions."""
    content = {
        "seconds": result.seconds,
        "steps": result.steps,
        "steps_per_second": result.steps / result.seconds if result.seconds > 0 else None,
        "peak_memory_bytes": result.peak_memory,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    write_atomic(run_dir / TIMING, _json(content))


def write_matrix_table(run_dir: Path, result: Result) -> None:
    """accuracy_matrix.csv: columns after_task, task_0, ...; first the untrained model's row, then one per task learned.

    Percent; empty where not measured.
    """
    tasks = len(result.matrix)
    rows = [["after_task", *(f"task_{j}" for j in range(tasks))]]
    for label, values in learned_rows(result, "untrained"):
        rows.append([label, *("" if math.isnan(value) else repr(value) for value in values)])
    write_atomic(run_dir / MATRIX_TABLE, "".join(",".join(row) + "\n" for row in rows))


def write_matrix_picture(run_dir: Path, result: Result, title: str) -> None:
    """accuracy_matrix.png: the matrix as a heat map with its numbers, legible for up to about 40 tasks.

    A picture that can't be drawn or written is a warning: it must not end the run.
    """
    path = run_dir / MATRIX_PICTURE
    try:
        write_atomic(path, png(matrix_figure(result, title)))
    except Exception as error:
        reason = str(error).partition("\n")[0]
        warnings.warn(f"{path} could not be drawn: {type(error).__name__}: {reason}", stacklevel=2)


def check_packages() -> None:
    """Raises InputError where matplotlib is missing. One that is there and fails is a warning, once it should draw."""
    try:
        figure_class()
    except InputError:
        raise
    except Exception:
        return


def matrix_figure(result: Result, title: str) -> "Figure":
    """The heat map as a matplotlib Figure; title: lines, each wrapped where it is wider than the figure."""
    caption = _caption(title, summarize(result.matrix, result.baseline))
    return matrix_heat_map(result.matrix.numpy(), caption, "accuracy (%)")


def matrix_heat_map(matrix: np.ndarray, caption: str, unit: str) -> "Figure":
    """(T, T) accuracies as a heat map, NaN where not measured; caption: as `matrix_figure`'s title; unit: the bar's."""
    tasks = len(matrix)
    cell = _CELL if tasks <= WIDE else 0.42
    side = max(4 * _CELL, cell * tasks)
    # Large pictures are looked at from further away: text grows with them, and all margins with the text.
    points = min(max(10.0, side), 16.0)
    em = points / 72
    left, right, below = 4.5 * em, 6.5 * em, 4 * em
    width = left + side + right
    lines = wrapped(caption, int(width / (0.56 * em)))
    height = below + side + (1.3 * len(lines) + 1.5) * em
    figure = figure_class()(figsize=(width, height), dpi=110)

    def axes_at(x: float, across: float) -> "Axes":
        return figure.add_axes((x / width, below / height, across / width, side / height))

    axes = axes_at(left, side)
    axes.set_facecolor("0.92")  # of cells that are not measured
    image = axes.imshow(matrix, vmin=0, vmax=100, cmap="viridis")
    axes.set(xticks=range(tasks), yticks=range(tasks))
    axes.set_xlabel("accuracy on task", fontsize=points, labelpad=0.5 * points)
    axes.set_ylabel("after training task", fontsize=points, labelpad=0.5 * points)
    _number_cells(axes, matrix)
    bar = figure.colorbar(image, cax=axes_at(left + side + em, em))
    bar.set_label(unit, fontsize=points)
    for labelled in (axes, bar.ax):
        labelled.tick_params(labelsize=0.8 * points)
    figure.text(0.5, 1 - 0.5 * em / height, "\n".join(lines), ha="center", va="top", fontsize=points, linespacing=1.3)
    return figure


def _number_cells(axes: "Axes", matrix: np.ndarray) -> None:
    """Each measured cell's number, and the line below which the tasks learned so far lie."""
    tasks = len(matrix)
    for i, j in np.argwhere(~np.isnan(matrix)).tolist():
        text = f"{matrix[i, j]:.1f}" if tasks <= WIDE else f"{matrix[i, j]:.0f}"
        colour = "black" if matrix[i, j] > 60 else "white"
        # Right of the diagonal stand tasks not learned yet: fainter, to let the triangle of interest show.
        axes.text(j, i, text, ha="center", va="center", color=colour, fontsize=9, alpha=0.55 if j > i else 1)
    learned = tasks_learned(matrix)
    border = [(k + 0.5, k + half) for k in range(min(learned, tasks - 1)) for half in (-0.5, 0.5)]
    axes.plot([x for x, _ in border], [y for _, y in border], color="white", linewidth=1.5)


def versions() -> dict[str, str]:
    """Versions of Python, PyTorch and this package."""
    return {"python": platform.python_version(), "torch": str(torch.__version__), "hypermask_fast": __version__}


def device_name(device: torch.device | str) -> str:
    """What a device is called: "cuda: NVIDIA ..." or "cpu: x86_64"."""
    device = torch.device(device)
    return f"{device.type}: {torch.cuda.get_device_name(device) if device.type == 'cuda' else platform.machine()}"


def _caption(title: str, summary: Summary) -> str:
    if summary.average_accuracy is None:
        return title
    numbers = f"average accuracy {summary.average_accuracy:.2f} %"
    if summary.forgetting is not None:
        numbers += f", forgetting {summary.forgetting:.2f} points"
    return f"{title}\n{numbers}".strip()


def _nullable(values: Iterable[float]) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values]


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=1, allow_nan=False) + "\n"
