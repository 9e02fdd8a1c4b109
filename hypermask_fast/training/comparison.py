"""Runs compared, as text, JSON and pictures: what `hypermask-fast compare` shows, and `train` after several runs."""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..drawing import png
from ..errors import InputError
from ..files import check_writable, write_atomic, writing
from ..text import text_table
from . import describe, study_pictures
from .config import CONFIG
from .study import LEVEL, METRIC_UNITS, Estimate, Group, differences, known_metrics

FIGURES = {
    "matrices.png": study_pictures.matrices_figure,
    "accuracy.png": study_pictures.accuracy_figure,
    "differences.png": study_pictures.differences_figure,
}


def find_runs(folder: Path | str) -> list[Path]:
    """The folder itself, where it is a run's, else all runs in it and below it, in the order of their names.

    Raises:
        InputError: there is no such folder, or no run in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} {'is no folder' if folder.exists() else 'does not exist'}: give a run's folder")
    found = []
    for place, folders, files in os.walk(folder):
        folders[:] = [] if CONFIG in files else sorted(name for name in folders if not name.startswith("."))
        if CONFIG in files:
            found.append(Path(place))
    if not found:
        raise InputError(
            f"{folder} holds no run (no {CONFIG} in it or below it): give folders that `hypermask-fast train` has made"
        )
    return found


def tables(groups: Sequence[Group]) -> str:
    """Mean, standard deviation and 95 % interval of each metric of each group, and paired differences; as text."""
    rows = [["", "", "seeds", "mean", "spread", "95 % interval"]]
    for group in groups:
        for i, name in enumerate(known_metrics(groups)):
            label = "" if i else group.label or describe.title(group.config)
            count = "" if i else str(len(group.runs))
            rows.append([label, f"{_words(name)} ({METRIC_UNITS[name]})", count, *_cells(group.estimate(name))])
    parts = [text_table(rows, "<<>>>>", gap=3)]
    found = {name: differences(groups, name) for name in known_metrics(groups)}
    compared = [group for group, _ in found["average_accuracy"]]
    if compared:
        rows = [[f"difference from {groups[0].label}", "", "seeds", "mean", "spread", "95 % interval"]]
        for i, group in enumerate(compared):
            for name, pairs in found.items():
                pair = pairs[i][1]
                label, count = (group.label, str(len(pair.seeds))) if name == "average_accuracy" else ("", "")
                rows.append([label, f"{_words(name)} (points)", count, *_cells(pair.estimate, "+.2f")])
        parts.append(text_table(rows, "<<>>>>", gap=3))
    for group in groups[1:]:
        if not set(group.seeds) & set(groups[0].seeds):
            parts.append(f"no seed in common, so no differences: {groups[0].label}; {group.label}")
    parts.append(
        "mean, spread (standard deviation) and 95 % confidence interval of the mean are over seeds (Student's t)"
        + ("; differences are taken seed by seed" if compared else "")
    )
    return "\n\n".join(parts)


def to_dict(groups: Sequence[Group]) -> dict[str, Any]:
    """The same as JSON values.

    Keys: scenario; tasks; level, of the intervals; groups, each with label, title, details, seeds, folders, metrics
    (per metric unit, values by seed, mean, std, low, high), mean_matrix (T, T) percent, average_so_far,
    just_learned and at_the_end (runs, T) percent; differences, each with first, second, metric, seeds, values, mean,
    std, low, high. What is not known is null.
    """
    return {
        "scenario": describe.scenario_name(groups[0].config),
        "tasks": len(groups[0].runs[0].matrix),
        "level": LEVEL,
        "groups": [_group(group, known_metrics(groups)) for group in groups],
        "differences": [
            {
                "first": groups[0].label,
                "second": group.label,
                "metric": name,
                "seeds": list(pair.seeds),
                "values": list(pair.differences),
                **_estimate(pair.estimate),
            }
            for name in known_metrics(groups)
            for group, pair in differences(groups, name)
        ],
    }


def write(folder: Path, name: str, groups: Sequence[Group]) -> list[Path]:
    """Writes the JSON, called `name`, and the pictures to a folder, over what an earlier call has written there.

    Returns:
        The files. There is a picture of differences where there are some.

    Raises:
        InputError: a file can't be written, or matplotlib is missing; the JSON is written then.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    files = [folder / name]
    write_atomic(files[0], json.dumps(to_dict(groups), indent=1, allow_nan=False) + "\n")
    for picture, figure in FIGURES.items():
        if picture == "differences.png" and not differences(groups, "average_accuracy"):
            continue
        write_atomic(folder / picture, png(figure(groups)))
        files.append(folder / picture)
    return files


def check_free(folder: Path, name: str) -> None:
    """Raises InputError where `write` would replace a file, or `folder` can't be written to."""
    check_writable(folder, "--to")
    for taken in (name, *FIGURES):
        if (folder / taken).exists():
            raise InputError(f"{folder / taken} exists: choose another folder (--to)")


def _group(group: Group, metrics: Iterable[str]) -> dict[str, Any]:
    return {
        "label": group.label,
        "title": describe.title(group.config),
        "details": describe.details(group.config, group.seeds),
        "seeds": group.seeds,
        "folders": [str(run.folder) for run in group.runs],
        "metrics": {
            name: {
                "unit": METRIC_UNITS[name],
                "values": group.values(name).tolist(),
                **_estimate(group.estimate(name)),
            }
            for name in metrics
        },
        "mean_matrix": _nullable(group.mean_matrix),
        "average_so_far": _nullable(group.average_so_far),
        "just_learned": _nullable(group.just_learned),
        "at_the_end": _nullable(group.at_the_end),
    }


def _estimate(value: Estimate) -> dict[str, float | None]:
    return {"mean": value.mean, "std": value.std, "low": value.low, "high": value.high}


def _cells(value: Estimate, form: str = ".2f") -> list[str]:
    """Mean, standard deviation and interval; "-" where one value has none."""
    if value.std is None or value.low is None or value.high is None:
        return [f"{value.mean:{form}}", "-", "-"]
    return [f"{value.mean:{form}}", f"{value.std:.2f}", f"{value.low:{form}} to {value.high:{form}}"]


def _words(metric: str) -> str:
    return metric.replace("_", " ")


def _nullable(values: np.ndarray) -> list[Any]:
    return [_nullable(row) if isinstance(row, np.ndarray) else None if np.isnan(row) else float(row) for row in values]
