"""What the commands share: their arguments, what they print, and how they end."""

import argparse
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

PROGRAM = "hypermask-fast"
EXIT_INPUT, EXIT_LOST, EXIT_UNREAD = 2, 3, 141


def command(commands: Any, name: str, function: Any, summary: str) -> argparse.ArgumentParser:
    """A new command, which `function` does; what it takes is added to what is returned."""
    parser = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
    parser.set_defaults(run=function, on_all_ranks=False)
    return parser


def add_data_dir(command: argparse.ArgumentParser) -> None:
    command.add_argument("--data-dir", type=Path, metavar="D", help="folder of the data set's files")


def add_own_code(command: argparse.ArgumentParser) -> None:
    """Of commands that read a run: its own code runs only where it is named again."""
    for what in ("scenario", "network"):
        command.add_argument(
            f"--{what}",
            metavar="FILE:FUNCTION",
            help=f"of a run that was trained with --{what}: name the same function again, which allows its code to run",
        )


def add_device(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")


def interrupted(number: int, detail: str = "", tells: bool = True) -> int:
    """Says that a signal has ended the command, unless another process does; returns its exit code."""
    if tells and sys.stderr.isatty():
        print(file=sys.stderr)  # below the terminal's ^C
    if tells:
        tell(f"interrupted{detail}")
    return 128 + number


def tell(message: str, name: str = PROGRAM) -> None:
    """One line on standard error, after a name, where that can still be written."""
    with suppress(OSError):
        sys.stderr.write(f"{name}: {message}\n")  # at once: several threads may tell something
        sys.stderr.flush()
