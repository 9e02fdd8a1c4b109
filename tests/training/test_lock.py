"""Two of a kind in one folder: one trains, the other is told who does. The dead hold nothing."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from support.launching import Running, command
from support.networks import blob_model, blob_scenario

from hypermask_fast import InputError
from hypermask_fast.training import lock
from hypermask_fast.training.config import TrainingConfig
from hypermask_fast.training.trainer import Trainer

ROOT = Path(__file__).parents[2]
HOLDING = """
import sys, time
from pathlib import Path
from hypermask_fast.training.lock import taken
with taken(Path(sys.argv[1])):
    print("taken", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds tmp_path until its standard input is closed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout.readline() == "taken\n"
    yield process
    process.kill()
    process.communicate()


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as caught, lock.taken(folder):
        pytest.fail("taken twice")
    return str(caught.value)


def test_another_process_is_named_until_it_ends(tmp_path, holder):
    told = f"is in use by process {holder.pid} on {socket.gethostname()}: wait until that has ended"
    assert told in refusal(tmp_path)
    assert told in refusal(tmp_path / ".." / tmp_path.name), "by any of its names"
    holder.communicate()
    with lock.taken(tmp_path):
        assert (tmp_path / lock.LOCK).read_text() == f"{os.getpid()} {socket.gethostname()}\n"
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_holds_nothing(tmp_path, holder):
    holder.kill()
    holder.wait()
    assert (tmp_path / lock.LOCK).exists(), "left behind"
    with lock.taken(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_blocks_of_one_thread_nest_and_other_threads_stay_out(tmp_path):
    told = []
    with lock.taken(tmp_path):
        with lock.taken(tmp_path):
            pass
        thread = threading.Thread(target=lambda: told.append(refusal(tmp_path)))
        thread.start()
        thread.join()
        assert f"process {os.getpid()} on" in told[0]
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_was_removed_as_it_was_opened_is_not_the_folder_s(tmp_path, monkeypatch):
    """Its last holder ends between our open and our flock: another process may have locked a new file since."""
    is_at, looked = lock._is_at, []

    def removed_at_first(descriptor, path):
        looked.append(path)
        if len(looked) == 1:
            path.unlink()
        return is_at(descriptor, path)

    monkeypatch.setattr(lock, "_is_at", removed_at_first)
    with lock.taken(tmp_path):
        assert len(looked) == 2
        thread_told = []
        thread = threading.Thread(target=lambda: thread_told.append(refusal(tmp_path)))
        thread.start()
        thread.join()
        assert thread_told


def test_a_file_system_without_locks_is_warned_about(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", unsupported)
    warned = pytest.warns(UserWarning, match=r"can't be locked \(Operation not supported\): let no other process")
    with warned, lock.taken(tmp_path):
        pass


def test_a_trainer_takes_its_folder(tmp_path, holder):
    def trainer():
        config = TrainingConfig(iterations=2)
        return Trainer(blob_model(1), blob_scenario(1), config, run_dir=tmp_path)

    before = sorted(tmp_path.iterdir())
    for resume in (False, True):
        with pytest.raises(InputError, match=f"in use by process {holder.pid}"):
            trainer().fit(resume)
    assert sorted(tmp_path.iterdir()) == before
    holder.communicate()
    trainer().fit()


# -- runs -------------------------------------------------------------------------------------------------------------


def train(folder: Path, seed: int, iterations: int = 30, *options: str) -> Running:
    settings = ["data.tasks=2", f"training.iterations={iterations}", "training.checkpoint_every=5"]
    words = [word for setting in settings for word in ("--set", setting)]
    return command("train", "split-digits", "--out", folder, "--seed", seed, *words, *options)


def refused(process: Running) -> str:
    out, line = process.communicate(timeout=300)
    assert (process.returncode, out) == (2, "")
    assert line.startswith("hypermask-fast: error: ") and line.count("\n") == 1
    return line


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ("config.toml", "metrics.json", "log.csv")}


def test_runs_started_at_once_in_one_folder(tmp_path):
    """As a shell's `&` or torchrun start them: one is the run, as if alone, and the others have changed nothing."""
    seeds = (0, 1, 0)
    runs = [train(tmp_path / "shared", seed) for seed in seeds]
    codes = [(process.wait(timeout=300), process) for process in runs]
    assert sorted(code for code, _ in codes) == [0, 2, 2]
    for code, process in codes:
        if code == 2:
            line = refused(process)
            assert "is in use by process" in line or "already holds a run" in line
    winner = seeds[[code for code, _ in codes].index(0)]
    alone = train(tmp_path / "alone", winner)
    assert alone.wait(timeout=300) == 0
    assert contents(tmp_path / "shared") == contents(tmp_path / "alone")
    assert {path.name for path in (tmp_path / "shared").iterdir()} == {p.name for p in (tmp_path / "alone").iterdir()}
    for process in (*runs, alone):
        process.communicate()


def test_beside_a_run_nobody_trains_but_anybody_reads(tmp_path):
    folder = tmp_path / "run"
    running = train(folder, 0, 150)
    try:
        while not (folder / "metrics.json").exists():
            assert running.poll() is None, running.communicate()
            time.sleep(0.01)
        running.send_signal(signal.SIGSTOP)  # so that it is not over before the others have come
        told = f"{folder} is in use by process {running.pid} on {socket.gethostname()}: wait until that has ended"
        others = [train(folder, 1), train(folder, 0, 150, "--resume")]
        reading = [command("evaluate", folder), command("export", folder, "--task", 0, "--to", tmp_path / "net")]
        assert all(told in refused(process) for process in others)
        for process in reading:
            assert process.wait(timeout=300) == 0, process.communicate()[1]
            process.communicate()
    finally:
        running.kill()
        running.communicate()
    resumed = train(folder, 0, 150, "--resume")
    assert resumed.wait(timeout=300) == 0, resumed.communicate()
    resumed.communicate()
    assert not (folder / ".lock").exists()


FORKING = """
import os, sys, time
from pathlib import Path
from hypermask_fast.training.lock import taken
with taken(Path(sys.argv[1])):
    if os.fork() == 0:
        os.close(1)
        time.sleep(600)
    print("taken", flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes that are forked")
def test_what_a_killed_process_has_forked_holds_nothing(tmp_path):
    """Such as a DataLoader's workers, which notice after seconds that they are alone."""
    command = [sys.executable, "-c", FORKING, str(tmp_path)]
    holder = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True
    )
    try:
        assert holder.stdout.readline() == "taken\n"
        assert "is in use" in refusal(tmp_path)
        holder.kill()
        holder.communicate()
        with lock.taken(tmp_path):
            pass
    finally:
        os.killpg(holder.pid, signal.SIGKILL)
