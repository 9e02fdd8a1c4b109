"""Single files of tensors, safetensors: written so that they are on the disk, read only as they were written."""

import hashlib
import os
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import InputError

MANIFEST = "checkpoint.json"
REMEDY = ": restore it, or start a new run in another folder"


class Written(NamedTuple):
    """What a file must be to be read. size, bytes: None where that is not recorded."""

    sha256: str
    size: int | None = None


def write(tensors: dict[str, Tensor], path: Path) -> Written:
    """Writes ordinary tensors to a new file, which `sync` or `settle` brings to the disk."""
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors lets the owner alone read its files
    with path.open("rb") as file:
        return Written(digest(file), os.fstat(file.fileno()).st_size)


@contextmanager
def opened(run_dir: Path, name: str, written: Written) -> Iterator[Any]:
    """A file that the manifest names, open for safetensors on the CPU; exactly the one that was written.

    Raises:
        InputError: it is missing, cut off, altered, replaced within the block, unreadable or of another kind.
    """
    path = run_dir / name
    try:
        with path.open("rb") as file:
            check_size(run_dir, name, written)
            if digest(file) != written.sha256:
                raise InputError(f"{path} is cut off or was altered (its SHA-256 is not the one in {MANIFEST}){REMEDY}")
            with safe_open(path, framework="pt") as tensors:
                yield tensors
            if not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                raise InputError(f"{path} was replaced while it was read{REMEDY}")
    except FileNotFoundError as error:
        raise _missing(run_dir, name) from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except (SafetensorError, KeyError) as error:  # KeyError: a dtype that PyTorch lacks
        reason = textwrap.shorten(str(error), 120)
        raise InputError(f"{path} is not a safetensors file of ours: {reason}{REMEDY}") from error
    except RuntimeError as error:  # PyTorch's, which maps the file; also where another process has just removed it
        if path.exists():
            raise
        raise _missing(run_dir, name) from error


def check_size(run_dir: Path, name: str, written: Written) -> None:
    """Raises InputError where the file is missing or has another size than it was written with."""
    path = run_dir / name
    try:
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise _missing(run_dir, name) from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    if written.size not in (None, size):
        raise InputError(f"{path} is cut off or was altered ({size} bytes, not {written.size}){REMEDY}")


def _missing(run_dir: Path, name: str) -> InputError:
    return InputError(f"{run_dir / MANIFEST} names {name}, which is missing{REMEDY}")


def settle(partial: Path, target: Path) -> None:
    """Puts a written file, or a folder of such, in its place, on the disk and not only in the cache."""
    sync(partial)
    os.replace(partial, target)
    sync(target.parent)


def sync(path: Path) -> None:
    """Brings a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def digest(file: BinaryIO) -> str:
    """SHA-256 of what is left to read."""
    found = hashlib.sha256()
    while block := file.read(1 << 22):
        found.update(block)
    return found.hexdigest()
