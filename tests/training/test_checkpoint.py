"""Checkpoints: complete or not there, and refused when they are not what they should be."""

import hashlib
import json
import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from support.networks import TiedLayers

import hypermask_fast as hmf
from hypermask_fast import InputError
from hypermask_fast.data import Scenario, TaskData, TensorSplit
from hypermask_fast.files import write_atomic
from hypermask_fast.training import checkpoint, exported, tensor_files
from hypermask_fast.training import manifest as manifests

TENSORS = {"a": torch.arange(6.0).view(2, 3), "step": torch.tensor(3.0), "rng": torch.arange(9, dtype=torch.uint8)}
STATE = {"task": 1, "lr": 0.1 + 0.2, "best": -1.0}


@pytest.fixture
def run_dir(tmp_path):
    checkpoint.save(tmp_path, "000-0000001", TENSORS, STATE)
    return tmp_path


def tensor_file(run_dir):
    (path,) = run_dir.glob("*.safetensors")
    return path


def test_round_trip(run_dir):
    tensors, state, file = checkpoint.load(run_dir)
    assert state == STATE and file == tensor_file(run_dir)
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[key], TENSORS[key]) and tensors[key].dtype == TENSORS[key].dtype for key in TENSORS)


def test_only_the_newest_stays(run_dir):
    checkpoint.save(run_dir, "000-0000002", TENSORS, {"task": 2})
    assert sorted(path.name for path in run_dir.iterdir()) == ["checkpoint-000-0000002.safetensors", "checkpoint.json"]
    assert checkpoint.load(run_dir)[1] == {"task": 2}


@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_a_kill_at_any_moment_of_saving(run_dir, monkeypatch, step):
    """Stopped before the k-th change on disk, the folder still holds a whole checkpoint, the old or the new one."""
    calls = []

    def dies(change):
        def wrapper(*args, **kwargs):
            calls.append(change)
            if len(calls) == step:
                raise KeyboardInterrupt
            return change(*args, **kwargs)

        return wrapper

    monkeypatch.setattr(tensor_files, "save_file", dies(tensor_files.save_file))
    monkeypatch.setattr(os, "replace", dies(os.replace))
    monkeypatch.setattr(Path, "unlink", dies(Path.unlink))
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(run_dir, "000-0000002", {"a": torch.zeros(1)}, {"task": 2})
    monkeypatch.undo()
    tensors, state, _ = checkpoint.load(run_dir)
    assert (len(tensors), state["task"]) == ((1, 2) if step == 4 else (3, 1))
    checkpoint.save(run_dir, "000-0000003", TENSORS, STATE)  # and saving goes on
    assert len(list(run_dir.iterdir())) == 2


def test_what_a_kill_left_behind_goes_with_the_next_checkpoint(run_dir):
    (run_dir / ".checkpoint").mkdir()
    (run_dir / ".checkpoint" / ".tmpAbCdEf").write_bytes(b"safetensors' own, half written")
    checkpoint.save(run_dir, "000-0000002", TENSORS, STATE)
    assert {path.name for path in run_dir.iterdir()} == {"checkpoint.json", "checkpoint-000-0000002.safetensors"}


def test_missing(tmp_path):
    with pytest.raises(InputError, match=r"no checkpoint in .*checkpoint.json is missing"):
        checkpoint.load(tmp_path)


def test_cut_off_tensors(run_dir):
    path = tensor_file(run_dir)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(InputError, match=r"000-0000001.safetensors is cut off or was altered"):
        checkpoint.load(run_dir)


def test_altered_tensors(run_dir):
    path = tensor_file(run_dir)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="was altered"):
        checkpoint.load(run_dir)


def test_missing_tensors(run_dir):
    tensor_file(run_dir).unlink()
    with pytest.raises(InputError, match=r"names checkpoint-000-0000001.safetensors, which is missing"):
        checkpoint.load(run_dir)


@pytest.mark.parametrize("moment", ["read the manifest", "digest", "read", "map", "after read"])
def test_a_checkpoint_replaced_while_it_is_read(run_dir, monkeypatch, moment):
    """What is read is the newer one, whole, wherever in the reading it came."""
    owner, name = {
        "read the manifest": (manifests, "read"),
        "digest": (tensor_files, "digest"),
        "map": (torch.UntypedStorage, "from_file"),  # within safe_open, after it has looked at the file
    }.get(moment, (tensor_files, "safe_open"))
    call, replaced = getattr(owner, name), []

    def replacing(*args, **kwargs):
        if replaced:
            return call(*args, **kwargs)
        replaced.append(1)
        result = None if moment in ("read", "map") else call(*args, **kwargs)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, call)
            checkpoint.save(run_dir, "000-0000002", {"a": torch.zeros(1)}, {"task": 2})
        return call(*args, **kwargs) if result is None else result

    monkeypatch.setattr(owner, name, replacing)
    tensors, state, _ = checkpoint.load(run_dir)
    assert (tensors.keys(), state) == ({"a"}, {"task": 2})
    assert replaced


