"""`python -m bench.smoke`: what is wrong is found and said, whatever becomes of the process that finds it."""

import os
import subprocess
import sys

import pytest
import torch

from bench import smoke
from bench.experiments import experiments
from hypermask_fast import ops
from hypermask_fast.ops import registry

CPU = torch.device("cpu")
ROOT = smoke.__file__.rsplit("/", 2)[0]


def test_every_op_and_experiment_is_looked_at(monkeypatch):
    monkeypatch.setattr(registry, "problem", lambda backend: "")  # a GPU with all of its backends
    names = smoke.checks(torch.device("cuda"))
    for op, entry in ops.OPS.items():
        wanted = {f"{op}/{name}" for name in ("cuda", "triton", "plain") if name in entry.offers}
        assert wanted == {name for name in names if name.startswith(f"{op}/")}
    assert {f"{name}/step" for name in experiments()} <= set(names) and len(names) == len(set(names))


def test_a_result_that_is_wrong_is_found(monkeypatch):
    assert smoke.fault("masked_linear/plain", CPU) == ""
    by_backend = smoke.by_backend
    monkeypatch.setattr(smoke, "by_backend", lambda *names: lambda *args: 1.001 * by_backend(*names)(*args))
    assert "off by" in smoke.fault("masked_linear/plain", CPU)


def test_a_step_that_is_wrong_is_found(monkeypatch):
    assert smoke.fault("split-mnist/step", CPU) == ""
    build = smoke.steps.build

    def wrong(experiment, task, contender, device):
        return build(experiment, task if contender == "reference" else 0, contender, device)

    monkeypatch.setattr(smoke.steps, "build", wrong)
    assert smoke.fault("split-mnist/step", CPU)


PROGRAM = """
import os, sys
from bench import smoke

def fault(check, device):
    if check == "b/x":
        raise ValueError("not this one")
    if check == "c/x":
        os._exit(9)
    return "y is off" if check == "e/x" else ""

smoke.fault = fault
smoke.checks = lambda device: ["a/x", "b/x", "c/x", "d/x", "e/x"]
run = smoke.subprocess.Popen
smoke.subprocess.Popen = lambda command, **rest: run([sys.executable, "-u", __file__, *command[4:]], **rest)
sys.exit(smoke.main(sys.argv[1:]))
"""


def test_a_process_that_dies_costs_the_check_at_which_it_did(tmp_path):
    file = tmp_path / "program.py"
    file.write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, str(file), "--device", "cpu"],
        capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": ROOT},
    )  # fmt: skip
    *said, total = done.stdout.splitlines()
    assert done.returncode == 1 and total == "smoke: 2 of 5 checks are right"
    assert sorted(said) == [
        "SMOKE b by x: ValueError: not this one",
        "SMOKE c by x: the process ended with code 9",
        "SMOKE e by x: y is off",
    ]


@pytest.mark.parametrize("code", [0, 1])
def test_a_check_that_no_process_begins_is_wrong(monkeypatch, code):
    popen = subprocess.Popen
    program = f"import sys; sys.exit({code})"
    monkeypatch.setattr(
        smoke.subprocess, "Popen", lambda command, **rest: popen([sys.executable, "-c", program], **rest)
    )
    found = list(smoke.found_by_processes(["a/x", "b/x"], CPU))
    assert [name for name, why in found if "before it began" in why] == ["a/x", "b/x"]
