"""Inspection after every task of a run: what `training.inspect` writes, and what is kept of each task for it.

In the folder: inspect.json, everything but each tensor's own (T, T) matrices, an entry per task learned; inspect.csv,
the whole network's numbers, a row per task learned and task; learned/task-000.safetensors, ...: each task as it was
learned, see `analysis.Learned`.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..analysis import Inspection, Learned, fingerprint, inspect, record
from ..data import Scenario
from ..errors import InputError
from ..files import remove_partial, write_atomic, writing
from ..model import HyperMask
from ..processes import Shards

HISTORY, TABLE, RECORDS = "inspect.json", "inspect.csv", "learned"
SAMPLES = 256  # test samples of a task, the first ones, whose outputs are compared
_COLUMNS = ("after_task", "task", "kept", "mean_kept_value", "used", "flipped", "mask_change", "logit_change")
_COLUMNS += ("predictions_changed", "probability_change")


class Inspector:
    """Inspects a model after each task of a run.

    Args:
        folder: where the files go; None: nothing is written, and what is kept of each task stays in memory.
        learned: how many tasks the run has learned already: its entries and records of these are gone on from.

    Raises:
        InputError: what an earlier part of the run has written is damaged.
    """

    def __init__(self, folder: Path | None, learned: int = 0) -> None:
        self.folder = folder
        if folder is not None:
            remove_partial(folder, (HISTORY, TABLE))
            remove_partial(folder / RECORDS, ("task-*",))
        self.records = {} if folder is None else read_records(folder, range(learned))
        self.history = [] if folder is None else [e for e in _read_history(folder) if e["after_task"] < learned]

    def after_task(self, model: HyperMask, scenario: Scenario, task: int) -> dict[str, float]:
        """Inspects tasks 0 .. task, of which the last one has just been learned; returns rows for the log.

        Raises:
            InputError: the files can't be written.
        """
        self.records[task] = record(model, task, first_samples(scenario, task))
        inputs = recorded_samples(scenario, self.records)
        tasks = [number for number in range(task + 1) if number in model.tasks]
        found = inspect(model, tasks, learned=self.records, inputs=inputs)
        self.history = [*self.history, {"after_task": task, **found.to_dict(pairs=False)}]
        if self.folder is not None:
            self._write(self.folder, task)
        return _logged(found)

    def _write(self, folder: Path, task: int) -> None:
        with writing(folder / RECORDS):
            (folder / RECORDS).mkdir(parents=True, exist_ok=True)
        self.records[task].save(_record_path(folder, task))
        write_atomic(folder / HISTORY, json.dumps(self.history, allow_nan=False) + "\n")
        lines = [_COLUMNS, *(row for entry in self.history for row in _rows(entry))]
        write_atomic(folder / TABLE, "".join(",".join(line) + "\n" for line in lines))


def first_samples(scenario: Scenario, task: int) -> Tensor:
    """The first test samples of a task, as its network gets them. Data that are random leave the generator alone."""
    split = scenario.tasks[task].test
    with torch.random.fork_rng(devices=[]):
        return split.batch(torch.arange(min(SAMPLES, len(split))))[0]


def recorded_samples(scenario: Scenario, records: dict[int, Learned]) -> dict[int, Tensor]:
    """Task -> the samples that its record was made with; those that are others now are left out."""
    found = {task: first_samples(scenario, task) for task in records}
    return {task: x for task, x in found.items() if fingerprint(x) == records[task].inputs}


def read_records(folder: Path, tasks: range) -> dict[int, Learned]:
    """What a run's folder has kept of these tasks; nothing of a task that was learned without `training.inspect`.

    Raises:
        InputError: a record is damaged.
    """
    paths = {task: _record_path(folder, task) for task in tasks}
    return {task: Learned.load(path) for task, path in paths.items() if path.exists()}


def check_whole(model: HyperMask) -> None:
    """Raises InputError where the hypernetwork is sharded: all ranks make its masks, and one inspects."""
    if isinstance(model.hypernet.processes, Shards):
        raise InputError(
            "training.inspect = true needs all of the hypernetwork in each process: set training.shard=none"
        )


def check_no_inspection(folder: Path | None) -> None:
    """Raises InputError where an inspection would replace another run's."""
    for name in (HISTORY, TABLE, RECORDS):
        if folder is not None and (folder / name).exists():
            raise InputError(f"{folder} holds the inspection of a run ({name}): choose another folder")


def _record_path(folder: Path, task: int) -> Path:
    return folder / RECORDS / f"task-{task:03d}.safetensors"


def _read_history(folder: Path) -> list[dict[str, Any]]:
    path = folder / HISTORY
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(entries, list) and all(isinstance(entry["after_task"], int) for entry in entries):
            return entries
        reason = "it is no list of inspections"
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or str(error)
    raise InputError(f"{path} is damaged ({reason}): restore it, or remove it to go on without what it held")


def _rows(entry: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Of one inspection, a row per task; empty where it was not recorded."""
    drifts, whole = {each["task"]: each for each in entry["drift"]}, entry["whole"]
    for i, task in enumerate(entry["tasks"]):
        drift = drifts.get(task, {})
        moved = {**drift.get("whole", {}), **{name: drift.get(name) for name in _COLUMNS[-2:]}}
        values = [entry["after_task"], task, *(whole[name][i] for name in _COLUMNS[2:5])]
        values += [moved.get(name) for name in _COLUMNS[5:]]
        yield tuple("" if value is None else repr(value) for value in values)


def _logged(found: Inspection) -> dict[str, float]:
    """For who draws curves: percentages of the whole network after a task, and means over the tasks before it."""
    values = {"inspect/used": found.whole.used[-1], "inspect/free": found.whole.free}
    values["inspect/mean_kept_value"] = found.whole.mean_kept_value[-1]
    earlier = [each for each in found.drift if each.task != found.tasks[-1]]
    if earlier:
        values["inspect/flipped"] = sum(each.whole.flipped for each in earlier) / len(earlier)
        changes = [each.whole.mask_change for each in earlier if each.whole.mask_change is not None]
        if changes:
            values["inspect/mask_change"] = sum(changes) / len(changes)
        predictions = [each.predictions_changed for each in earlier if each.predictions_changed is not None]
        if predictions:
            values["inspect/predictions_changed"] = sum(predictions) / len(predictions)
    return values
