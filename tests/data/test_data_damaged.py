"""Files of data damaged in every way: refused in one line that names the file, or read where nothing shows."""

import builtins
import gzip
import io
import os
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from support.datasets import batch, idx_bytes, jpeg_bytes, python2_pickle, smooth, write_npz, write_tiny_imagenet

from hypermask_fast import InputError
from hypermask_fast.data.sources import RawImages, read_cifar10, read_cifar100, read_mnist, read_tiny_imagenet

Read = Callable[[Path], RawImages]


def write_mnist(folder: Path, zipped: bool) -> None:
    rng = np.random.default_rng(0)
    for prefix, count in (("train", 12), ("t10k", 5)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", np.arange(count, dtype=np.uint8) % 10)):
            content = idx_bytes(array)
            path = folder / f"{prefix}-{kind}-ubyte{'.gz' if zipped else ''}"
            path.write_bytes(gzip.compress(content, mtime=0) if zipped else content)


def write_pickles(folder: Path, names: list[str], key: bytes) -> None:
    for seed, name in enumerate(names):
        (folder / name).write_bytes(python2_pickle(*batch(2, 10, seed), key))


def write_npzs(folder: Path, save: Callable[..., None]) -> None:
    rng = np.random.default_rng(0)
    for name in ("train.npz", "test.npz"):
        write_npz(folder / name, [jpeg_bytes(smooth(rng, 32)) for _ in range(3)], [3, 1, 9], save)


BATCHES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
SOURCES: dict[str, tuple[Callable[[Path], object], Read]] = {
    "mnist": (lambda folder: write_mnist(folder, False), read_mnist),
    "mnist gz": (lambda folder: write_mnist(folder, True), read_mnist),
    "cifar10 pickles": (lambda folder: write_pickles(folder, BATCHES, b"labels"), read_cifar10),
    "cifar10 npz": (lambda folder: write_npzs(folder, np.savez), read_cifar10),
    "cifar10 compressed npz": (lambda folder: write_npzs(folder, np.savez_compressed), read_cifar10),
    "cifar100": (lambda folder: write_pickles(folder, ["train", "test"], b"fine_labels"), read_cifar100),
    "tiny imagenet": (
        lambda folder: write_tiny_imagenet(folder / "tiny-imagenet-200"),
        lambda folder: read_tiny_imagenet(folder, range(3)),
    ),
}


def damages(content: bytes, flips: int) -> Iterator[tuple[str, bytes]]:
    """What may become of a file's bytes."""
    rng, length = np.random.default_rng(len(content)), len(content)
    for kept in {0, 1, 3, 9, 17, length // 4, length // 2, length - 1}:
        yield f"cut to {kept}", content[:kept]
    yield "zeros", bytes(length)
    yield "ones", b"\xff" * length
    yield "noise", rng.bytes(length)
    yield "text", (b"not what it should be\n" * length)[:length]
    yield "more", content + b"\0\n more"
    yield "twice", content * 2
    places = {*range(min(40, length)), *range(max(0, length - 30), length), *rng.integers(0, length, flips).tolist()}
    for i in sorted(places):
        for change in (0xFF, 1 << int(rng.integers(8))):
            yield f"byte {i} ^ {change}", content[:i] + bytes([content[i] ^ change]) + content[i + 1 :]
        yield f"NUL at {i}", content[:i] + b"\0" + content[i:]


def problem(read: Read, folder: Path, name: str) -> str:
    """How the reader did otherwise than to refuse in one line with the file's name, or to read; "" for neither."""
    try:
        read(folder)
    except InputError as error:
        line = str(error)
        if "\n" in line or not line.isprintable() or len(line) > 500 + len(str(folder)):
            return f"told {line!r}"
        return "" if name in line else f"did not name the file: {line}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def named(path: Path) -> str:
    """What a message must have: what a text file names may be missing, so there the folder will do."""
    return "tiny-imagenet-200" if path.suffix == ".txt" else path.name


def files_of(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


@pytest.mark.parametrize("source", SOURCES)
def test_damaged_bytes(tmp_path, source):
    write, read = SOURCES[source]
    write(tmp_path)
    files = files_of(tmp_path)
    problems = []
    for path in files if len(files) < 5 else [files[0], files[-1], *tmp_path.rglob("*.txt")]:
        content = path.read_bytes()
        for damage, damaged in damages(content, 30):
            path.write_bytes(damaged)
            if told := problem(read, tmp_path, named(path)):
                problems.append(f"{path.name}, {damage}: {told}")
        path.write_bytes(content)
    assert not problems, "\n".join(problems)
    read(tmp_path)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("what", ["missing", "empty", "folder", "link to itself", "no permission"])
def test_files_that_are_none(tmp_path, monkeypatch, source, what):
    write, read = SOURCES[source]
    write(tmp_path)
    for path in files_of(tmp_path):
        content = path.read_bytes()
        with monkeypatch.context() as patch:
            if what == "no permission":
                forbid(patch, path)
            else:
                path.unlink()
            if what == "empty":
                path.touch()
            elif what == "folder":
                path.mkdir()
            elif what == "link to itself":
                path.symlink_to(path)
            told = problem(read, tmp_path, named(path))
            assert not told
            if path.suffix != ".JPEG" or what != "missing":  # one image fewer shows in the annotations only
                with pytest.raises(InputError):
                    read(tmp_path)
        if path.is_dir():
            path.rmdir()
        path.unlink(missing_ok=True)
        path.write_bytes(content)
    read(tmp_path)


def forbid(patch: pytest.MonkeyPatch, path: Path) -> None:
    """As for a user without permission: root, which tests may run as, has all."""
    opened = io.open

    def forbidden(file, *args, **kwargs):
        if isinstance(file, (str, Path)) and Path(file) == path:
            raise PermissionError(13, "Permission denied", str(file))
        return opened(file, *args, **kwargs)

    patch.setattr(io, "open", forbidden)
    patch.setattr(builtins, "open", forbidden)


def test_a_folder_that_may_not_be_looked_into(tmp_path, monkeypatch):
    def forbidden(self, **_):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "stat", forbidden)
    for _, read in SOURCES.values():
        with pytest.raises(InputError, match=f"{tmp_path} cannot be read: Permission denied"):
            read(tmp_path)


# -- headers that promise what there is not --------------------------------------------------------------------------

MOST = 2**32 - 1


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "shape", [(0, MOST, MOST), (MOST, 28, 28), (MOST, MOST, MOST), (MOST, 0, MOST), (2**16, 2**12, 2**12)]
)
def test_idx_headers(tmp_path, shape, zipped):
    write_mnist(tmp_path, zipped)
    path = tmp_path / f"train-images-idx3-ubyte{'.gz' if zipped else ''}"
    content = bytes((0, 0, 8, 3)) + struct.pack(">3I", *shape) + bytes(0 if 0 in shape else 1000)
    path.write_bytes(gzip.compress(content) if zipped else content)
    with pytest.raises(InputError, match=f"{path.name} (cannot be read|is damaged)"):
        read_mnist(tmp_path)


def npy(header: str, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    """An .npy file of any header."""
    return b"\x93NUMPY" + version + struct.pack("<H", len(header)) + header.encode() + data


def described(descr: str, shape: object) -> str:
    return f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}\n"


MEMBERS = {
    "huge": npy(described("|u1", (2**50,))),
    "huge integers": npy(described("<i8", (2**62, 2**62))),
    "negative": npy(described("|u1", (-5,))),
    "no shape": npy(described("|u1", "'x'")),
    "objects": npy(described("|O", (1,)), b"cos\nsystem\n(S'true'\ntR."),
    "text": npy(described("<U4000000", (1,))),
    "no header": npy("("),
    "deep header": npy("(" * 5000),
    "code": npy("__import__('os').getpid()"),
    "version": npy(described("|u1", (0,)), version=b"\x09\x09"),
    "no array": b"just bytes",
    "nothing": b"",
    "0 dimensions": npy(described("|u1", ()), b"\0"),
    "record": npy(described([("a", "|u1")], (1,)), b"\0"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize("key", ["jpeg", "offsets", "labels"])
def test_npz_members(tmp_path, key, member):
    write_npzs(tmp_path, np.savez)
    with zipfile.ZipFile(tmp_path / "train.npz") as whole:
        members = {name: whole.read(name) for name in whole.namelist()}
    with zipfile.ZipFile(tmp_path / "train.npz", "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in (members | {f"{key}.npy": MEMBERS[member]}).items():
            file.writestr(name, content)
    assert not problem(read_cifar10, tmp_path, "train.npz")
    with pytest.raises(InputError):
        read_cifar10(tmp_path)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, 9, 99])
@pytest.mark.parametrize("flags", [0, 1, 0x20, 0x40])
def test_npz_compressed_otherwise_encrypted_or_patched(tmp_path, method, flags):
    """The directory of the zip file says so; the data are what they were."""
    write_npzs(tmp_path, np.savez_compressed)
    path = tmp_path / "train.npz"
    content = bytearray(path.read_bytes())
    for signature, at in ((b"PK\1\2", 8), (b"PK\3\4", 6)):
        place = content.find(signature)
        while place >= 0:
            struct.pack_into("<HH", content, place + at, flags, method)
            place = content.find(signature, place + 1)
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"train.npz cannot be read as an .npz"):
        read_cifar10(tmp_path)


@pytest.mark.parametrize("offsets", [[0, 2**63 - 1, -2, 900], [0, -1, 900], [0, 10**6, 900]])
def test_npz_offsets_that_wrap_around(tmp_path, offsets):
    write_npzs(tmp_path, np.savez)
    files = [jpeg_bytes(smooth(np.random.default_rng(1), 32))]
    write_npz(tmp_path / "train.npz", files, [1, 2, 3], offsets=np.array([*offsets[:-1], len(files[0])]))
    with pytest.raises(InputError, match="train.npz: offsets must rise"):
        read_cifar10(tmp_path)


# -- text that names files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["a\0b.JPEG", "", ".", "..", "x/..", "x/", "\x1b[2J", "a\u2028b", "long" * 100, "none"]
)
def test_names_in_val_annotations(tmp_path, name):
    _, read = SOURCES["tiny imagenet"]
    write_tiny_imagenet(tmp_path / "tiny-imagenet-200")
    (tmp_path / "tiny-imagenet-200" / "val" / "val_annotations.txt").write_text(f"{name}\tn1\t0\t0\t1\t1\n")
    assert not problem(read, tmp_path, "tiny-imagenet-200/val")
    with pytest.raises(InputError):
        read(tmp_path)


