"""hypermask-fast inspect"""

import argparse
from pathlib import Path
from typing import Any

from .. import analysis
from ..analysis import pictures
from ..errors import InputError
from ..training import describe, inspecting, run
from .command import add_data_dir, add_device, add_own_code, command


def add(commands: Any) -> None:
    parser = command(commands, "inspect", _run, "what the masks of a run's tasks keep and share, and how they moved")
    parser.add_argument("dir", type=Path, metavar="DIR", help="the run's folder, which stays as it is")
    parser.add_argument(
        "--tasks", type=int, nargs="+", metavar="K", help="tasks the run has learned, from 0 (default: all of them)"
    )
    parser.add_argument("--to", type=Path, metavar="DIR", help="write masks.json and pictures to this folder")
    add_data_dir(parser)
    add_own_code(parser)
    add_device(parser)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.to is not None:
        pictures.check_free(arguments.to, "--to")
    device = run.pick_device(arguments.device)
    config, model, scenario = run.load_run(
        arguments.dir, arguments.data_dir, device, arguments.scenario, arguments.network
    )
    count = len(scenario.tasks)
    tasks = range(count) if arguments.tasks is None else arguments.tasks
    for task in tasks:
        if not 0 <= task < count:
            raise InputError(f"task {task} is not among those this run has learned: 0 to {count - 1}")
    records = inspecting.read_records(arguments.dir, range(count))
    inputs = inspecting.recorded_samples(scenario, records)
    found = analysis.inspect(model, tasks, learned=records, inputs=inputs)
    print(found.table())
    if not records:
        print("\nhow masks moved since they were learned: not recorded (train with --set training.inspect=true)")
    if others := sorted(records.keys() - inputs.keys()):
        named = ", ".join(map(str, others))
        print(f"\npredictions of task {named}: not compared, for the test data are others than they were in training")
    if arguments.to is not None:
        about = describe.about(config)
        files = analysis.write(found, arguments.to, f"{about.title}\n{about.details}")
        print("", *pictures.left_out(found), *(f"wrote {file}" for file in files), sep="\n")
    return 0
