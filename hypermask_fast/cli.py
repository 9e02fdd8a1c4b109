"""The command line `hypermask-fast`, whose commands are in `commands`."""

import argparse
import errno
import io
import os
import signal
import sys
import warnings
from typing import Any, NoReturn

from . import __version__, own_code, startup
from .commands import COMMANDS, env
from .commands.command import EXIT_INPUT, EXIT_LOST, EXIT_UNREAD, PROGRAM, interrupted, tell
from .commands.launched import rank_alone
from .errors import InputError, ProcessLost
from .extras import needed_for
from .training.memory import tune_allocator


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns its exit code.

    0: done. 2: what was given is wrong, said in one line on standard error. 3: another process of those that train
    together has ended or does not answer. 130: interrupted (by another signal than Control-C: 128 and its number). 141:
    nobody reads the output any more. What code of the user's raises is said in one line too. Any other failure is a
    bug and keeps its traceback.

    Of several processes, as torchrun starts them, one speaks; all of them train, and one does any other command.
    """
    startup.ready()
    _open_streams()
    arguments = _parser().parse_args(argv)
    if rank_alone() > 0 and not arguments.on_all_ranks:
        return 0
    tune_allocator()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            if arguments.run is not env.report:
                _check_packages()
            code = arguments.run(arguments)
            sys.stdout.flush()  # here, where a failure is told
            return code
    except InputError as error:
        return _refuse(str(error))
    except ProcessLost as error:
        tell(f"error: {error}")
        return EXIT_LOST
    except Exception as error:
        if (told := own_code.blamed(error)) is not None:
            return _refuse(told)
        if not isinstance(error, OSError):
            raise
        if error.filename is not None:
            return _refuse(f"{error.filename}: {error.strerror}")  # a folder without permission, ...
        if error.errno not in (errno.EPIPE, errno.ENOSPC, errno.EIO, errno.EBADF):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python fails once more as it ends
        return EXIT_UNREAD if error.errno == errno.EPIPE else _refuse(f"standard output: {error.strerror}")
    except KeyboardInterrupt:
        return interrupted(signal.SIGINT)


def _open_streams() -> None:
    """Output that was closed goes nowhere; characters that the terminal's encoding lacks are shown as escapes."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (for the process's life)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _check_packages() -> None:
    """Refuses a command that could not show what it has done, before it does anything."""
    with needed_for("the command line"):
        import rich  # noqa: F401


def _refuse(message: str) -> int:
    tell("error: " + message.replace("\n", "\\n"))  # of a path
    return EXIT_INPUT


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    if rank_alone() == 0:
        tell(f"warning: {message}")


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        if rank_alone() > 0:
            self.exit(EXIT_INPUT)
        self.exit(EXIT_INPUT, f"{PROGRAM}: error: {message}; `{self.prog} --help` says more\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog=PROGRAM, description="Continual learning with hypernetwork-made masks.")
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
