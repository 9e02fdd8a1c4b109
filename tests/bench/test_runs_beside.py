"""`python -m bench.runs_beside`: times of runs by the command line, taken from their logs."""

import csv
import sys
from contextlib import contextmanager

import pytest

from bench import runs_beside

# Stands for `hypermask-fast train`: a row per ten steps, each of which takes a hundredth of a second.
_RUN = """
import sys, time, pathlib
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
out.mkdir()
with open(out / "log.csv", "w") as log:
    print("task,iteration", file=log, flush=True)
    for iteration in range(10, {last} + 1, 10):
        time.sleep(0.1)
        print(f"0,{{iteration}}", file=log, flush=True)
time.sleep({then})
"""


def stand_in(monkeypatch, last, then):
    started, popen = [], runs_beside.subprocess.Popen

    def run(words, **how):
        assert words[1:5] == ["-m", "hypermask_fast", "train", "split-mnist"]
        started.append(popen([sys.executable, "-c", _RUN.format(last=last, then=then), *words[4:]], **how))
        return started[-1]

    monkeypatch.setattr(runs_beside.subprocess, "Popen", run)
    return started


def test_steps_are_timed_from_the_log_and_the_run_is_ended(monkeypatch, tmp_path):
    started = stand_in(monkeypatch, last=40, then=60)
    assert 9 < runs_beside.step_ms("split-mnist", tmp_path, 30, tmp_path) < 100  # 10, and more on a loaded machine
    assert started[0].poll() is not None


def test_a_run_that_ends_too_early_is_told(monkeypatch, tmp_path):
    stand_in(monkeypatch, last=20, then=0)
    with pytest.raises(RuntimeError, match="ended before iteration 40"):
        runs_beside.step_ms("split-mnist", tmp_path, 30, tmp_path)


def test_rows_tell_of_runs_alone_and_beside(monkeypatch, tmp_path):
    beside = []

    @contextmanager
    def busy(count):
        beside.append(count)
        yield

    times = iter([10.0, 21.0, 12.0, 30.0, 11.0, 22.0])
    monkeypatch.setattr(runs_beside, "busy", busy)
    monkeypatch.setattr(runs_beside, "step_ms", lambda *_: next(times))
    words = [
        "split-mnist",
        "--data-dir",
        str(tmp_path),
        "--runs",
        "3",
        "--beside",
        "2",
        "--csv",
        str(tmp_path / "f.csv"),
    ]
    assert runs_beside.main(words) == 0
    assert beside == [0, 2, 0, 2, 0, 2]
    with (tmp_path / "f.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = [(int(row["beside"]), float(row["step_ms"]), round(float(row["of_alone"]), 2)) for row in rows]
    assert found == [(0, 10, 0.91), (0, 12, 1.09), (0, 11, 1), (2, 21, 1.91), (2, 30, 2.73), (2, 22, 2)]
