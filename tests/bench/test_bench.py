"""Turns and workers: wrong results get no time, workers may fail or be late, settings are alike."""

import io
import json
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from bench import machine, op_case, pool, registry, steps, worker
from bench import runner as runner_module
from bench.case import OURS, Case
from bench.op_run import OpRun, uniform
from bench.runner import Plan, Runner, quantiles
from hypermask_fast.threads import HOW_TO_WAIT, WAITING

CPU = torch.device("cpu")


class Local:
    """A worker in this process, in place of one over pipes."""

    def __init__(self, device, threads, malloc, patience, own):
        self.worker, self.waiting, self.broken = worker.Worker(device), [], False

    def send(self, command, **arguments):
        self.waiting.append(worker.answer(self.worker, {"do": command, **arguments}))

    def answer(self):
        reply = self.waiting.pop(0)
        self.broken |= reply.get("broken", False)
        if "error" in reply:
            raise runner_module.Failed(reply["error"])
        return reply

    def ask(self, command, **arguments):
        self.send(command, **arguments)
        return self.answer()

    def alive(self):
        return not self.broken

    def close(self):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


def squares(contender, device):
    """Sums of squares: right, right but for rounding, wrong by a percent, and failing."""
    x = uniform(1000).to(device)
    functions = {
        "reference": lambda: x.double().square().sum(),
        OURS: lambda: x.square().sum(),
        "peer": lambda: x.dot(x),
        "wrong": lambda: 1.01 * x.square().sum(),
        "broken": lambda: x.view(7, 7),
    }
    return OpRun([lambda: {"sum": functions[contender]()}])


@pytest.mark.parametrize("isolated", [False, True])
def test_a_wrong_contender_gets_no_time(monkeypatch, capsys, isolated):
    case = Case(
        "squares", "squares", None, "", (OURS, "peer", "wrong", "broken"), squares, lambda: (4e3, 2e3),
        lambda name: 1e-4, isolated=isolated,
    )  # fmt: skip
    monkeypatch.setattr(runner_module, "Process", Local)
    monkeypatch.setattr(registry, "find", lambda *args: case)
    monkeypatch.setattr(worker.machine, "rates", lambda device, quick: {"bandwidth": 1e9, "float32": 1e9})
    plan = Plan(CPU, 1, True, ("as shipped",), turns=3, seconds=0.01, most=4, command="test")
    rows = list(Runner(plan).rows([case]))
    assert [row.contender for row in rows] == [OURS, "peer"]
    said = capsys.readouterr().err
    assert "wrong is WRONG and gets no time" in said and "broken is left out: RuntimeError" in said
    ours, peer = rows
    assert ours.ratio == 1 and peer.ratio == peer.median_ms / ours.median_ms
    assert ours.p20_ms <= ours.median_ms <= ours.p80_ms and ours.repeats >= 3
    assert ours.floor_ms == pytest.approx(4e-3) and ours.floor_ratio == ours.median_ms / ours.floor_ms
    assert (ours.peak_memory is not None) == isolated


def test_a_device_that_is_lost_gets_a_new_process(monkeypatch, capsys):
    """After a fault in a kernel every later call fails too: the case after it must not be told so."""
    case = Case("squares", "squares", None, "", (OURS, "broken"), squares, lambda: (4e3, 2e3), lambda name: 1e-4)
    made, lost = [], iter([True, False])
    monkeypatch.setattr(runner_module, "Process", lambda *args: made.append(Local(*args)) or made[-1])
    monkeypatch.setattr(registry, "find", lambda *args: case)
    monkeypatch.setattr(worker.machine, "device_lost", lambda: next(lost))
    monkeypatch.setattr(worker.machine, "rates", lambda device, quick: {"bandwidth": 1e9, "float32": 1e9})
    plan = Plan(CPU, 1, True, ("as shipped",), turns=1, seconds=0.01, most=2, command="test")
    rows = list(Runner(plan).rows([case, case]))
    assert len(made) == 2 and [row.contender for row in rows] == [OURS, OURS]
    assert capsys.readouterr().err.count("broken is left out: RuntimeError") == 2


def test_a_worker_whose_device_is_lost_ends(monkeypatch):
    monkeypatch.setattr(worker.machine, "device_lost", lambda: True)
    answers = io.StringIO()
    worker.serve(io.StringIO('{"do": "nothing"}\n{"do": "release"}\n'), answers, CPU)
    assert json.loads(answers.getvalue()) == {"error": "ValueError: unknown command 'nothing'", "broken": True}


def process_of(monkeypatch, code, patience=None, malloc="as shipped"):
    """A `pool.Process` that runs some other code in place of the worker."""
    popen = subprocess.Popen
    monkeypatch.setattr(pool.subprocess, "Popen", lambda command, **rest: popen([sys.executable, "-c", code], **rest))
    return pool.Process(CPU, 1, malloc, patience)


