"""Several runs of one command: --seeds, --grid, --jobs."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.command_line import InThisProcess

from hypermask_fast import cli
from hypermask_fast.commands import several
from hypermask_fast.training.config import RunConfig

ROOT = Path(__file__).parents[1]
SETTINGS = ["data.tasks=2", "training.iterations=6", "target.hidden=[8]", "hypernet.hidden=[4]", "hypernet.embedding=3"]
TINY = ["--device", "cpu", *(word for setting in SETTINGS for word in ("--set", setting))]


@pytest.fixture(autouse=True)
def _children_find_the_package(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def refused(capsys):
    def run_refused(*words: object) -> str:
        assert cli.main(["train", *map(str, words)]) == 2
        line = capsys.readouterr().err
        assert line.startswith("hypermask-fast: error: ") and line.count("\n") == 1
        return line

    return run_refused


def train(out: Path, *words: str) -> int:
    return cli.main(["train", "split-digits", "--out", str(out), *TINY, *words])


@pytest.fixture
def in_this_process(monkeypatch):
    """Runs train here; in processes of their own the first two tests and that of Control-C have them."""
    monkeypatch.setattr(several.subprocess, "Popen", InThisProcess)


def test_seeds_are_runs_that_are_summed_up_and_gone_on_with(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    assert train(out, "--seeds", "3,5", "--jobs", "2") == 0
    shown = capsys.readouterr()
    assert re.search(r"^split-digits, 2 tasks of 2 classes, MLP-8 +average accuracy \(%\) +2 ", shown.out, re.M)
    for seed in (3, 5):
        assert f"seed-{seed}: task 1 (digits 2, 3) of 0 to 1: iterations 1 to 6\n" in shown.err
        assert RunConfig.load(out / f"seed-{seed}" / "config.toml").seed == seed
    summary = json.loads((out / "summary.json").read_text())
    assert summary["groups"][0]["seeds"] == [3, 5] and (out / "accuracy.png").is_file()

    # The numbers are those of a run by itself.
    assert train(tmp_path / "alone", "--seed", "5") == 0
    assert (tmp_path / "alone" / "metrics.json").read_bytes() == (out / "seed-5" / "metrics.json").read_bytes()
    capsys.readouterr()

    # All in one: one run is finished, one was stopped before its first checkpoint, one was never begun.
    finished = (out / "seed-3" / "timing.json").stat().st_mtime_ns
    for path in (out / "seed-5").iterdir():
        if path.name != "config.toml":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    monkeypatch.setattr(several.subprocess, "Popen", InThisProcess)
    assert train(out, "--seeds", "3,5,6", "--resume") == 0
    shown = capsys.readouterr()
    assert "1 of 3 runs are finished already\n" in shown.err
    assert (out / "seed-3" / "timing.json").stat().st_mtime_ns == finished
    assert (tmp_path / "alone" / "metrics.json").read_bytes() == (out / "seed-5" / "metrics.json").read_bytes()
    assert json.loads((out / "summary.json").read_text())["groups"][0]["seeds"] == [3, 5, 6]


def test_a_run_that_fails_is_named_and_stops_no_other(tmp_path, capsys):
    out = tmp_path / "out"
    words = ["--grid", "target.name=resnet20,mlp"]  # of which the first takes no images of one row
    (tmp_path / "mine.py").write_text(DATA)
    words += ["--scenario", f"{tmp_path / 'mine.py'}:tasks"]
    assert train(out, *words) == 2
    shown = capsys.readouterr()
    assert not (out / "target.name=resnet20").exists()
    last = shown.err.splitlines()[-1]
    assert last.startswith("hypermask-fast: error: 1 of 2 runs failed: target.name=resnet20 (target resnet20 takes im")
    assert last.endswith("the same command with --resume tries them again")
    assert (out / "target.name=mlp" / "metrics.json").is_file()
    assert len(json.loads((out / "summary.json").read_text())["groups"]) == 1


def test_runs_that_all_fail_leave_nothing(tmp_path, capsys, in_this_process):
    own = tmp_path / "mine.py"
    own.write_text(DATA + FOUND_LATE)
    words = ["--scenario", f"{own}:found_late", "--seeds", "0-1", "--grid", "method.beta=1", "--jobs", "2"]
    assert train(tmp_path / "out", *words) == 2
    *each, last = capsys.readouterr().err.splitlines()
    why = "inputs of a dataset must share shape and dtype"
    assert len(each) == 2
    for seed, line in enumerate(sorted(each)):
        assert line.startswith(f"method.beta=1/seed-{seed}: error: {why}")
    assert last.startswith("hypermask-fast: error: 2 of 2 runs failed: method.beta=1/seed-") and f" ({why}" in last
    assert last.count(why) == 1, "what is the same is told once"
    assert "--resume" not in last and not (tmp_path / "out").exists()


def test_runs_that_ended_before_their_first_checkpoint_can_be_begun_again(tmp_path, monkeypatch, refused, capsys):
    for seed in (0, 1):
        assert train(tmp_path / f"seed-{seed}", "--seed", str(seed)) == 0
        for path in (tmp_path / f"seed-{seed}").iterdir():
            if path.name not in ("config.toml", "log.csv"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    started = []
    monkeypatch.setattr(several, "_trained", lambda arguments, out, runs, *_: started.extend(runs) or {})
    capsys.readouterr()
    assert train(tmp_path, "--seeds", "0-1", "--set", "method.beta=5") == 0
    assert [run.name for run in started] == ["seed-0", "seed-1"]
    assert "is not empty" in refused("split-digits", "--out", tmp_path, *TINY, "--seeds", "2-3")


def test_a_run_that_was_killed_before_its_last_report_writes_it(tmp_path, capsys, in_this_process):
    out = tmp_path / "out"
    assert train(out, "--seeds", "0-2") == 0
    before = (out / "summary.json").read_bytes()
    part = json.loads((out / "seed-0" / "metrics.json").read_text())
    part["matrix"][1] = [None, None]
    (out / "seed-0" / "metrics.json").write_text(json.dumps(part))
    (out / "seed-1" / "metrics.json").unlink()
    capsys.readouterr()
    assert train(out, "--seeds", "0-2", "--resume") == 0
    assert "1 of 3 runs are finished already\n" in capsys.readouterr().err
    assert (out / "summary.json").read_bytes() == before


def test_what_can_t_be_a_runs_folder_is_found_before_any_run_begins(tmp_path, monkeypatch, refused, capsys):
    assert train(tmp_path / "seed-0", "--seed", "0") == 0
    capsys.readouterr()
    (tmp_path / "seed-2").mkdir()
    (tmp_path / "seed-2" / "notes.txt").touch()
    monkeypatch.setattr(several.subprocess, "Popen", None)
    words = ["split-digits", "--out", tmp_path, *TINY, "--seeds", "0-2", "--resume"]
    assert "seed-2 is not empty" in refused(*words)


def test_what_all_runs_would_be_refused_is_told_once_and_starts_none(tmp_path, refused, monkeypatch):
    monkeypatch.setattr(several.subprocess, "Popen", None)
    own = tmp_path / "mine.py"
    own.write_text(DATA + "def none(**settings): pass\n")
    digits, out = ["split-digits", *TINY], tmp_path / "deep" / "out"
    for words, why in [
        (["split-mnist", "--seeds", "0-999"], "none of the 1000 runs can begin: split-mnist needs its data: give the"),
        (
            [*digits, "--seeds", "0-2", "--scenario", f"{own}:none"],
            "none of the 3 runs can begin: scenario mine.py:none must return",
        ),
        (
            [*digits, "--grid", "method.beta=0,1", "--network", f"{own}:none"],
            "none of the 2 runs can begin: network mine.py:none must return",
        ),
        (
            [*digits, "--grid", "target.name=zenkenet,resnet20", "--scenario", f"{own}:tasks"],
            "none of the 2 runs can begin: target.name=zenkenet (target zenkenet takes images",
        ),
        ([*digits, "--grid", "target.name=mlp,vgg"], "unknown target network 'vgg'; there are mlp, resnet20, zenkenet"),
    ]:
        assert why in refused(*words, "--out", out)
        assert not out.parent.exists()


def test_runs_that_go_on_have_the_folder_of_their_data(tmp_path, monkeypatch):
    """It is in each run's own configuration, and need not be given again."""
    own, out, started = tmp_path / "mine.py", tmp_path / "out", []
    own.write_text(DATA + "def in_folder(data_dir):\n    return tasks() if data_dir.is_dir() else None\n")
    words = ["--scenario", f"{own}:in_folder"]
    assert train(out / "seed-0", *words, "--seed", "0", "--data-dir", str(tmp_path)) == 0
    for path in (out / "seed-0").iterdir():
        if path.name != "config.toml":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    monkeypatch.setattr(several, "_trained", lambda arguments, out, runs, *_: started.extend(runs) or {})
    assert train(out, *words, "--seeds", "0", "--resume") == 0
    assert [run.name for run in started] == ["seed-0"]


