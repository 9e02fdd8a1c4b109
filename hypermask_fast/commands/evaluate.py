"""hypermask-fast evaluate"""

import argparse
from pathlib import Path
from typing import Any

from ..text import text_table
from ..training import evaluation, run
from .command import add_data_dir, add_device, command


def add(commands: Any) -> None:
    parser = command(commands, "evaluate", _run, "accuracy of a run's model on the tasks it has learned")
    parser.add_argument("dir", type=Path, metavar="DIR", help="the run's folder")
    parser.add_argument(
        "--task-id",
        choices=("known", "entropy"),
        default="known",
        help="known: each sample's task is given (default); entropy: it is inferred, by the lowest softmax entropy",
    )
    add_data_dir(parser)
    add_device(parser)


def _run(arguments: argparse.Namespace) -> int:
    device = run.pick_device(arguments.device)
    config, model, scenario = run.load_run(arguments.dir, arguments.data_dir, device)
    batch = config.training.evaluation_batch
    if arguments.task_id == "known":
        columns = {
            "accuracy %": [evaluation.accuracy(model, task.test, t, batch) for t, task in enumerate(scenario.tasks)]
        }
    else:
        measured = evaluation.entropy_accuracy(model, scenario, batch)
        columns = {"task found %": measured.task.tolist(), "class found %": measured.label.tolist()}
    print(_table([scenario.label(t) for t in range(len(scenario.tasks))], columns))
    return 0


def _table(names: list[str], columns: dict[str, list[float]]) -> str:
    """Names and percentages side by side, with the columns' means."""
    rows = [*zip(names, *columns.values(), strict=True)]
    rows.append(("mean", *(sum(values) / len(values) for values in columns.values())))
    texts = [(name, *(f"{value:.2f}" for value in values)) for name, *values in rows]
    return text_table([("", *columns), *texts], "<" + ">" * len(columns), gap=3)
