"""What the command line does before PyTorch is there: it chooses how threads wait and how many there are. And as the
import takes seconds, Control-C ends it without a traceback, and a run that goes on says so.

Imported before anything else of the package. Where the package is used as a library nothing changes.
"""

import os
import re
import signal
import sys
from contextlib import suppress
from pathlib import Path

from . import threads

# Environment variables that the command line has set; processes that it starts inherit them.
CHOSEN: dict[str, str] = {}
_MODULE = re.compile(r"\0-m\0hypermask_fast(\.cli)?\0")


def _is_command() -> bool:
    """Whether this process is `hypermask-fast`, or `python -m` with it, whose argv[0] is still "-m" at this time."""
    name = sys.argv[0] if sys.argv else ""
    if name == "-m":
        return _MODULE.search("\0".join([*sys.orig_argv, ""])) is not None
    return Path(name).stem == "hypermask-fast"


def ready() -> None:
    """From here on Control-C raises KeyboardInterrupt, as Python has it."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _tell_resumed() -> None:
    """On a terminal a run that goes on says so at once, before the seconds that importing PyTorch takes."""
    with suppress(OSError, AttributeError, ValueError):  # closed
        if sys.stderr.isatty() and os.environ.get("RANK", "0") == "0":
            print("hypermask-fast: resuming; PyTorch is being loaded first", file=sys.stderr, flush=True)


def _quiet_store() -> None:
    """Of several processes, one that ends is told in one line: not by a page of C++ frames from each that talks to it.

    PyTorch reads the variable when it is imported.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def _choose_threads() -> None:
    """PyTorch's OpenMP reads the variables once, as it is loaded."""
    if "torch" not in sys.modules:
        CHOSEN.update(threads.variables(os.environ, threads.processors()))
        os.environ.update(CHOSEN)


if _is_command():
    _quiet_store()
    _choose_threads()
if _is_command() and "--resume" in sys.argv[1:] + sys.orig_argv:
    _tell_resumed()
if _is_command() and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
