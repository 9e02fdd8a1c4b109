"""A run killed at random steps, five times, ends with the same metrics.json as one that was left alone."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from hypermask_fast.training.run import load_run

ITERATIONS, TASKS, KILLS = 150, 5, 5


def start(run_dir: Path, *options: str, checkpoint_every: int = 10) -> subprocess.Popen:
    settings = [
        f"training.iterations={ITERATIONS}",
        f"training.checkpoint_every={checkpoint_every}",
        "training.log_every=20",
    ]
    command = [sys.executable, "-m", "hypermask_fast", "train", "split-digits", "--out", str(run_dir)]
    if not options:
        command += [word for setting in settings for word in ("--set", setting)]
    return subprocess.Popen(
        [*command, *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        text=True,
    )


def finish(process: subprocess.Popen) -> None:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors


def steps_saved(run_dir: Path) -> int:
    try:
        state = json.loads((run_dir / "checkpoint.json").read_text())["state"]
    except FileNotFoundError:
        return -1
    return state["task"] * ITERATIONS + state["iteration"]


def test_killed_five_times(tmp_path):
    left_alone, killed = tmp_path / "left alone", tmp_path / "killed"
    finish(start(left_alone))
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
    for name in ("metrics.json", "accuracy_matrix.csv", "log.csv", "config.toml"):
        assert (killed / name).read_bytes() == (left_alone / name).read_bytes(), name
    leftovers = {path.name for path in killed.iterdir()} - {path.name for path in left_alone.iterdir()}
    assert not leftovers


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
            for _ in range(20):
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
    assert loads > 10, "read while it trained"
