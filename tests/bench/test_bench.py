"""The benchmarks themselves: wrong results get no time, workers may fail, peers agree."""

import io
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import gate, layer_ops, machine, op_case, pool, registry, steps, worker
from bench import runner as runner_module
from bench.case import OURS, Case
from bench.experiments import experiments, fill, quick
from bench.op_run import OpRun, uniform
from bench.runner import Plan, Runner, quantiles
from hypermask_fast.threads import HOW_TO_WAIT, WAITING

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


# -- the gate ---------------------------------------------------------------------------------------------------------


def errors_of(tensor, changed):
    verdict = gate.compare({"a": gate.sketch("a", tensor)}, {"a": gate.sketch("a", changed)}, lambda name: 1e-3)
    return verdict.worst * 1e-3


def test_sketch_measures_an_error_wherever_it_sits():
    tensor = uniform(300_001)
    assert errors_of(tensor, tensor) == 0
    spread = tensor * (1 + 1e-2 * uniform(300_001, seed=3).sign())
    assert 0.005 < errors_of(tensor, spread) < 0.02
    single = tensor.clone()
    single[-1] += 0.05 * tensor.norm()
    assert 0.02 < errors_of(tensor, single) < 0.1
    swapped = tensor.clone()
    swapped[[0, 200_000]] = tensor[[200_000, 0]]
    assert errors_of(tensor, swapped) > 1e-4


@pytest.mark.parametrize("wrong", [{}, {"a": torch.zeros(3)}, {"a": torch.full((4,), float("nan"))}])
def test_gate_refuses_what_is_missing_misshapen_or_not_a_number(wrong):
    expected = gate.sketches({"a": torch.ones(4)})
    verdict = gate.compare(expected, gate.sketches(wrong), lambda name: 1e-3)
    assert not verdict.ok and "a" in verdict.reason
    assert not gate.compare({}, {}, lambda name: 1e-3).ok


def test_a_tolerance_of_0_is_for_what_is_exact():
    counts, others = (gate.sketches({"a": torch.tensor(values)}) for values in ([3, 4], [3, 5]))
    assert gate.compare(counts, counts, lambda name: 0.0).ok
    assert "a is off" in gate.compare(counts, others, lambda name: 0.0).reason


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


# -- the contenders ---------------------------------------------------------------------------------------------------


@pytest.fixture
def default_dtype(request):
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


def contenders(experiment):
    pytest.importorskip("hypnettorch")
    made = {
        "hypnettorch": steps.hypnettorch(experiment, CPU),
        OURS: steps.library(experiment, CPU, captured=False),
        "batched torch": steps.batched(experiment, CPU),
    }
    specs = experiment.tensors()
    for _, pieces in made.values():
        assert pieces.keys() == specs.keys()
        fill(pieces, specs, moved=False)
    return made


def step_of(peer, x, y):
    loss = peer.step(x, y)
    return peer.last_loss() if hasattr(peer, "last_loss") else loss


def run_all(experiment, length, tolerance):
    """Every contender on the same batches, task after task; losses and all Parameters after every step."""
    made = contenders(experiment)
    for task in range(experiment.tasks):
        for peer, _ in made.values():
            peer.begin_task(task)
        for step, (x, y) in enumerate(experiment.batches(CPU, length)):
            losses = {name: step_of(peer, x, y) for name, (peer, _) in made.items()}
            for name, (_, pieces) in made.items():
                assert losses[name].item() == pytest.approx(losses["hypnettorch"].item(), rel=tolerance), (task, step)
                for key, piece in pieces.items():
                    theirs = made["hypnettorch"][1][key]
                    difference = piece.of(piece.parameter) - theirs.of(theirs.parameter)
                    size = theirs.of(theirs.parameter).norm()
                    assert difference.norm() <= tolerance * size, (name, key, task, step)


