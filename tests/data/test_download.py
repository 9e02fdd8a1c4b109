"""Downloads from a server of our own: whole, resumed, wrong, in the way of something; archives that lead elsewhere."""

import hashlib
import io
import tarfile
import threading
import zipfile
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from support.datasets import batch, idx_bytes, python2_pickle, write_tiny_imagenet

from hypermask_fast import InputError, cli
from hypermask_fast.data import SCENARIOS, load_scenario
from hypermask_fast.data.download import DOWNLOADS, RemoteFile, download
from hypermask_fast.data.unpack import unpack


@dataclass
class Mirror:
    """What the server has, and how it behaves."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    ranges: bool = True
    cut: int | None = None  # after so many bytes the connection ends
    told_length: bool = True
    requests: list[tuple[str, str | None]] = field(default_factory=list)


@pytest.fixture
def mirror():
    state = Mirror()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            name, asked = self.path.rpartition("/")[2], self.headers["Range"]
            state.requests.append((name, asked))
            if name not in state.files:
                self.send_error(404)
                return
            content, begin = state.files[name], 0
            if asked is not None and state.ranges:
                begin = int(asked.removeprefix("bytes=").rstrip("-"))
                if begin >= len(content):
                    self.send_error(416)
                    return
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
            else:
                self.send_response(200)
            if state.told_length:
                self.send_header("Content-Length", str(len(content) - begin))
            self.end_headers()
            self.wfile.write(content[begin:][: state.cut])

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}/some/folder"
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


def tar_of(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return out.getvalue()


def zip_of(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return out.getvalue()


def published(name: str, folder: Path) -> list[bytes]:
    """A small data set as its files are published, in the order of `DOWNLOADS`."""
    if name == "mnist":
        rng = np.random.default_rng(0)
        parts = [(rng.integers(0, 256, (n, 28, 28), np.uint8), np.arange(n, dtype=np.uint8) % 10) for n in (900, 40)]
        return [idx_bytes(array) for part in parts for array in part]
    if name == "tiny-imagenet":
        write_tiny_imagenet(folder / "tiny-imagenet-200")
        files = [path for path in folder.rglob("*") if path.is_file()]
        return [zip_of({path.relative_to(folder).as_posix(): path.read_bytes() for path in files})]
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"] if name == "cifar10" else ["train", "test"]
    below, key = DOWNLOADS[name].folder, b"labels" if name == "cifar10" else b"fine_labels"
    return [tar_of({f"{below}/{name}": python2_pickle(*batch(2, 10, i), key) for i, name in enumerate(names)})]


def offer(monkeypatch, mirror: Mirror, name: str, contents: list[bytes]) -> None:
    """Puts the files on the mirror, and their sizes and checksums in the place of the real ones."""
    files = DOWNLOADS[name].files
    mirror.files |= {file.name: content for file, content in zip(files, contents, strict=True)}
    known = tuple(
        RemoteFile(file.url, len(content), hashlib.md5(content).hexdigest())
        for file, content in zip(files, contents, strict=True)
    )
    monkeypatch.setitem(DOWNLOADS, name, replace(DOWNLOADS[name], files=known))


@pytest.fixture
def mnist(monkeypatch, mirror, tmp_path):
    offer(monkeypatch, mirror, "mnist", published("mnist", tmp_path))
    return mirror


def get(name: str, folder: Path, mirror: Mirror) -> list[str]:
    """What was said while it was downloaded."""
    said: list[str] = []
    assert download(name, folder, mirror.url + "/", said.append)
    return said


def assert_clean(folder: Path, *expected: str) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted(expected), "nothing else, and nothing hidden"


@pytest.mark.parametrize("name", DOWNLOADS)
def test_each_data_set(tmp_path, monkeypatch, mirror, name):
    offer(monkeypatch, mirror, name, published(name, tmp_path / "source"))
    folder = tmp_path / "data"
    said = get(name, folder, mirror)
    assert said[0] == f"downloading {mirror.url}/{DOWNLOADS[name].files[0].name}"
    assert said[-1] == f"{name} is in {folder / DOWNLOADS[name].folder}"
    assert_clean(folder, DOWNLOADS[name].folder)
    DOWNLOADS[name].read(folder)
    asked = len(mirror.requests)
    assert not download(name, folder, mirror.url)
    assert not download(name, folder / DOWNLOADS[name].folder, mirror.url), "where the files themselves are"
    assert len(mirror.requests) == asked == len(DOWNLOADS[name].files)


def test_every_scenario_says_what_to_download(tmp_path):
    for name, info in SCENARIOS.items():
        assert (info.dataset is None) == (info.files is None)
        if info.dataset is None:
            continue
        with pytest.raises(InputError, match=f"`hypermask-fast data {info.dataset} --to DIR` downloads them"):
            load_scenario(name)
        for folder in (tmp_path, tmp_path / "not there"):
            with pytest.raises(InputError) as caught:
                load_scenario(name, folder)
            assert f"; `hypermask-fast data {info.dataset} --to '{folder}'` downloads it" in str(caught.value).replace(
                f"--to {folder}`", f"--to '{folder}'`"
            )


@pytest.mark.parametrize("told_length", [True, False])
@pytest.mark.parametrize("ranges", [True, False])
def test_a_connection_that_ends_early(tmp_path, mnist, told_length, ranges):
    mnist.cut, mnist.told_length, mnist.ranges = 5000, told_length, ranges
    size = len(mnist.files["train-images-idx3-ubyte.gz"])
    with pytest.raises(InputError, match=f"ended after 5000 of {size} bytes: the same command goes on from there"):
        download("mnist", tmp_path, mnist.url)
    assert_clean(tmp_path, ".mnist-download")
    mnist.cut = None
    said = get("mnist", tmp_path, mnist)
    assert "from byte 5000 on" in said[0]
    assert mnist.requests[1] == ("train-images-idx3-ubyte.gz", "bytes=5000-")
    assert_clean(tmp_path, "mnist")
    DOWNLOADS["mnist"].read(tmp_path)


@pytest.mark.parametrize("left", [b"garbage", b"x" * 10**6, b""], ids=["other bytes", "too many", "none"])
def test_what_is_left_of_something_else_is_downloaded_anew(tmp_path, mnist, left):
    (tmp_path / ".mnist-download").mkdir()
    (tmp_path / ".mnist-download" / "train-images-idx3-ubyte.gz.part").write_bytes(left)
    (tmp_path / ".mnist-download" / "t10k-labels-idx1-ubyte.gz").write_bytes(left)
    get("mnist", tmp_path, mnist)
    DOWNLOADS["mnist"].read(tmp_path)
    assert_clean(tmp_path, "mnist")


def test_a_mirror_whose_file_is_shorter_than_what_there_is(tmp_path, mnist):
    whole = mnist.files["train-images-idx3-ubyte.gz"]
    (tmp_path / ".mnist-download").mkdir()
    (tmp_path / ".mnist-download" / "train-images-idx3-ubyte.gz.part").write_bytes(whole[:5000])
    mnist.files["train-images-idx3-ubyte.gz"] = whole[:100]
    with pytest.raises(InputError, match="has the MD5 checksum"):
        download("mnist", tmp_path, mnist.url)


def test_a_wrong_checksum_is_refused_and_nothing_of_it_kept(tmp_path, mnist):
    right = dict(mnist.files)
    name = "t10k-images-idx3-ubyte.gz"
    mnist.files[name] = right[name][:-1] + b"\0"
    wrong = hashlib.md5(mnist.files[name]).hexdigest()
    with pytest.raises(InputError, match=f"{name} has the MD5 checksum {wrong}, expected .*: it was not kept"):
        download("mnist", tmp_path, mnist.url)
    assert not list(tmp_path.rglob(f"{name}*")) and not (tmp_path / "mnist").exists()
    mnist.files, mnist.requests = right, []
    get("mnist", tmp_path, mnist)
    assert [request[0] for request in mnist.requests] == [name, "t10k-labels-idx1-ubyte.gz"], "the others were kept"


def test_a_file_that_does_not_end(tmp_path, mnist):
    mnist.files["train-images-idx3-ubyte.gz"] += bytes(10**7)
    with pytest.raises(InputError, match="has more than the .* bytes of train-images"):
        download("mnist", tmp_path, mnist.url)


@pytest.mark.parametrize(
    ("mirror_url", "message"),
    [
        ("ftp://x/y", "begins with http:// or https://"),
        ("file:///etc", "begins with http:// or https://"),
        ("somewhere", "begins with http:// or https://"),
        ("http://127.0.0.1:1", "cannot download http://127.0.0.1:1/train-images-idx3-ubyte.gz: .*refused"),
        ("http://[/", "cannot download|is an address"),
        ("http://a b", "cannot download"),
        ("http:///", "cannot download"),
        ("http://127.0.0.1:99999", "cannot download"),
        ("http://nowhere.invalid", "cannot download http://nowhere.invalid/"),
    ],
)
def test_addresses(tmp_path, mirror_url, message):
    with pytest.raises(InputError, match=message) as caught:
        download("mnist", tmp_path, mirror_url)
    assert "\n" not in str(caught.value)
    assert_clean(tmp_path)


def test_not_found(tmp_path, mnist):
    del mnist.files["t10k-labels-idx1-ubyte.gz"]
    with pytest.raises(InputError, match=r"t10k-labels-idx1-ubyte.gz: Not Found; try again later, or --mirror"):
        download("mnist", tmp_path, mnist.url)


@pytest.mark.parametrize("name", ["mnist", "cifar100", "tiny-imagenet"])
def test_stopped_at_any_moment(tmp_path, monkeypatch, mirror, name):
    """Nothing is in its place then, and the next one finishes."""
    offer(monkeypatch, mirror, name, published(name, tmp_path / "source"))
    moments, moment = 0, 0
    while True:
        folder, calls = tmp_path / f"data {moment}", []

        def stops(*_, calls=calls, moment=moment):
            calls.append(1)
            if len(calls) == moment + 1:
                raise KeyboardInterrupt

        try:
            download(name, folder, mirror.url, stops, stops)
        except KeyboardInterrupt:
            moments += 1
        else:
            break
        if not (folder / DOWNLOADS[name].folder).exists():
            get(name, folder, mirror)
        DOWNLOADS[name].read(folder)
        assert_clean(folder, DOWNLOADS[name].folder)
        moment += 1
    assert moments > 4


def test_in_the_way(tmp_path, mnist):
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / "notes").write_text("mine")
    with pytest.raises(InputError, match="mnist is there and is not mnist: remove it, or choose another folder"):
        download("mnist", tmp_path, mnist.url)
    get("mnist", tmp_path / "b", mnist)
    images = tmp_path / "b" / "mnist" / "train-images-idx3-ubyte.gz"
    images.write_bytes(b"damaged")
    with pytest.raises(InputError, match=f"{images} is not an IDX file.*; what is there is not replaced: remove it"):
        download("mnist", tmp_path / "b", mnist.url)
    assert images.read_bytes() == b"damaged" and (tmp_path / "mnist" / "notes").read_text() == "mine"
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match=f"{folder}|{tmp_path / 'file'}"):
            download("mnist", folder, mnist.url)


def test_a_disk_that_is_full(tmp_path, mnist, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device", str(tmp_path / "x.part"))

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(InputError, match=r"cannot write .*x.part: No space left on device"):
        download("mnist", tmp_path, mnist.url)


def test_two_at_once(tmp_path, mnist):
    """The second one is refused while the first one is at work, and finds it done afterwards."""
    told = []

    def at_work(text: str) -> None:
        if not told:
            told.append("")
            with pytest.raises(InputError) as caught:
                download("mnist", tmp_path, mnist.url)
            told[0] = str(caught.value)

    assert download("mnist", tmp_path, mnist.url, at_work)
    assert "another process is downloading into" in told[0]
    assert not download("mnist", tmp_path, mnist.url)


# -- archives ---------------------------------------------------------------------------------------------------------


def special(name: str, kind: bytes, link: str = "") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as file:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, link
        file.addfile(info)
    return out.getvalue()


OUTSIDE = ["../out", "in/../../out", "/tmp/out", "out", "in/..", "./in/../out", "in\\..\\out", "..\\out", "C:\\out"]


@pytest.mark.parametrize("pack", [tar_of, zip_of])
@pytest.mark.parametrize("name", OUTSIDE)
def test_archives_that_lead_elsewhere(tmp_path, pack, name):
    archive = tmp_path / ("a.zip" if pack is zip_of else "a.tar.gz")
    archive.write_bytes(pack({"in/good": b"1", name: b"2"}))
    (tmp_path / "below").mkdir()
    with pytest.raises(InputError, match="where only files and folders in in belong"):
        unpack(archive, tmp_path / "below" / "target", "in")
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted([archive.name, "below", "good", "in", "target"])
    assert not Path("/tmp/out").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE])
def test_archives_with_links_and_devices(tmp_path, kind):
    (tmp_path / "a.tar.gz").write_bytes(special("in/x", kind, "/etc/passwd"))
    with pytest.raises(InputError, match="holds 'in/x', where only files"):
        unpack(tmp_path / "a.tar.gz", tmp_path / "target", "in")
    assert not (tmp_path / "target" / "in" / "x").exists()


@pytest.mark.parametrize("pack", [tar_of, zip_of])
def test_damaged_archives(tmp_path, pack):
    content = pack({f"in/{i}": np.random.default_rng(i).bytes(3000) for i in range(3)})
    archive = tmp_path / ("a.zip" if pack is zip_of else "a.tar.gz")
    for i in range(0, len(content), 311):
        for damaged in (content[:i], content[:i] + bytes([content[i] ^ 0x5A]) + content[i + 1 :]):
            archive.write_bytes(damaged)
            try:
                unpack(archive, tmp_path / f"{i} {len(damaged)}", "in")
            except InputError as error:
                assert str(archive) in str(error) and "\n" not in str(error)
    archive.write_bytes(pack({}))
    with pytest.raises(InputError, match="has no folder in"):
        unpack(archive, tmp_path / "empty", "in")


# -- the command ------------------------------------------------------------------------------------------------------


def test_command(tmp_path, mnist, capsys):
    folder = tmp_path / "data"
    command = ["data", "split-mnist", "--to", str(folder), "--mirror", mnist.url]
    assert cli.main(command) == 0
    out, err = capsys.readouterr()
    assert out == f"train with --data-dir {folder}\n"
    assert err.splitlines()[0] == f"downloading {mnist.url}/train-images-idx3-ubyte.gz"
    assert cli.main(command) == 0
    assert capsys.readouterr() == (f"mnist is in {folder} already: nothing to download\n", "")
    assert cli.main(["data", "split-digits", "--to", str(folder)]) == 0
    assert capsys.readouterr().out == "split-digits needs no files\n"
    assert cli.main(["data", "imagenet", "--to", str(folder)]) == 2
    assert "no data set 'imagenet': there are mnist, cifar10, cifar100, tiny-imagenet" in capsys.readouterr().err


def test_what_is_published():
    """Names, sizes and checksums are those of the files; as they can't be downloaded here, at least of their kind."""
    files = [file for wanted in DOWNLOADS.values() for file in wanted.files]
    assert len({file.md5 for file in files}) == len(files) == 7
    assert all(len(bytes.fromhex(file.md5)) == 16 and file.size > 4000 for file in files)
    assert all(file.name.endswith((".gz", ".zip")) for file in files)


def test_a_folder_that_nothing_comes_to_is_not_left(tmp_path, mirror):
    with pytest.raises(InputError, match="cannot download"):
        download("mnist", tmp_path / "new" / "data", mirror.url)
    assert list(tmp_path.iterdir()) == []