FOUND_LATE = """
from hypermask_fast.data import DatasetSplit

def found_late():
    split = DatasetSplit([(torch.zeros(8 if i < 30 else 9), i % 2) for i in range(40)])
    return Scenario("mine", (TaskData("0", split, None, split), TaskData("1", split, None, split)), (8,), 2)
"""


DATA = """
import torch
from hypermask_fast.data import Scenario, TaskData, TensorSplit

def tasks():
    def split():
        x = torch.randn(40, 8)
        return TensorSplit(x, (x[:, 0] > 0).long())
    return Scenario("mine", tuple(TaskData(str(t), split(), split(), split()) for t in range(2)), (8,), 2)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_control_c_stops_all_runs_which_save_where_they_are(tmp_path):
    out = tmp_path / "out"
    words = [sys.executable, "-m", "hypermask_fast", "train", "split-digits", "--out", str(out), *TINY]
    words += ["--set", "training.iterations=1000000", "--set", "training.log_every=1", "--seeds", "0-2", "--jobs", "2"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    rows = [out / f"seed-{seed}" / "log.csv" for seed in (0, 1)]
    until = time.monotonic() + 100
    while not all(path.exists() and len(path.read_text().splitlines()) > 1 for path in rows):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == (
        "hypermask-fast: interrupted: 0 of 3 runs are finished; the same command with --resume goes on"
    )
    for seed in (0, 1):
        assert json.loads((out / f"seed-{seed}" / "checkpoint.json").read_text())["state"]["iteration"] > 0
    assert not (out / "seed-2").exists(), "no other one is begun"


def test_threads_are_divided_unless_the_environment_says_how_many(tmp_path, monkeypatch):
    started = []

    class Process:
        returncode, stderr = 0, ()

        def __init__(self, words, env, **_):
            started.append((words, env.get("OMP_NUM_THREADS")))

        def poll(self):
            return 0

    monkeypatch.setattr(several.subprocess, "Popen", Process)
    monkeypatch.setattr(several.torch, "get_num_threads", lambda: 9)
    assert train(tmp_path / "a", "--seeds", "0-2", "--jobs", "8") == 0
    assert [threads for _, threads in started] == ["1"] * 3
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert train(tmp_path / "b", "--seeds", "0-2", "--jobs", "8") == 0
    assert [threads for _, threads in started[3:]] == ["3"] * 3, "no more processes than runs"
    assert train(tmp_path / "c", "--seeds", "0-2") == 0
    assert [threads for _, threads in started[6:]] == [None] * 3
    assert started[0][0][-2:] == ["--set", "seed=0"]


def test_bad_input_starts_nothing(tmp_path, refused):
    words = ["split-digits", "--out", tmp_path / "out", *TINY]
    for more, message in [
        (["--seeds", "4-0"], "the range 4-0 is empty"),
        (["--seeds", ""], "--seeds takes whole numbers"),
        (["--seeds", "0-1", "--seed", "1"], "leave --seed out"),
        (["--seeds", "0-1", "--set", "seed=1"], "leave --seed out"),
        (["--seeds", "0-1", "--jobs", "0"], "--jobs must be 1 or more, not 0"),
        (["--seeds", "0-1", "--jobs", "-3"], "--jobs must be 1 or more, not -3"),
        (["--jobs", "2"], "--jobs is for several runs"),
        (["--grid", "method.beta=1,1"], "1 is named twice"),
        (["--grid", "method.beta=1,1.0"], "give the same numbers"),
        (["--grid", "method.sparsity=0,500"], "from 0 to 100, not 500"),
        (["--grid", "training.epochs=1,2"], "--grid training.epochs and --set training.iterations: give one of them"),
        (["--grid", "target.hidden=[4],[8]"], "--grid target.hidden and --set target.hidden: give one of them"),
        (["--seeds", "0-1", "--resume"], "holds none of these runs"),
        (["--seeds", "0-1", "--scenario", "not-there.py:f"], "there is no file"),
    ]:
        assert message in refused(*words, *more)
        assert not (tmp_path / "out").exists()


def test_folders_in_use_are_left_alone(tmp_path, refused, capsys):
    out = tmp_path / "out"
    assert train(out, "--seed", "0") == 0
    capsys.readouterr()
    words = ["split-digits", "--out", out, *TINY]
    assert "already holds a run" in refused(*words, "--seeds", "0-1")
    several_runs = tmp_path / "several"
    several_runs.mkdir()
    os.rename(out, several_runs / "seed-0")
    words = ["split-digits", "--out", several_runs, *TINY]
    assert "already holds such runs: go on with them by --resume" in refused(*words, "--seeds", "0-1")
    assert "is not empty" in refused(*words, "--seeds", "2-3")
    line = refused(*words, "--seeds", "0-1", "--resume", "--set", "method.beta=5")
    assert "method.beta=5 contradicts the run in" in line and not (several_runs / "seed-1").exists()


def test_several_processes_that_torchrun_has_started(tmp_path, monkeypatch, refused):
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "x",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    assert "leave torchrun out" in refused("split-digits", "--out", tmp_path / "out", "--seeds", "0-1")
