"""Runs that are killed, stopped or read at any moment end with the same files as one that was left alone."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.launching import Running, command

from hypermask_fast.training import report
from hypermask_fast.training.run import load_run

ITERATIONS, TASKS, KILLS = 150, 5, 5


def start(run_dir: Path, *options: str, checkpoint_every: int = 10) -> Running:
    settings = [
        f"training.iterations={ITERATIONS}",
        f"training.checkpoint_every={checkpoint_every}",
        "training.log_every=20",
    ]
    words = [] if options else [word for setting in settings for word in ("--set", setting)]
    return command("train", "split-digits", "--out", run_dir, *words, *options)


def finish(process: Running) -> None:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors


def steps_saved(run_dir: Path) -> int:
    try:
        state = json.loads((run_dir / "checkpoint.json").read_text())["state"]
    except FileNotFoundError:
        return -1
    return state["task"] * ITERATIONS + state["iteration"]


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "left alone"
    finish(start(folder))
    return folder


def test_killed_five_times(tmp_path, left_alone):
    killed = tmp_path / "killed"
    moments = sorted(random.sample(range(0, TASKS * ITERATIONS - 20), KILLS))
    print("killed once these steps were saved:", moments)  # shown when the test fails
    process = start(killed)
    for moment in moments:
        while steps_saved(killed) < moment:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.002)
        time.sleep(random.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        process.communicate()
        process = start(killed, "--resume")
    finish(process)
    assert_same_files(killed, left_alone)


def assert_same_files(run_dir: Path, left_alone: Path) -> None:
    for name in ("metrics.json", "accuracy_matrix.csv", "log.csv", "config.toml"):
        assert (run_dir / name).read_bytes() == (left_alone / name).read_bytes(), name
    leftovers = {path.name for path in run_dir.iterdir()} - {path.name for path in left_alone.iterdir()}
    assert not leftovers


def test_stopped_by_signals(tmp_path, left_alone):
    """Each time a checkpoint is saved at once, where the run then goes on; the exit code names the signal."""
    run_dir = tmp_path / "run"
    process = start(run_dir)
    for number, moment in ((signal.SIGTERM, 0), (signal.SIGINT, 200), (signal.SIGHUP, 333), (signal.SIGTERM, 450)):
        while steps_saved(run_dir) < moment:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.002)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 128 + number
        last = errors.splitlines()[-1]
        told = re.fullmatch(
            r"hypermask-fast: interrupted: stopped at task (\d) \(digits \d, \d\), iteration (\d+), which is saved; "
            "the same command with --resume goes on",
            last,
        )
        assert told and "Traceback" not in errors, errors
        assert steps_saved(run_dir) == int(told[1]) * ITERATIONS + int(told[2]) >= moment
        process = start(run_dir, "--resume")
    finish(process)
    assert_same_files(run_dir, left_alone)


def test_what_a_kill_left_of_files_goes_with_the_next_start(tmp_path, left_alone):
    run_dir = shutil.copytree(left_alone, tmp_path / "run")
    written = (*report.FILES, "config.toml", "log.csv")
    for name in (*written, "mine"):
        (run_dir / f".{name}.123.partial").write_text("half")
    (run_dir / ".lock").write_text("123 elsewhere\n")
    finish(start(run_dir, "--resume"))
    assert [path.name for path in run_dir.iterdir() if path.name.startswith(".")] == [".mine.123.partial"]


def test_read_while_it_trains(tmp_path):
    """Evaluation finds a whole model at every moment, though each step replaces the checkpoint, and kills stop it."""
    process, loads, learned = start(tmp_path / "run", checkpoint_every=1), 0, []
    try:
        while not (tmp_path / "run" / "metrics.json").exists():
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.05)
        for stopped in (False, True, False):
            if stopped:
                process.kill()
                process.communicate()
            for _ in range(10):
                _, model, scenario = load_run(tmp_path / "run")
                assert all(value.isfinite().all() for value in model.parameters())
                learned.append(len(scenario.tasks))
                loads += process.poll() is None
            if stopped:
                process = start(tmp_path / "run", "--resume")
    finally:
        process.kill()
        process.communicate()
    assert learned == sorted(learned) and learned[0] >= 1
    assert loads > 5, "read while it trained"


# Evaluates again and again until its standard input ends; prints how often, and fails at the first failure.
EVALUATING = """
import contextlib, io, sys, threading
from hypermask_fast import cli
ended = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
times = 0
while not ended.is_set():
    with contextlib.redirect_stdout(io.StringIO()) as table:
        code = cli.main(["evaluate", sys.argv[1], "--device", "cpu"])
    if code != 0 or "mean" not in table.getvalue():
        sys.exit(f"evaluation {times}: exit code {code}, {table.getvalue()!r}")
    times += 1
    print(times, flush=True)
    ended.wait(0.3)
"""


def test_killed_and_taken_up_by_two_while_another_process_evaluates(tmp_path, left_alone):
    """The reader never fails, one of two that resume at once goes on, and the files are those of a run left alone."""
    run_dir = tmp_path / "run"
    process = start(run_dir)
    while not (run_dir / "metrics.json").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)
    command = [sys.executable, "-c", EVALUATING, str(run_dir)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    reader = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes)
    try:
        assert reader.stdout.readline() == "1\n", reader.communicate()[1]
        process.kill()
        process.communicate()
        process, told = the_one_that_goes_on(start(run_dir, "--resume"), start(run_dir, "--resume"))
        assert not told or (told.count("\n") == 1 and "is in use by process" in told), told
        assert reader.stdout.readline() == "2\n", "it evaluates beside the run that has been taken up"
        finish(process)
        reader.stdin.close()
        reader.stdin = None
        _, errors = reader.communicate(timeout=120)
        assert reader.returncode == 0, errors
    finally:
        for child in (process, reader):
            child.kill()
            child.communicate()
    assert_same_files(run_dir, left_alone)


def the_one_that_goes_on(*processes: Running) -> tuple[Running, str]:
    """Of two processes the one that is not refused, and what the other one said; "" where that came too late."""
    while all(process.poll() is None for process in processes):
        time.sleep(0.005)
    ended, other = sorted(processes, key=lambda process: process.poll() is None)
    _, told = ended.communicate()
    assert ended.returncode in (0, 2), told
    return other, told if ended.returncode == 2 else ""
