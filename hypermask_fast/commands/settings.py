"""hypermask-fast settings"""

import argparse
from typing import Any

from ..training import explain
from .command import command


def add(commands: Any) -> None:
    parser = command(commands, "settings", _run, "every setting: its default, what it may be, and its meaning")
    parser.add_argument(
        "key",
        nargs="?",
        default="",
        metavar="KEY",
        help="one setting, such as training.lr, or one table, such as method",
    )


def _run(arguments: argparse.Namespace) -> int:
    print(explain.listing(arguments.key))
    return 0
