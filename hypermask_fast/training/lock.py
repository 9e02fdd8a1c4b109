"""A run's folder belongs to one process at a time."""

import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

from ..errors import InputError
from ..files import writing

LOCK = ".lock"
_held: set[int] = set()  # descriptors; a forked process, such as one that reads data, would go on holding their locks
_taken: ContextVar[frozenset[Path]] = ContextVar("folders that this thread has taken", default=frozenset())


@contextmanager
def taken(run_dir: Path) -> Iterator[None]:
    """Keeps every other process, and every other thread of this one, from training in `run_dir` within the block.

    The operating system holds the lock (flock on the file .lock) and gives it up when the process ends, however it
    ends: what a killed process leaves behind locks nobody out, nor do processes that it has forked. Blocks of one
    thread may be nested. Readers of the folder need no lock. Where the file system has no locks, a warning says so.

    Args:
        run_dir: a folder, which exists.

    Raises:
        InputError: another one holds it; the message says which process on which machine. Or .lock can't be written.
    """
    folder = run_dir.resolve()
    if folder in _taken.get():
        yield
        return
    descriptor = _lock(run_dir)
    _held.add(descriptor)
    before = _taken.set(_taken.get() | {folder})
    try:
        yield
    finally:
        _taken.reset(before)
        if descriptor in _held:  # else this is a process that was forked within the block
            with suppress(OSError):  # one that stays locks nobody out
                (run_dir / LOCK).unlink()  # while it is held: see _lock
            _held.remove(descriptor)
            os.close(descriptor)


def _let_go() -> None:
    """In a process that was forked: the lock is its parent's, and is to end with that."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_let_go)


def _lock(run_dir: Path) -> int:
    """The descriptor of run_dir/.lock, which is locked and holds this process's number and machine."""
    path = run_dir / LOCK
    while True:
        with writing(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not _locked(descriptor, run_dir):
                raise InputError(
                    f"{run_dir} is in use by {_holder(descriptor)}: wait until that has ended, or choose another "
                    "folder (--out)"
                )
            if _is_at(descriptor, path):  # else its last holder removed it just before: lock its successor
                with writing(path):
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _locked(descriptor: int, run_dir: Path) -> bool:
    """Whether the file could be locked; True with a warning where nothing can be locked."""
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except ImportError:  # Windows
        reason = "this system has no flock"
    except OSError as error:
        reason = str(error.strerror)
    warnings.warn(f"{run_dir} can't be locked ({reason}): let no other process train in it", stacklevel=2)
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _holder(descriptor: int) -> str:
    """ "process 1234 on this machine's name", as the holder has written it."""
    pid, _, host = os.pread(descriptor, 1000, 0).decode(errors="replace").strip().partition(" ")
    return f"process {pid} on {host}" if pid.isdecimal() and host else "another process"
