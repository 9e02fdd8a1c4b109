"""bench/micro: it runs, every op is in it, what is wrong is not timed, and its tables say what was measured."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench.micro import shapes, table, timing
from bench.op_case import BOTH, FORWARD, calling
from hypermask_fast.ops import OPS

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def run(*arguments, folder=ROOT):
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider", "bench/micro", *arguments]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["OMP_NUM_THREADS"] = "1"
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_every_benchmark_of_the_smallest_shape_runs():
    done = run("--benchmark-disable", "-q", "-k", "tiny or test_call")
    assert done.returncode == 0, done.stdout
    assert "failed" not in done.stdout and "passed" in done.stdout


def test_results_as_pytest_benchmark_and_the_table_have_them(tmp_path, capsys):
    file = tmp_path / "results.json"
    words = ("--benchmark-only", f"--benchmark-json={file}", "--benchmark-max-time=0.001", "--benchmark-min-rounds=2")
    done = run(*words, "-k", "(tiny and masked_weights-both) or (test_call and both and (F.linear or ops))")
    assert done.returncode == 0, done.stdout
    found = {(b["group"], *b["params"].values()): b for b in json.loads(file.read_text())["benchmarks"]}
    cpu = found["masked_weights, tiny, both, cpu", "tiny", "masked_weights", "both", "cpu", "reference"]
    extra = cpu["extra_info"]
    assert extra["baseline"] == "reference" and extra["ratio"] == 1 and 0 <= extra["gate"] <= 1
    assert extra["floor_ratio"] == pytest.approx(cpu["stats"]["median"] / extra["floor_seconds"])
    assert extra["bytes"] == 4 * 8 * shapes.experiment("tiny").layout().size
    assert found["one call, both, cpu", "both", "cpu", "ops.masked_linear"]["extra_info"]["baseline"] == "F.linear"
    assert table.main([str(file)]) == 0
    printed = capsys.readouterr().out
    assert "### Ops, tiny" in printed and "| masked_weights | both | cpu |" in printed
    assert "### One call" in printed and "| both | cpu |" in printed
    with pytest.raises(SystemExit):
        table.main([str(ROOT / "pyproject.toml")])
    assert "pyproject.toml is no file of bench/micro's results" in capsys.readouterr().err


def test_every_op_has_a_case():
    assert set(shapes.cases("tiny")) == set(OPS)
    for shape in shapes.SHAPES:
        for case in shapes.cases(shape).values():
            assert all(min(case.floor(direction)) >= 0 < max(case.floor(direction)) for direction in case.work)


@pytest.mark.parametrize("part", ["result", "gradient"])
def test_what_is_wrong_is_not_timed(part):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, grad):
            return 1.01 * grad

    def wrong(*args):
        y = OPS["masked_linear"].definition(*args)
        return 1.01 * y if part == "result" else Wrong.apply(y)

    timed = []
    case, direction = shapes.cases("tiny")["masked_linear"], FORWARD if part == "result" else BOTH
    words = {"name": "wrong", "baseline": "wrong", "group": "wrong"}
    with pytest.raises(AssertionError, match="y is off by" if part == "result" else "grad/.* is off by"):
        timing.Timing()(timed.append, case, calling(wrong), direction, "cpu", **words)
    assert timed == []


def test_a_replay_counts_as_the_calls_in_it(monkeypatch):
    monkeypatch.setattr(timing.torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: 12.0))
    clock = timing.DeviceClock()
    clock.calls = 4
    assert clock() == 3.0
