"""Archives, unpacked into one folder and nowhere else."""

from __future__ import annotations

import functools
import gzip
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

from ..checks import one_line
from ..errors import InputError

_DAMAGE = (
    tarfile.TarError,
    gzip.BadGzipFile,
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    NotImplementedError,  # a way to compress that is not known
    RuntimeError,  # encrypted
)


class _Member(NamedTuple):
    name: str
    kind: str  # "file", "folder" or "other"
    open: Callable[[], IO[bytes] | None]


def unpack(
    archive: Path,
    target: Path,
    folder: str,
    progress: Callable[[str, int, int], None] = lambda what, done, size: None,
) -> None:
    """Unpacks a .zip or .tar.gz file into `target`, which is made.

    Args:
        archive: its name tells which.
        target: a new folder.
        folder: all that the archive holds is in this one; links and the like are not allowed.
        progress: is told how many members of how many are done.

    Raises:
        InputError: the archive is damaged, or holds anything else. What was unpacked before that is there.
    """
    try:
        with _opened(archive) as members:
            for done, member in enumerate(members, 1):
                _put(member, archive, target, folder)
                progress(archive.name, done, len(members))
    except _DAMAGE as error:
        raise InputError(f"{archive} cannot be unpacked: {one_line(error)}") from error
    if not (target / folder).is_dir():
        raise InputError(f"{archive} has no folder {folder}")


def _put(member: _Member, archive: Path, target: Path, folder: str) -> None:
    path = PurePosixPath(member.name)
    usual = "\\" not in member.name and "\0" not in member.name and ".." not in path.parts
    if not usual or path.is_absolute() or path.parts[:1] != (folder,) or member.kind == "other":
        raise InputError(f"{archive} holds {member.name[:100]!r}, where only files and folders in {folder} belong")
    place = target / path
    if member.kind == "folder":
        place.mkdir(parents=True, exist_ok=True)
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    source = member.open()
    assert source is not None, "a file"
    with source, place.open("xb") as file:
        shutil.copyfileobj(source, file, 1 << 20)


@contextmanager
def _opened(archive: Path) -> Iterator[list[_Member]]:
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as zipped:
            yield [
                _Member(info.filename, "folder" if info.is_dir() else "file", functools.partial(zipped.open, info))
                for info in zipped.infolist()
            ]
    else:
        with tarfile.open(archive, "r:gz") as tar:
            yield [_Member(info.name, _kind(info), functools.partial(tar.extractfile, info)) for info in tar]


def _kind(info: tarfile.TarInfo) -> str:
    return "file" if info.isfile() else "folder" if info.isdir() else "other"
