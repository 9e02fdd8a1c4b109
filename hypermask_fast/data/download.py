"""Downloads of the data sets: checksums as published, and nothing is in its place before it is whole."""

from __future__ import annotations

import hashlib
import http.client
import os
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ..checks import one_line
from ..errors import InputError
from ..files import missing_folders, remove_empty
from .sources import MissingFiles, read_cifar10, read_cifar100, read_mnist, read_tiny_imagenet
from .unpack import unpack

_TIMEOUT = 60.0  # seconds without a byte
_BLOCK = 1 << 20
_AGAIN = "the same command goes on from there"


@dataclass(frozen=True)
class RemoteFile:
    """url: where it is published; size: in bytes; md5: of it, in hexadecimal."""

    url: str
    size: int
    md5: str

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


@dataclass(frozen=True)
class Download:
    """A data set that can be downloaded.

    Attributes:
        folder: what it is below the folder that is asked for.
        archive: whether the one file is an archive with that folder in it. Otherwise the files are put into it.
        files: as they are published.
        read: raises InputError where a folder does not hold it; `MissingFiles` where there is nothing of it.
    """

    folder: str
    archive: bool
    files: tuple[RemoteFile, ...]
    read: Callable[[Path], object]


def _mnist(name: str, size: int, md5: str) -> RemoteFile:
    return RemoteFile(f"https://ossci-datasets.s3.amazonaws.com/mnist/{name}-ubyte.gz", size, md5)


# Addresses and checksums of MNIST and CIFAR are those of torchvision.
DOWNLOADS: dict[str, Download] = {
    "mnist": Download(
        "mnist",
        False,
        (
            _mnist("train-images-idx3", 9_912_422, "f68b3c2dcbeaaa9fbdd348bbdeb94873"),
            _mnist("train-labels-idx1", 28_881, "d53e105ee54ea40749a09fcbcd1e9432"),
            _mnist("t10k-images-idx3", 1_648_877, "9fb629c4189551a2d022fa330f9573f3"),
            _mnist("t10k-labels-idx1", 4_542, "ec29112dd5afa0611ce80d1b7f02629c"),
        ),
        read_mnist,
    ),
    "cifar10": Download(
        "cifar-10-batches-py",
        True,
        (
            RemoteFile(
                "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
                170_498_071,
                "c58f30108f718f92721af3b95e74349a",
            ),
        ),
        read_cifar10,
    ),
    "cifar100": Download(
        "cifar-100-python",
        True,
        (
            RemoteFile(
                "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
                169_001_437,
                "eb9058c3a382ffc7106e4002c42a8d85",
            ),
        ),
        read_cifar100,
    ),
    "tiny-imagenet": Download(
        "tiny-imagenet-200",
        True,
        (
            RemoteFile(
                "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
                248_100_043,
                "90528d7ca1a48142e341f4ef8d21d0de",
            ),
        ),
        lambda folder: read_tiny_imagenet(folder, range(1)),
    ),
}


def download(
    name: str,
    folder: str | Path,
    mirror: str | None = None,
    say: Callable[[str], None] = lambda text: None,
    progress: Callable[[str, int, int], None] = lambda what, done, size: None,
) -> bool:
    """Puts a data set into `folder`, where `--data-dir` finds it; False where it is there already.

    Until all of it is there it lies in a hidden folder of its own. One that was stopped goes on where it was.

    Args:
        name: a key of `DOWNLOADS`.
        folder: made where it is not there.
        mirror: the address of a folder with files of the same names; None: where they are published.
        say: is told of each step, in a line.
        progress: is told how many bytes, or files of an archive, of how many are done.

    Raises:
        InputError: an unknown name; something damaged, or anything else, is in the place already; another process is
            downloading it there; an address that can't be reached; a wrong checksum; a folder that can't be written.
    """
    if name not in DOWNLOADS:
        raise InputError(f"no data set {name!r} to download: there are {', '.join(DOWNLOADS)}")
    if mirror is not None and not mirror.startswith(("http://", "https://")):
        raise InputError(f"a mirror is an address that begins with http:// or https://, not {mirror!r}")
    wanted, folder = DOWNLOADS[name], Path(folder)
    if _is_there(wanted, folder):
        return False
    target, work = folder / wanted.folder, folder / f".{name}-download"
    with _writing(folder), _alone(work):
        if target.exists():
            if _is_there(wanted, folder):  # since another process has put it there
                return False
            raise InputError(f"{target} is there and is not {name}: remove it, or choose another folder")
        files = [_fetched(file, mirror, work, say, progress) for file in wanted.files]
        whole = work / "whole"
        if whole.exists():
            shutil.rmtree(whole)  # of one that was stopped
        if wanted.archive:
            say(f"unpacking {files[0].name}")
            unpack(files[0], whole, wanted.folder, progress)
            os.replace(whole / wanted.folder, target)
        else:
            whole.mkdir()
            for path in files:
                os.replace(path, whole / path.name)
            os.replace(whole, target)
        shutil.rmtree(work)
    say(f"{name} is in {target}")
    return True


