"""Steps beside busy processes: rows of their own, and processes that are busy exactly as long as they should be."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from bench import gate, pool, registry
from bench import runner as runner_module
from bench.case import OURS, Case
from bench.machine import AS_SHIPPED
from bench.runner import Plan
from hypermask_fast.threads import WAITING

ROOT = Path(__file__).parents[2]


ABOUT = dict.fromkeys(
    ("machine", "device", "python", "torch", "library", "triton", "hypnettorch", "backend", "commit"), ""
)
ANSWERS = {
    "describe": ABOUT | {"cores": 2, "threads": 2},
    "rates": {"bandwidth": 1e9, "float32": 1e9},
    "release": {"peak_memory": 1},
    "warm": {},
}


class Worker:
    """Steps take 1 to 2 ms alone and 3 to 6 beside busy processes, the peer's ten times as long."""

    busy = 0
    made: ClassVar[list] = []

    def __init__(self, device, threads, malloc, patience, own):
        self.made.append((malloc, dict(own)))

    def send(self, command, **arguments):
        pass

    def answer(self):
        return {"result": {name: sketch.as_dict() for name, sketch in gate.sketches({"a": torch.ones(4)}).items()}}

    def ask(self, command, contender="", **arguments):
        if command != "turn":
            return ANSWERS[command]
        factor = (10 if contender == "peer" else 1) * (1 + Worker.busy)
        return {"ms": [1.0 * factor, 2.0 * factor]}

    def alive(self):
        return True

    def close(self):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


@contextmanager
def busy(count):
    Worker.busy = count
    yield
    Worker.busy = 0


def test_rows_beside_busy_processes(monkeypatch, capsys):
    case = Case(
        "e/task0", "e", 0, "", (OURS, "peer"), lambda *_: None, lambda: (1.0, 1.0), lambda name: 1e-3, isolated=True,
        environment=lambda contender: WAITING if contender == OURS else {}, allocator=lambda contender: "its own",
    )  # fmt: skip
    monkeypatch.setattr(runner_module, "Process", Worker)
    monkeypatch.setattr(runner_module, "busy", busy)
    monkeypatch.setattr(Worker, "made", [])
    plan = Plan(torch.device("cpu"), 2, True, (AS_SHIPPED, "tuned"), turns=3, beside=2, command="test")
    rows = list(runner_module.Runner(plan).rows([case]))
    found = [(row.case, row.experiment, row.contender, row.malloc, row.median_ms, row.ratio) for row in rows]
    expected = [
        (f"e/task0{where}", f"e{where}", name, malloc, slower * 1.5 * factor, slower)
        for malloc in (AS_SHIPPED, "tuned")
        for name, slower in ((OURS, 1.0), ("peer", 10.0))
        for where, factor in (("", 1), (" beside 2", 3))
    ]
    assert found == expected and {row.repeats for row in rows} == {6}
    assert capsys.readouterr().err.count("3.00 x alone, slowest turn 3.00 x") == 4


def test_as_shipped_each_program_waits_in_its_own_way():
    """Under "tuned" the environment says the same to all."""
    test_case = registry.find("split-mnist/task0", torch.device("cpu"), True)
    own = runner_module.Runner.own_variables
    assert own(test_case, AS_SHIPPED, OURS) == WAITING and own(test_case, AS_SHIPPED, "batched torch") == {}
    assert own(test_case, "tuned", OURS) == {}
    typed = " ".join(f"{name}={value}" for name, value in WAITING.items())
    assert runner_module.Runner.setting(test_case, AS_SHIPPED, OURS).startswith(f"{typed} hypermask_fast.")
    assert runner_module.Runner.setting(test_case, "tuned", OURS).endswith(typed)


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
    pid = int(done.stdout)
    stat, until = Path(f"/proc/{pid}/stat"), time.monotonic() + 30

    def runs() -> bool:
        return stat.exists() and ") Z " not in stat.read_text()

    while runs() and time.monotonic() < until:
        time.sleep(0.05)
    left = runs()
    if left:
        os.kill(pid, signal.SIGKILL)
    assert not left
