"""Control-C while the command line is still being imported, which takes seconds, ends it without a traceback.

Imported before anything else of the package. Where the package is used as a library nothing changes.
"""

import re
import signal
import sys
from pathlib import Path

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


if _is_command() and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