def _is_there(wanted: Download, folder: Path) -> bool:
    try:
        wanted.read(folder)
    except MissingFiles:
        return False
    except InputError as error:
        raise InputError(f"{error}; what is there is not replaced: remove it, or choose another folder") from error
    return True


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turns a failure to write into an InputError that names the file; a folder made in vain does not stay."""
    made = missing_folders(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        where = error.filename2 or error.filename or folder
        raise InputError(f"cannot write {where}: {error.strerror or error}; {_AGAIN}") from error
    finally:
        remove_empty(made)


@contextmanager
def _alone(work: Path) -> Iterator[None]:
    """Makes the folder, and keeps other processes out of it for as long as the block, or this process, lasts."""
    work.mkdir(exist_ok=True)
    descriptor = os.open(work, os.O_RDONLY)
    try:
        with suppress(ImportError):  # Windows has no flock
            import fcntl

            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError(f"another process is downloading into {work}: wait until that has ended") from error
        try:
            yield
        finally:
            with suppress(OSError):  # where there is something to go on from
                work.rmdir()
    finally:
        os.close(descriptor)


def _fetched(
    file: RemoteFile,
    mirror: str | None,
    work: Path,
    say: Callable[[str], None],
    progress: Callable[[str, int, int], None],
) -> Path:
    """The file in `work`, whole and with the right checksum."""
    path, url = work / file.name, file.url if mirror is None else f"{mirror.rstrip('/')}/{file.name}"
    if path.exists() and _md5(path) == file.md5:
        return path
    partial = work / f"{file.name}.part"
    begun = partial.stat().st_size if partial.exists() else 0
    say(f"downloading {url}" + (f" from byte {begun} on" if begun else ""))
    _receive(url, partial, file, progress)
    found = _md5(partial)
    if found != file.md5 and begun:
        say(f"what had been downloaded of {file.name} does not fit: downloading {url} from the beginning")
        partial.unlink()
        _receive(url, partial, file, progress)
        found = _md5(partial)
    if found != file.md5:
        partial.unlink()
        raise InputError(
            f"{url} has the MD5 checksum {found}, expected {file.md5}: it was not kept; try again later, or another "
            "--mirror"
        )
    os.replace(partial, path)
    return path


def _receive(url: str, partial: Path, file: RemoteFile, progress: Callable[[str, int, int], None]) -> None:
    """Appends to `partial` what it lacks of the file; begins it anew where the server sends all of it."""
    done = partial.stat().st_size if partial.exists() else 0
    if done >= file.size:
        partial.unlink()
        done = 0
    response = _open(url, done)
    if response is None:
        partial.unlink()
        return _receive(url, partial, file, progress)
    with response:
        if response.status != 206:
            done = 0
        with partial.open("ab" if done else "wb") as out:
            while done <= file.size and (block := _read(response, url)):
                done += len(block)
                out.write(block)
                progress(file.name, done, file.size)
    if done > file.size:
        partial.unlink()
        raise InputError(f"{url} has more than the {file.size} bytes of {file.name}: try another --mirror")
    if done < file.size and response.length != 0:
        raise InputError(f"the connection to {url} ended after {done} of {file.size} bytes: {_AGAIN}")


def _open(url: str, begin: int) -> http.client.HTTPResponse | None:
    """The answer to a request for the bytes from `begin` on; None where the server has none from there on."""
    with _reaching(url):
        request = urllib.request.Request(url, headers={"User-Agent": "hypermask-fast"})
        if begin:
            request.add_header("Range", f"bytes={begin}-")
        try:
            return urllib.request.urlopen(request, timeout=_TIMEOUT)
        except urllib.error.HTTPError as error:
            if begin and error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                return None
            raise


def _read(response: http.client.HTTPResponse, url: str) -> bytes:
    with _reaching(url):
        return response.read(_BLOCK)


@contextmanager
def _reaching(url: str) -> Iterator[None]:
    try:
        yield
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = one_line(getattr(error, "reason", None) or error)
        raise InputError(
            f"cannot download {url}: {reason}; try again later, or --mirror names another address"
        ) from error


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
