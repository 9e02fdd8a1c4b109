"""Steps beside busy processes: rows of their own, and processes that are busy exactly as long as they should be."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import pool, results
from bench.case import OURS
from bench.machine import AS_SHIPPED
from hypermask_fast.threads import WAITING

ROOT = Path(__file__).parents[2]


def test_rows_beside_busy_processes(tmp_path):
    file = tmp_path / "results.csv"
    command = [sys.executable, "-m", "bench", "permuted-mnist-chunked/task2", "--quick", "--device", "cpu"]
    command += ["--threads", "1", "--malloc", AS_SHIPPED, "tuned", "--csv", str(file), "--beside", "1"]
    command += ["--without", "torch.compile", "hypnettorch", "batched torch", f"{OURS} in any loop"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = results.read(file)
    alone, beside = "permuted-mnist-chunked/task2", "permuted-mnist-chunked/task2 beside 1"
    contenders, settings = (OURS, "plain network"), (AS_SHIPPED, "tuned")
    expected = [(where, name, malloc) for malloc in settings for name in contenders for where in (alone, beside)]
    assert list(zip(rows.case, rows.contender, rows.malloc, strict=True)) == expected
    assert set(rows.experiment[rows.case == beside]) == {"permuted-mnist-chunked beside 1"}
    assert (rows.median_ms > 0).all() and (rows.ratio[rows.contender == OURS] == 1).all()
    chosen = rows.malloc_setting.str.contains(f"GOMP_SPINCOUNT={WAITING['GOMP_SPINCOUNT']} ")
    assert (chosen == ((rows.contender == OURS) | (rows.malloc == "tuned"))).all()  # what each one's program ships
    assert f"{beside}: {OURS}: " in done.stderr and "x alone, slowest turn" in done.stderr


def test_they_are_busy_for_the_blocks_time(monkeypatch):
    started, popen = [], subprocess.Popen
    monkeypatch.setattr(
        pool.subprocess, "Popen", lambda *args, **rest: started.append(popen(*args, **rest)) or started[-1]
    )
    with pytest.raises(KeyboardInterrupt), pool.busy(2):
        assert len(started) == 2 and [process.poll() for process in started] == [None, None]
        raise KeyboardInterrupt
    assert [process.returncode for process in started] == [-signal.SIGKILL] * 2


_LEFT_BEHIND = """
import os
from bench import pool
popen = pool.subprocess.Popen
def tell(*args, **rest):
    process = popen(*args, **rest)
    print(process.pid, flush=True)
    return process
pool.subprocess.Popen = tell
with pool.busy(1):
    os._exit(0)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_they_end_with_the_process_that_wanted_them():
    done = subprocess.run([sys.executable, "-c", _LEFT_BEHIND], cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=60)
    stat = Path(f"/proc/{int(done.stdout)}/stat")
    until = time.monotonic() + 30
    while stat.exists() and ") Z " not in stat.read_text() and time.monotonic() < until:
        time.sleep(0.05)
    assert not stat.exists() or ") Z " in stat.read_text()  # ended, whether or not somebody has noticed