@pytest.mark.parametrize("malloc", machine.MALLOC)
def test_every_contender_has_the_same_allocator_settings(monkeypatch, malloc):
    """Whatever the shell says, of huge pages too; what ours sets by itself under "as shipped" is in its rows."""
    names = ("GLIBC_TUNABLES", "THP_MEM_ALLOC_ENABLE", *HOW_TO_WAIT)
    for name in names:
        monkeypatch.setenv(name, "glibc.malloc.check=0")
    code = f"import json, os; print(json.dumps({{name: os.environ.get(name) for name in {names}}}))"
    with process_of(monkeypatch, code, malloc=malloc) as process:
        found = process.answer()
    if malloc == "as shipped":
        assert set(found.values()) == {None} and machine.malloc_setting(malloc) == ""
    else:
        assert found["THP_MEM_ALLOC_ENABLE"] is None and "trim_threshold" in found["GLIBC_TUNABLES"]
        setting = {"GLIBC_TUNABLES": found["GLIBC_TUNABLES"], **WAITING}
        assert {name: value for name, value in found.items() if value} == setting
        assert machine.malloc_setting(malloc) == " ".join(f"{name}={value}" for name, value in setting.items())
    case = registry.find("split-mnist/task0", CPU, True)
    assert "tune_allocator" in case.allocator(OURS) and case.allocator("batched torch") == ""


def test_no_case_is_begun_after_the_limit(monkeypatch, capsys):
    case = Case("squares", "squares", None, "", (OURS,), squares, lambda: (4e3, 2e3), lambda name: 1e-4)
    monkeypatch.setattr(runner_module, "Process", Local)
    monkeypatch.setattr(registry, "find", lambda *args: case)
    monkeypatch.setattr(worker.machine, "rates", lambda device, quick: {"bandwidth": 1e9, "float32": 1e9})
    plan = Plan(CPU, 1, True, ("as shipped",), turns=1, seconds=0.01, most=2, limit=60.0, command="test")
    runner = Runner(plan)
    measured = runner.rows([case, case])
    assert next(measured).contender == OURS
    runner.end -= 60
    assert list(measured) == [] and "squares: not begun: 60 s are over" in capsys.readouterr().err


def test_a_worker_that_does_not_answer_is_killed(monkeypatch):
    with process_of(monkeypatch, "import time; time.sleep(60)", patience=0.2) as process:
        with pytest.raises(pool.Failed, match="no answer within 0.2 s"):
            process.ask("describe")
        assert not process.alive()


def test_a_worker_that_has_died_is_left_behind(monkeypatch):
    with process_of(monkeypatch, "import sys; sys.exit(3)") as process:
        while process.alive():
            time.sleep(0.01)
        process.send("prepare", case="much that nobody reads")
        with pytest.raises(pool.Failed, match="ended with code 3"):
            process.ask("describe")


def test_passes_over_the_dense_layer_are_timed_several_in_a_row_on_a_gpu(monkeypatch):
    """Else their Python, some 60 us of 1.2 ms, is in the sample."""
    made = []
    monkeypatch.setattr(op_case.OpCase, "run", lambda *args, **rest: made.append(OpRun([lambda: {}])) or made[-1])
    monkeypatch.setattr(op_case.OpCase, "inputs", lambda *args, **rest: (torch.ones(2),) * 10)
    eager = registry.select(["hypernet_adam", "output_drift"], torch.device("cuda"), False)
    assert [case.name for case in eager if "multiply-adds" in case.contenders] == [
        "hypernet_adam/40",
        "hypernet_adam/100",
    ]
    assert len(eager) == 5
    for case in eager:
        for contender in case.contenders:
            assert case.build(contender, torch.device("cuda")).calls >= 10
            assert case.build(contender, CPU).calls == 1


class Driver:
    """Stands in for NVIDIA's; it knows one graph, of 7 nodes."""

    @staticmethod
    def cuGraphGetNodes(graph, nodes, count):
        count._obj.value = 7
        return 0 if graph.value == 1234 and nodes is None else 1


def test_nodes_of_a_graph_are_counted_by_the_driver(monkeypatch):
    graph = SimpleNamespace(raw_cuda_graph=lambda: 1234)
    monkeypatch.setattr(steps.ctypes, "CDLL", lambda name: Driver)
    assert steps.graph_nodes(graph) == 7
    assert steps.graph_nodes(SimpleNamespace(raw_cuda_graph=lambda: 99)) is None
    assert steps.graph_nodes(SimpleNamespace()) is None  # of a PyTorch without kept graphs

    def none_here(name):
        raise OSError(name)

    monkeypatch.setattr(steps.ctypes, "CDLL", none_here)
    assert steps.graph_nodes(graph) is None


def test_a_captured_steps_nodes_are_printed_with_the_time_of_one(monkeypatch, capsys):
    def build(contender, device):
        run = squares(contender, device)
        run.nodes = 5 if contender == OURS else None
        return run

    case = Case("squares", "squares", None, "", (OURS, "peer"), build, lambda: (4e3, 2e3), lambda name: 1e-4)
    monkeypatch.setattr(runner_module, "Process", Local)
    monkeypatch.setattr(registry, "find", lambda *args: case)
    monkeypatch.setattr(worker.machine, "rates", lambda device, quick: {"bandwidth": 1e9, "float32": 1e9})
    plan = Plan(CPU, 1, True, ("as shipped",), turns=3, seconds=0.01, most=4, command="test")
    ours, _ = Runner(plan).rows([case])
    said = capsys.readouterr().err
    assert f"squares: {OURS}: 5 graph nodes, {1e3 * ours.median_ms / 5:.2f} us per node" in said
    assert said.count("graph nodes") == 1


def test_quantiles():
    assert quantiles([5.0]) == (5.0, 5.0, 5.0)
    assert quantiles([float(i) for i in range(11)]) == (2.0, 5.0, 8.0)
