"""hypermask-fast presets"""

import argparse
from typing import Any

from ..text import text_table
from ..training import describe, explain
from ..training.config import load_preset, presets
from .command import command


def add(commands: Any) -> None:
    parser = command(commands, "presets", _run, "what there is to train, or one preset's settings")
    parser.add_argument("name", nargs="?", metavar="PRESET", help="show its settings, as a configuration file")


def _run(arguments: argparse.Namespace) -> int:
    if arguments.name is not None:
        print(explain.commented_toml(load_preset(arguments.name)), end="")
        return 0
    print(text_table([(name, describe.title(config)) for name, config in presets().items()], "<<", gap=2))
    return 0
