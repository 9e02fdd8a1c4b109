"""`hypermask-fast train`: what it writes, what it refuses, what it says."""

import json
import re

import pytest
import torch
from support.command_line import SETTINGS, TINY, contents, train

from hypermask_fast import cli
from hypermask_fast.training import run, targets
from hypermask_fast.training.config import RunConfig, load_preset
from hypermask_fast.training.result import Result

FILES = {"config.toml", "metrics.json", "timing.json", "accuracy_matrix.csv", "accuracy_matrix.png", "log.csv"}


def test_train_writes_its_files_and_shows_the_matrix(tmp_path, capsys):
    assert train(tmp_path / "run", "--seed", "3") == 0
    shown = capsys.readouterr()
    assert contents(tmp_path / "run").keys() >= FILES
    assert re.search(r"^ +1( +\d+\.\d\d){2}$", shown.out, re.M), "the last row of the matrix"
    assert "average accuracy" in shown.out
    assert "task 1 (digits 2, 3) of 0 to 1: iterations 1 to 8\n" in shown.err
    assert re.search(r"^after task 1 \(digits 2, 3\): [\d.]+ [\d.]+ \(average", shown.err, re.M)
    stored = RunConfig.load(tmp_path / "run" / "config.toml")
    assert stored == load_preset("split-digits").with_values({**SETTINGS, "seed": 3})
    assert len((tmp_path / "run" / "log.csv").read_text().splitlines()) == 1 + 2 * 2


def test_the_same_seed_gives_the_same_numbers_and_another_gives_others(tmp_path, finished):
    assert train(tmp_path / "same", "--seed", "3") == 0
    assert train(tmp_path / "other", "--seed", "4") == 0
    metrics = [(folder / "metrics.json").read_bytes() for folder in (finished, tmp_path / "same", tmp_path / "other")]
    assert metrics[0] == metrics[1]
    assert json.loads(metrics[0])["matrix"] != json.loads(metrics[2])["matrix"]


def test_a_folder_with_a_run_is_refused_and_left_alone(finished, refused):
    before = contents(finished)
    assert "already holds a run" in refused("train", "split-digits", "--out", finished, *TINY)
    assert contents(finished) == before


def test_a_run_without_a_checkpoint_is_in_nobodys_way(tmp_path, finished, refused, capsys):
    """One that diverges in its first steps can be typed again, with other settings; what else is there stays."""
    words = ["train", "split-digits", "--out", str(tmp_path), *TINY, "--seed", "3"]
    assert cli.main([*words, "--set", "training.lr=1e30"]) == 2
    assert "is not finite" in (said := capsys.readouterr().err) or "the loss is" in said
    assert set(contents(tmp_path)) == {"config.toml", "log.csv"}
    (tmp_path / "notes.txt").touch()
    assert "already holds a run" in refused(*words)
    (tmp_path / "notes.txt").unlink()
    assert cli.main(words) == 0
    for name in ("metrics.json", "log.csv", "config.toml"):
        assert contents(tmp_path)[name] == contents(finished)[name], name


def test_folders_in_other_use_are_refused(tmp_path, refused):
    (tmp_path / "mine.txt").write_text("mine")
    assert "is not empty" in refused("train", "split-digits", "--out", tmp_path, *TINY)
    assert "is a file" in refused("train", "split-digits", "--out", tmp_path / "mine.txt", *TINY)
    assert contents(tmp_path) == {"mine.txt": b"mine"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["split-digit"], "did you mean 'split-digits'"),
        (["nothing.toml"], "cannot read configuration nothing.toml"),
        (
            ["split-digits", "--set", "training.batchsize=1"],
            "'training.batchsize' (did you mean 'training.batch_size'?)",
        ),
        (["split-digits", "--set", "training.lr"], "--set takes key=value"),
        (["split-digits", "--set", "method.sparsity=101"], "from 0 to 100, not 101"),
        (["split-digits", "--set", "data.scenario=split-digit"], "split-digits"),
        (["split-digits", "--set", "data.tasks=6"], "1 .. 5, not 6"),
        (["split-digits", "--set", "target.name=vgg"], "there are mlp, resnet20, zenkenet"),
        (["split-digits", "--set", "target.name=zenkenet"], "zenkenet"),
        (["split-digits", "--set", "method.beta=-1"], "beta must be"),
        (["split-mnist"], "--data-dir"),
        (["split-digits", "--seed", "-1"], "seed must be"),
    ],
)
def test_bad_input_to_train_leaves_no_folder(tmp_path, refused, words, message):
    assert message in refused("train", *words, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_missing_data_files_leave_no_folder(tmp_path, refused):
    (tmp_path / "data").mkdir()
    line = refused("train", "split-mnist", "--data-dir", tmp_path / "data", "--out", tmp_path / "run")
    assert str(tmp_path / "data") in line
    assert not (tmp_path / "run").exists()


def test_a_network_without_an_output_per_class_leaves_no_folder(tmp_path, monkeypatch, refused):
    monkeypatch.setattr(run, "build_target", lambda *_: targets.MLP(64, (), 1))
    assert "has 2 classes per task" in refused("train", "split-digits", "--out", tmp_path / "run", *TINY)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(tmp_path, refused):
    assert "sees no GPU" in refused("train", "split-digits", "--device", "cuda", "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_configuration_file_is_a_preset(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(load_preset("split-digits").with_values({**SETTINGS, "title": "mine"}).to_toml())
    assert cli.main(["train", str(path), "--out", str(tmp_path / "run")]) == 0
    title = "mine: split-digits, 2 tasks of 2 classes, MLP-8"
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["title"] == title


def test_default_folder_is_named_after_the_preset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "split-digits", *TINY]) == 0
    assert contents(tmp_path / "runs" / "split-digits").keys() >= FILES


def test_folders_that_can_t_be_made_are_named(tmp_path, finished, refused):
    (tmp_path / "file").write_text("mine")
    assert "file/run: Not a directory" in refused("train", "split-digits", "--out", tmp_path / "file" / "run", *TINY)
    assert "/proc/net.safetensors" in refused("export", finished, "--task", 0, "--to", "/proc/net.safetensors")


@pytest.mark.parametrize("seed", [2**63 - 1, 2**45])
def test_large_seeds(tmp_path, seed):
    assert train(tmp_path / "run", "--seed", str(seed)) == 0


@pytest.mark.parametrize(
    ("steps", "seconds", "shown"),
    [(1, 40.0, "0.025 steps"), (1, 2.5, "0.4 steps"), (6, 1.0, "6 steps"), (25, 2.0, "12 steps"), (9000, 3, "3000 s")],
)
def test_slow_runs_have_a_rate_too(tmp_path, monkeypatch, capsys, steps, seconds, shown):
    result = Result(torch.eye(2).double(), torch.zeros(2).double(), float(seconds), steps)
    monkeypatch.setattr(run, "train", lambda *_, **__: result)
    assert train(tmp_path / "run") == 0
    assert f", {shown}" in capsys.readouterr().out


def test_warnings_take_one_line(tmp_path, capsys):
    assert train(tmp_path / "run", "--set", "method.sparsity=0.3") == 0
    assert "hypermask-fast: warning: sparsity is in percent: 0.3" in capsys.readouterr().err.splitlines()[0]
