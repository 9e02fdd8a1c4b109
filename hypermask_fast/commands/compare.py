"""hypermask-fast compare"""

import argparse
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..training import comparison, study
from .command import command, tell

_JSON = "comparison.json"


def add(commands: Any) -> None:
    parser = command(commands, "compare", _run, "several runs together: means, intervals, paired differences")
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, or one that holds runs, at any depth"
    )
    parser.add_argument("--to", type=Path, metavar="DIR", help=f"write {_JSON} and pictures to this folder")


def _run(arguments: argparse.Namespace) -> int:
    if arguments.to is not None:
        comparison.check_free(arguments.to, _JSON)
    groups = study.grouped(_finished(arguments.runs))
    print(comparison.tables(groups))
    if arguments.to is not None:
        files = comparison.write(arguments.to, _JSON, groups)
        print("", *(f"wrote {file}" for file in files), sep="\n")
    return 0


def _finished(folders: list[Path]) -> list[study.Run]:
    """All runs; of those in a folder that holds several, the ones that are finished: a line names the others."""
    found: dict[Path, bool] = {}
    for folder in folders:
        for run in comparison.find_runs(folder):
            if run in found:
                raise InputError(f"{run} is given twice")
            found[run] = run == folder
    given, left_out = [], []
    for folder, named in found.items():
        if not named:
            try:
                run = study.read_run(folder)
            except InputError as error:
                left_out.append(str(error))
                continue
            if not run.is_finished:
                left_out.append(f"{folder} has learned {run.learned} of its {len(run.matrix)} tasks")
                continue
        given.append(folder)
    if not given:
        raise InputError(f"no run is finished: {'; '.join(left_out)}")
    for line in left_out:
        tell(f"left out: {line}")
    return study.read_runs(given)
