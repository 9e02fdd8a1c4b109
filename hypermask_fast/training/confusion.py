"""What an evaluation with unknown tasks leaves in a folder: numbers, a table, a picture."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..data import Scenario
from ..drawing import figure_class, png
from ..errors import InputError
from ..files import check_writable, write_atomic, writing
from .evaluation import Inferred
from .report import device_name, versions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NUMBERED = 20  # tasks up to which a picture's cells have their numbers


def paths(folder: Path, name: str) -> tuple[Path, Path, Path]:
    """NAME.json, NAME.csv and NAME.png in the folder.

    Raises:
        InputError: one is there already, the folder can't be written to, or matplotlib is missing.
    """
    figure_class()
    check_writable(folder, "--to")
    found = folder / f"{name}.json", folder / f"{name}.csv", folder / f"{name}.png"
    for path in found:
        if path.exists():
            raise InputError(f"{path} is there already: choose another folder (--to), or remove it")
    return found


def write(
    targets: tuple[Path, Path, Path], result: Inferred, scenario: Scenario, about: dict[str, Any], device: torch.device
) -> None:
    """Writes all three.

    - JSON: what `about` has; of each task its name, samples, task_percent and class_percent; mean of both over tasks;
      confusion (T, T), samples of task i taken for task j; seconds_per_1000_samples, device, threads, versions.
    - CSV: the same of each task in a row, and the samples taken for each task.
    - The confusion as a picture, in percent of each task's samples.
    """
    as_json, as_csv, picture = targets
    with writing(as_json.parent):
        as_json.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "name": scenario.label(t),
            "samples": int(result.samples[t]),
            "task_percent": None if result.method == "known" else _nullable(result.task[t].item()),
            "class_percent": _nullable(result.label[t].item()),
        }
        for t in range(len(scenario.tasks))
    ]
    content = {
        **about,
        "tasks": rows,
        "mean": {kind: _mean([row[kind] for row in rows]) for kind in ("task_percent", "class_percent")},
        "confusion": result.confusion.tolist(),
        "seconds_per_1000_samples": result.seconds_per_1000,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    write_atomic(as_json, json.dumps(content, indent=1, allow_nan=False) + "\n")
    header = ["task", "samples", "task_percent", "class_percent", *(f"taken_for_{j}" for j in range(len(rows)))]
    lines = [header]
    for t, (row, taken) in enumerate(zip(rows, result.confusion.tolist(), strict=True)):
        percents = ("" if row[kind] is None else repr(row[kind]) for kind in ("task_percent", "class_percent"))
        lines.append([str(t), str(row["samples"]), *percents, *map(str, taken)])
    write_atomic(as_csv, "".join(",".join(line) + "\n" for line in lines))
    write_atomic(picture, png(confusion_figure(result, about)))


def confusion_figure(result: Inferred, about: dict[str, Any]) -> "Figure":
    """Rows: the samples' own task; columns: the task that they were taken for; percent of the row's samples."""
    percent = 100.0 * result.confusion.numpy() / np.maximum(result.samples.numpy(), 1)[:, None]
    tasks = len(percent)
    side = max(3.5, min(0.55 * tasks, 14.0))
    figure = figure_class()(figsize=(side + 2.2, side + 1.6), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(percent, vmin=0, vmax=100, cmap="viridis")
    if tasks <= _NUMBERED:
        axes.set(xticks=range(tasks), yticks=range(tasks))
        for i, j in np.ndindex(tasks, tasks):
            colour = "black" if percent[i, j] > 60 else "white"
            axes.text(j, i, f"{percent[i, j]:.0f}", ha="center", va="center", color=colour, fontsize=9)
    axes.set_xlabel("taken for task")
    axes.set_ylabel("samples of task")
    figure.colorbar(image, ax=axes, label="% of the task's samples", shrink=0.8)
    task, label = result.task.nanmean().item(), result.label.nanmean().item()
    title = str(about.get("title", "")).replace("$", r"\$")
    axes.set_title(f"{title}\n{result.method}: task found {task:.1f} %, class found {label:.1f} %".strip(), fontsize=10)
    return figure


def _nullable(value: float) -> float | None:
    return None if math.isnan(value) else value


def _mean(values: list[Any]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