def test_a_reader_beside_a_writer(tmp_path):
    """Every load gives tensors and state of one moment, and fails never."""
    writing = threading.Thread(
        target=lambda: [
            checkpoint.save(tmp_path, f"000-{i:07d}", {"a": torch.full((1000,), float(i))}, {"task": i})
            for i in range(300)
        ]
    )
    writing.start()
    seen = []
    while writing.is_alive():
        if checkpoint.exists(tmp_path):
            tensors, state, _ = checkpoint.load(tmp_path)
            assert (tensors["a"] == state["task"]).all()
            seen.append(state["task"])
    writing.join()
    assert seen == sorted(seen) and len(set(seen)) > 10


@pytest.mark.parametrize("name", ["checkpoint.json", "checkpoint-000-0000001.safetensors"])
def test_a_file_without_permission_is_not_called_altered(run_dir, monkeypatch, name):
    opened = Path.open

    def forbidden(self, *args, **kwargs):
        if self.name == name:
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", forbidden)
    monkeypatch.setattr(Path, "read_text", lambda self, **_: forbidden(self).read())
    with pytest.raises(InputError, match=rf"^cannot read .*{name}: Permission denied$"):
        checkpoint.load(run_dir)


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002, 0o077])
def test_who_may_read_a_checkpoint_is_the_umask_s_to_say(tmp_path, umask):
    before = os.umask(umask)
    try:
        folder = tmp_path / "run"
        folder.mkdir()
        write_atomic(folder / "another", "file")
        checkpoint.save(folder, "000-0000001", TENSORS, STATE)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o666 & ~umask}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda text: text[:40], "is cut off or was altered"),
        (lambda text: "[]", "is not a checkpoint"),
        (lambda text: text.replace('"task": 1', '"task": 0'), "its own checksum does not match"),
        (lambda text: text.replace('"format": 1', '"format": 9'), "not a checkpoint of format 1"),
        (lambda text: "\udcff", "is cut off or was altered"),
    ],
)
def test_altered_manifest(run_dir, edit, message):
    path = run_dir / tensor_files.MANIFEST
    path.write_bytes(edit(path.read_text()).encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=message):
        checkpoint.load(run_dir)


def test_a_manifest_cannot_lead_out_of_its_folder(run_dir):
    manifest = json.loads((run_dir / tensor_files.MANIFEST).read_text())
    manifest.pop("manifest_sha256")
    manifest["file"] = "../elsewhere.safetensors"
    manifest["manifest_sha256"] = manifests.digest(manifest)
    (run_dir / tensor_files.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="was altered"):
        checkpoint.load(run_dir)


def test_a_manifest_taken_away(run_dir):
    (run_dir / tensor_files.MANIFEST).unlink()
    with pytest.raises(InputError, match=r"checkpoint.json is missing: .*remove checkpoint-000-0000001.safetensors"):
        checkpoint.exists(run_dir)
    (run_dir / ".checkpoint").mkdir()  # as a kill within the first save leaves it
    assert not checkpoint.exists(run_dir)


@pytest.mark.parametrize("failing", ["save_file", "replace", "write_text"])
def test_a_full_disk_leaves_the_checkpoint_before(run_dir, monkeypatch, failing):
    def fails(*_, **__):
        raise SafetensorError("I/O error: disk full") if failing == "save_file" else OSError(28, "disk full")

    owner = {"save_file": tensor_files, "replace": os, "write_text": Path}[failing]
    monkeypatch.setattr(owner, failing, fails)
    with pytest.raises(
        InputError, match=r"cannot write .*000-0000002.safetensors: .*disk full; nothing on disk was lost"
    ):
        checkpoint.save(run_dir, "000-0000002", TENSORS, {"task": 2})
    monkeypatch.undo()
    assert checkpoint.load(run_dir)[1] == STATE


def test_tied_tensors_are_saved_once(tmp_path):
    net, other = TiedLayers(), TiedLayers()
    checkpoint.save(tmp_path, "x", checkpoint.model_tensors(net), {"task": 1, "settings": "a"})
    assert checkpoint.load(tmp_path)[0].keys() == {
        *("model.first.weight", "model.first.bias", "model.second.bias", "model.head.weight", "model.head.bias")
    }
    checkpoint.restore_model(other, checkpoint.load(tmp_path)[0])
    assert torch.equal(other.second.weight, net.first.weight) and other.second.weight is other.first.weight


def test_an_exported_network_of_tied_tensors(tmp_path):
    """Written once, and tied where it is loaded."""
    torch.manual_seed(0)
    model = hmf.HyperMask(TiedLayers(), 2, 30, hmf.HypernetConfig(4, (5,)), heads="head").eval()
    scenario = Scenario("s", tuple(TaskData(str(t), *[blob_split()] * 3) for t in range(2)), (8,), 2)
    exported.export_model(model, scenario, 1, tmp_path / "net.safetensors")
    loaded = exported.load_exported(tmp_path / "net.safetensors", TiedLayers())
    x = torch.randn(3, 8)
    torch.testing.assert_close(loaded(x), model(x, 1))
    assert loaded.first.weight is loaded.second.weight


def blob_split():
    return TensorSplit(torch.randn(4, 8), torch.arange(4) % 2)


def test_the_format_of_a_single_process_stays_as_it_is(run_dir):
    """To the byte, since version 0.1.0."""
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in run_dir.iterdir()}
    assert digests == {
        "checkpoint.json": "95cf04017970331c",
        "checkpoint-000-0000001.safetensors": "8f5937e787862c63",
    }
