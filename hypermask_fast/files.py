"""Writing files: whole or not at all, and what can't be written is said in one line."""

import errno
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from .errors import InputError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns a failure to write `path`, such as a full or read-only disk or a folder without permission, to InputError.

    For writers that leave what was there before as it was.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors hides the system's own error in its text
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise InputError(f"cannot write {path}: {reason}; nothing on disk was lost") from error


def check_writable(folder: Path, flag: str = "") -> None:
    """Before the work whose results are to go to a folder, which is there or will be made.

    flag: of the command line that names the folder, for the message.

    Raises:
        InputError: it can't be made, or nothing can be written to it.
    """
    there = next(path for path in (folder, *folder.parents) if path.exists())
    hint = f" ({flag})" if flag else ""
    if there == folder and not there.is_dir():
        raise InputError(f"{folder} is a file: give a folder{hint}")
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        reason = f"{there} can't be written to" if there.is_dir() else os.strerror(errno.ENOTDIR)
        raise InputError(f"cannot write {folder}: {reason}; give another folder{hint}")


def check_tensors(state: Mapping[str, Any]) -> None:
    """Raises InputError where a state_dict has an entry that is no tensor, such as a module's get_extra_state may
    return."""
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise InputError(
                f"files hold tensors alone, and {name} in the network's state_dict is of type {type(value).__name__}: "
                "make it a tensor, or leave it out (get_extra_state of that module returns it)"
            )


def missing_folders(folder: Path) -> list[Path]:
    """What making the folder makes: it and those above it that are not there, from the innermost on."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def remove_empty(folders: Iterable[Path]) -> None:
    """Removes those of the folders, in order, that are there and empty."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replaces `path` by a file of that content; a reader, or a kill, at any moment sees the old one or the new one.

    Raises:
        InputError: the path names no file, or the file can't be written.
    """
    if not path.name:  # as of Path("")
        raise InputError(f"{str(path)!r} names no file: give the path of the file to write")
    data = content.encode() if isinstance(content, str) else content
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with writing(path):
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def remove_partial(folder: Path, names: Iterable[str]) -> None:
    """Removes what `write_atomic`, killed, has left of files of these names; nobody else may be writing them.

    Raises:
        InputError: one can't be removed.
    """
    for name in names:
        for partial in folder.glob(f".{name}.*.partial"):
            with writing(partial):
                partial.unlink(missing_ok=True)