@pytest.mark.parametrize("wnid", ["n1\0", "../train/n1", "..", "/", "n" * 5000, "n1/images", "\x1b[2J", "*", "n\ud800"])
def test_names_in_wnids(tmp_path, wnid):
    _, read = SOURCES["tiny imagenet"]
    write_tiny_imagenet(tmp_path / "tiny-imagenet-200")
    path = tmp_path / "tiny-imagenet-200" / "wnids.txt"
    path.write_bytes(f"n3\n{wnid}\nn2\n".encode(errors="surrogatepass"))
    assert not problem(read, tmp_path, "wnids.txt")
    with pytest.raises(InputError):
        read(tmp_path)


def test_an_image_that_is_damaged_is_named(tmp_path):
    _, read = SOURCES["tiny imagenet"]
    write_tiny_imagenet(tmp_path / "tiny-imagenet-200")
    for path in tmp_path.rglob("*.JPEG"):
        content = path.read_bytes()
        frame = content.index(b"\xff\xc0")
        huge = content[: frame + 5] + b"\xff" * 4 + content[frame + 9 :]  # 65,535 x 65,535: a "decompression bomb"
        for damaged in (content[:200], b"no JPEG", jpeg_bytes(np.zeros((32, 32), np.uint8)), huge):
            path.write_bytes(damaged)
            with pytest.raises(InputError, match=f"^{os.fspath(path)} is "):
                read(tmp_path)
        path.write_bytes(content)
