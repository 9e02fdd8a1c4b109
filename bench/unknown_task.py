"""Task unknown: how often each method finds task and class, on trained runs: `python -m bench.unknown_task RUN ...`

Every run's checkpoint is evaluated by every method on its test sets; "gradient" also with batches of one sample. F.csv
has a row per run and method, F.json their means over the runs and the command.
"""

import argparse
import csv
import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import torch

from hypermask_fast import inference
from hypermask_fast.data import Scenario, TaskData
from hypermask_fast.files import write_atomic
from hypermask_fast.training import evaluation, run
from hypermask_fast.training.report import versions

COLUMNS = (
    "run",
    "method",
    "layer",
    "batch_size",
    "shuffled",
    "task_percent",
    "class_percent",
    "seconds_per_1000_samples",
)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.unknown_task", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--to", type=Path, required=True, metavar="F", help="F.csv and F.json")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--layer", metavar="NAME", help="mahalanobis on the input of this layer too")
    parser.add_argument("--samples", type=int, metavar="N", help="of each task's test set the first N; default: all")
    parser.add_argument("--one", type=int, default=0, metavar="N", help="N test samples a task in batches of one")
    arguments = parser.parse_args(argv)
    rows = [row for folder in arguments.runs for row in measured(folder, arguments)]
    arguments.to.parent.mkdir(parents=True, exist_ok=True)
    with arguments.to.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    command = shlex.join(["python", "-m", "bench.unknown_task", *(sys.argv[1:] if argv is None else argv)])
    content = {"command": command, "runs": len(arguments.runs), "means": means(rows), "versions": versions()}
    write_atomic(arguments.to.with_suffix(".json"), json.dumps(content, indent=1) + "\n")


def measured(folder: Path, arguments: argparse.Namespace) -> list[dict]:
    config, model, scenario = run.load_run(folder, arguments.data_dir)
    if arguments.samples:
        scenario = _first(scenario, arguments.samples)
    batch = config.training.evaluation_batch
    ways = [(method, None, batch, False) for method in ("known", *inference.METHODS)]
    ways += [("gradient", None, batch, True), ("gradient+entropy", None, batch, True)]
    if arguments.layer:
        ways.append(("mahalanobis", arguments.layer, batch, False))
    rows = []
    for method, layer, size, shuffled in ways:
        evaluation.fit(model, scenario, method, layer)
        found = evaluation.inferred(model, scenario, method, size, shuffled)
        rows.append(row(folder, model, method, size, shuffled, found))
    for method in ("gradient", "gradient+entropy") if arguments.one else ():
        found = evaluation.inferred(model, _first(scenario, arguments.one), method, 1)
        rows.append(row(folder, model, method, 1, False, found))
    return rows


def _first(scenario: Scenario, count: int) -> Scenario:
    """The scenario with the first test samples of each task alone."""

    def shorter(task: TaskData) -> TaskData:
        test = task.test
        return replace(task, test=replace(test, inputs=test.inputs[:count], labels=test.labels[:count]))

    return replace(scenario, tasks=tuple(map(shorter, scenario.tasks)))


def row(folder: Path, model, method: str, size: int, shuffled: bool, found: evaluation.Inferred) -> dict:
    layer = model.fitted[inference.FITTED[method].name].layer if method in inference.FITTED else ""
    settings = model.fitted[inference.FITTED[method].name].settings() if method in inference.FITTED else ""
    values = (found.task.mean().item(), found.label.mean().item(), found.seconds_per_1000)
    made = dict(zip(COLUMNS, (folder.name, method, layer, size, shuffled, *(round(v, 4) for v in values)), strict=True))
    print(*made.values(), settings, flush=True)
    return made


def means(rows: list[dict]) -> list[dict]:
    kinds: dict[tuple, list[dict]] = {}
    for each in rows:
        kinds.setdefault(tuple(each[name] for name in COLUMNS[1:5]), []).append(each)
    found = []
    for kind, members in kinds.items():
        values = torch.tensor([[m[name] for name in COLUMNS[5:7]] for m in members], dtype=torch.float64)
        spread = values.std(0) if len(members) > 1 else torch.zeros(2)
        found.append(
            dict(zip(COLUMNS[1:5], kind, strict=True))
            | {name: round(v, 2) for name, v in zip(COLUMNS[5:7], values.mean(0).tolist(), strict=True)}
            | {f"{name}_std": round(v, 2) for name, v in zip(COLUMNS[5:7], spread.tolist(), strict=True)}
        )
    return found


if __name__ == "__main__":
    main()
