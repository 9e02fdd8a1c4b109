"""hypermask-fast evaluate"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import inference
from ..data import Scenario
from ..errors import InputError
from ..text import text_table
from ..training import confusion, evaluation, run
from .command import add_data_dir, add_device, add_own_code, command, tell

_METHODS = """\
known: each sample's task is given (default). The others find it: by the outputs of every task's network (entropy,
max_softmax, energy), by distances in feature space, for which statistics of the training data are collected first
(fecam, fecam_task, mahalanobis), or by a gradient (gradient, gradient+entropy); docs/inference.md compares them"""
_MOST_SHOWN = 12  # tasks of which the table says what they were taken for


def add(commands: Any) -> None:
    parser = command(commands, "evaluate", _run, "accuracy of a run's model on the tasks it has learned")
    parser.add_argument("dir", type=Path, metavar="DIR", help="the run's folder")
    parser.add_argument("--task-id", choices=("known", *inference.METHODS), default="known", help=_METHODS)
    parser.add_argument(
        "--after",
        type=int,
        metavar="K",
        help="only the first K tasks, to test and to choose from; the weights are those of the newest checkpoint, "
        "which later tasks have changed",
    )
    parser.add_argument(
        "--shuffled",
        action="store_true",
        help="mix the tasks' samples in each batch; otherwise every batch is of one task",
    )
    parser.add_argument(
        "--batch-size", type=int, metavar="B", help="samples per batch; default: as in the run's settings"
    )
    parser.add_argument(
        "--layer", metavar="NAME", help="whose input the features are, for distances; default: the output layer"
    )
    parser.add_argument(
        "--to",
        type=Path,
        metavar="FOLDER",
        help="write the result there too, as JSON, CSV and a picture, which must not exist yet; "
        "the run's folder is left as it is",
    )
    add_data_dir(parser)
    add_own_code(parser)
    add_device(parser)


def _run(arguments: argparse.Namespace) -> int:
    method = arguments.task_id
    if method == "known" and arguments.shuffled:
        raise InputError("--shuffled is for unknown tasks: with --task-id known there is nothing to give away")
    if arguments.batch_size is not None and arguments.batch_size < 1:
        raise InputError(f"--batch-size must be 1 or more, not {arguments.batch_size}")
    targets = None if arguments.to is None else confusion.paths(arguments.to, _name(arguments))
    device = run.pick_device(arguments.device)
    config, model, scenario = run.load_run(
        arguments.dir, arguments.data_dir, device, arguments.scenario, arguments.network
    )
    scenario = _first(scenario, arguments.after)
    batch = arguments.batch_size or config.training.evaluation_batch
    evaluation.fit(model, scenario, method, arguments.layer)
    result = evaluation.inferred(model, scenario, method, batch, arguments.shuffled)
    print(_table(result, scenario))
    if note := evaluation.gives_away(model, method, arguments.shuffled):
        tell(f"{note}; --shuffled mixes tasks")
    tell(f"{result.seconds_per_1000:.3g} seconds per 1,000 samples")
    if targets is not None:
        about = {
            "title": config.title or str(arguments.dir.name),
            "method": method,
            "after": arguments.after,
            "shuffled": arguments.shuffled,
            "batch_size": batch,
            **_fitted(model, method),
        }
        confusion.write(targets, result, scenario, about, device)
        tell(f"written: {', '.join(map(str, targets))}")
    return 0


def _name(arguments: argparse.Namespace) -> str:
    after = "" if arguments.after is None else f"-after-{arguments.after}"
    return f"evaluation-{arguments.task_id}{after}{'-shuffled' if arguments.shuffled else ''}"


def _first(scenario: Scenario, after: int | None) -> Scenario:
    """The scenario with its first tasks only."""
    if after is None:
        return scenario
    if not 1 <= after <= len(scenario.tasks):
        raise InputError(f"--after {after}: the run has learned {len(scenario.tasks)} tasks, so 1 to that many")
    return replace(scenario, tasks=scenario.tasks[:after])


def _fitted(model: Any, method: str) -> dict[str, Any]:
    """What distances are of."""
    if method not in inference.FITTED:
        return {}
    fitted = model.fitted[inference.FITTED[method].name]
    return {"layer": fitted.layer, "settings": fitted.settings()}


def _table(result: evaluation.Inferred, scenario: Scenario) -> str:
    """Percentages of every task with their means, and for which tasks its samples were taken, in percent."""
    tasks = range(len(scenario.tasks))
    known = result.method == "known"
    columns = {"accuracy %": result.label} if known else {"task found %": result.task, "class found %": result.label}
    rows: list[tuple[str, ...]] = [("", *columns)]
    rows += [(scenario.label(t), *(f"{values[t]:.2f}" for values in columns.values())) for t in tasks]
    rows.append(("mean", *(f"{values.mean():.2f}" for values in columns.values())))
    if not known and len(tasks) <= _MOST_SHOWN:
        shares = 100.0 * result.confusion / result.samples[:, None]
        rows[0] += tuple(f"{'taken for ' if t == 0 else ''}{t}" for t in tasks)
        for t in tasks:
            rows[t + 1] += tuple(f"{share:.0f}" for share in shares[t].tolist())
        rows[-1] += ("",) * len(tasks)
    return text_table(rows, "<" + ">" * (len(rows[0]) - 1), gap=3)
