"""hypermask-fast consolidate"""

import argparse
from pathlib import Path
from typing import Any

from ..training import checkpoint
from .command import command


def add(commands: Any) -> None:
    summary = "turn a checkpoint that several processes saved into one file, as a single process saves it"
    parser = command(commands, "consolidate", _run, summary)
    parser.add_argument("dir", type=Path, metavar="DIR", help="the run's folder")


def _run(arguments: argparse.Namespace) -> int:
    done = checkpoint.consolidate(arguments.dir)
    if done.parts is None:
        print(f"{done.file} is the checkpoint of a single process already")
    else:
        print(f"{done.file} has taken the place of {done.parts.name}/")
    return 0