@pytest.mark.parametrize("default_dtype", [torch.float64], indirect=True)
@pytest.mark.parametrize("name", list(experiments()))
def test_float64_step_for_step(default_dtype, name):
    experiment = quick(experiments()[name])
    if len(experiment.sample) == 3:
        # A bias before batch norm has no gradient but rounding; the 1-norm of its drift would follow that one's sign.
        method = replace(experiment.config.method, lam=0.0)
        experiment = replace(experiment, config=replace(experiment.config, method=method))
    run_all(experiment, 5, 1e-7)


@pytest.mark.parametrize("default_dtype", [torch.float32], indirect=True)
@pytest.mark.parametrize("name", ["split-mnist", "permuted-mnist-chunked"])
def test_float32_first_steps(default_dtype, name):
    run_all(replace(quick(experiments()[name]), tasks=1), 3, 1e-4)


@pytest.mark.parametrize("case", registry.cases(CPU, True), ids=lambda case: case.name)
def test_every_cpu_case_passes_its_gate(case):
    """All contenders but torch.compile, which `test_quick_run` has: compiling takes seconds."""
    pytest.importorskip("hypnettorch")
    oracles = {}
    for contender in case.contenders:
        if contender == "torch.compile":
            continue
        oracle = case.reference(contender)
        if oracle and oracle not in oracles:
            oracles[oracle] = case.build(oracle, CPU).result()
        runnable = case.build(contender, CPU)
        result = runnable.result()
        if oracle:
            verdict = gate.compare(oracles[oracle], result, case.tolerance)
            assert verdict.ok, (contender, verdict)
        runnable.run()
    assert min(case.floor()) >= 0 and max(case.floor()) > 0


def test_convolutions_are_those_of_the_network():
    """ResNet-20 as the preset has it, each shape once; of ResNet-50 what is known of it."""
    experiment = experiments()["resnet20-k2"]
    found = {}

    def note(layer, args, output):
        (x,) = args
        found[(x.shape[1], output.shape[1], x.shape[-1], layer.kernel_size[0], layer.stride[0])] = layer

    with torch.device("meta"):
        net = experiment.network()
        for module in net.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.register_forward_hook(note)
        net(torch.empty(experiment.batch, *experiment.sample))
    shapes = [(c.inputs, c.outputs, c.side, c.kernel, c.stride) for c in layer_ops.resnet20()]
    assert shapes == list(found) and {c.batch for c in layer_ops.resnet20()} == {experiment.batch}
    large = layer_ops.resnet50()
    assert len(set(large)) == len(large) == 23
    assert {(c.inputs, c.outputs, c.side) for c in large if c.stride == 2} == {
        (3, 64, 224), (128, 128, 56), (256, 256, 28), (512, 512, 14), (256, 512, 56), (512, 1024, 28), (1024, 2048, 14),
    }  # fmt: skip
    names = [case.name for case in layer_ops.cases(False) if case.experiment == "masked_conv2d"]
    assert len(set(names)) == len(names) == 60


_IN_THE_INTERPRETER = """
import torch
from bench import gate, layer_ops, task_ops
from bench.case import Unavailable
dtype = torch.float32  # the interpreter's bfloat16 is wrong
for case in [*layer_ops.cases(quick=True, dtype=dtype), *task_ops.cases(quick=True, dtype=dtype)]:
    expected = case.build("reference", torch.device("cpu")).result()
    for contender in case.contenders:
        if contender == "ours cuda":
            try:
                case.build(contender, torch.device("cpu"))
            except Unavailable as why:
                assert "cuda backend" in str(why)
        elif contender != "torch.compile":
            runnable = case.build(contender, torch.device("cpu"))
            result = runnable.result()
            if case.reference(contender):
                verdict = gate.compare(expected, result, lambda name: 1e-5)
                assert verdict.ok, (case.name, contender, verdict)
            runnable.run()
print("all right")
"""


def test_gpu_cases_in_the_interpreter():
    """What runs on a GPU only is at least right: tiny shapes through Triton's interpreter."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _IN_THE_INTERPRETER], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == "all right", done.stderr
