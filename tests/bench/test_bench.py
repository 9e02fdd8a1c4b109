"""The benchmarks themselves: wrong results get no time, peers agree, a quick run goes through, results can be read."""

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import gate, pool, registry, results, steps, worker
from bench import runner as runner_module
from bench.case import OURS, Case
from bench.experiments import experiments, fill, quick
from bench.op_run import OpRun, uniform
from bench.plots import plot
from bench.runner import Plan, Runner, quantiles
from bench.table import growth, table

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


class Local:
    """A worker in this process, in place of one over pipes."""

    def __init__(self, device, threads, malloc, patience):
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
    assert (ours.peak_memory != "") == isolated


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


def process_of(monkeypatch, code, patience=None):
    """A `pool.Process` that runs some other code in place of the worker."""
    popen = subprocess.Popen
    monkeypatch.setattr(pool.subprocess, "Popen", lambda command, **rest: popen([sys.executable, "-c", code], **rest))
    return pool.Process(CPU, 1, "as shipped", patience)


def test_a_worker_that_does_not_answer_is_killed(monkeypatch):
    with process_of(monkeypatch, "import time; time.sleep(60)", patience=0.2) as process:
        with pytest.raises(pool.Failed, match="no answer within 0.2 s"):
            process.ask("describe")
        assert not process.alive()


def test_a_worker_that_has_died_is_left_behind(monkeypatch):
    with process_of(monkeypatch, "import sys; sys.exit(3)") as process:
        process._process.wait()
        process.send("prepare", case="much that nobody reads")
        with pytest.raises(pool.Failed, match="ended with code 3"):
            process.ask("describe")


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
        if oracle not in oracles:
            oracles[oracle] = case.build(oracle, CPU).result()
        runnable = case.build(contender, CPU)
        verdict = gate.compare(oracles[oracle], runnable.result(), case.tolerance)
        assert verdict.ok, (contender, verdict)
        runnable.run()
    assert min(case.floor()) >= 0 and max(case.floor()) > 0


_IN_THE_INTERPRETER = """
import torch
from bench import gate, gpu_cases, gpu_tasks
from bench.case import Unavailable
gpu_cases.DTYPE = gpu_tasks.DTYPE = torch.float32  # the interpreter's bfloat16 is wrong
for case in gpu_cases.cases(quick=True):
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


# -- a whole run, and what it leaves ----------------------------------------------------------------------------------


def test_quick_run(tmp_path):
    pytest.importorskip("hypnettorch")
    file, copy = tmp_path / "results.csv", tmp_path / "rows.json"
    names = ["permuted-mnist-chunked/task2", "thresholds"]
    command = [sys.executable, "-m", "bench", *names, "--quick", "--device", "cpu", "--threads", "1"]
    command += ["--malloc", "tuned", "--without", "torch.compile", "--csv", str(file), "--json", str(copy)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = results.read(file)
    steps_at = {(row.contender, row.task_index) for row in rows if row.experiment == "permuted-mnist-chunked"}
    assert steps_at == {(contender, 2) for contender in (OURS, "hypnettorch", "batched torch", "plain network")}
    assert {row.contender for row in rows if row.case == "thresholds"} > {OURS, "torch.kthvalue"}
    assert all(row.median_ms > 0 and row.malloc_setting.startswith("GLIBC_TUNABLES=") for row in rows)
    assert all((row.peak_memory != "") == (row.task_index != "") for row in rows)
    assert len(json.loads(copy.read_text())) == len(rows)
    assert "permuted-mnist-chunked/task2" in done.stdout and "torch.kthvalue" in done.stdout


def test_cases_come_in_the_order_of_the_names():
    """What is wanted most goes first, so that a run that is cut off has it."""
    names = ["thresholds", "permuted-mnist/task9", "permuted-mnist"]
    found = [case.name for case in registry.select(names, CPU, False)]
    assert found == ["thresholds", "permuted-mnist/task9", "permuted-mnist/task0", "permuted-mnist/task4"]


_WITHOUT_PACKAGES = """
import sys
for name in ("hypnettorch", "tomli_w", "sklearn", "PIL", "tqdm", "tensorboard", "matplotlib"):
    sys.modules[name] = None
import torch
from bench import __main__, dispatch, registry, table
assert len(registry.cases(torch.device("cuda"), False)) > 30
"""


def test_a_machine_with_torch_and_triton_alone_can_measure():
    """GPUs are often to be had without a network, on an image that is not ours."""
    pytest.importorskip("triton")
    subprocess.run([sys.executable, "-c", _WITHOUT_PACKAGES], cwd=ROOT, check=True)


def test_unknown_name_is_refused(capsys):
    from bench.__main__ import main

    assert main(["no-such-benchmark", "--device", "cpu"]) == 2
    assert "permuted-mnist" in capsys.readouterr().err


def a_row(**changes):
    values = dict.fromkeys(results.COLUMNS, "")
    values |= {"machine": "m-2-cores", "device": "M", "cores": 2, "threads": 2, "malloc": "tuned", "dtype": "float32"}
    values |= {"experiment": "e", "case": "e/task0", "task_index": 0, "contender": OURS, "date": "2026-01-01"}
    values |= {"median_ms": 1.5, "p20_ms": 1.25, "p80_ms": 2.0, "repeats": 9, "floor_ms": 0.5, "floor_ratio": 3.0}
    values |= {"bytes": 5.7e9, "flops": 12.0, "ratio": 1.0, "peak_memory": 10**9, "bandwidth": 6e10, "flop_rate": 2e11}
    return results.Row(**(values | {"gate": 0.25, "shapes": 'batch 8, "odd"', "command": "python -m bench"} | changes))


def test_csv_round_trip(tmp_path):
    file = tmp_path / "deep" / "m.csv"
    first, second = a_row(), a_row(task_index="", peak_memory="", ratio="", gate="", case="op", experiment="op")
    results.append([first], file)
    results.append([second], file)
    assert results.read(file) == [first, second]
    assert file.read_text().count("median_ms") == 1
    file.write_text("other,columns\n")
    with pytest.raises(ValueError, match="columns"):
        results.append([first], file)


def test_latest_table_and_plots(tmp_path):
    old, new = a_row(), a_row(date="2026-02-01", median_ms=1.25)
    assert results.latest([old, new]) == [new] == results.latest([new, old])
    peer = {"contender": "peer", "ratio": 4.0}
    rows = [new, a_row(case="e/task4", task_index=4, median_ms=2.0), a_row(**peer)]
    rows += [a_row(**peer, case="e/task4", task_index=4), a_row(**peer, case="op", experiment="op", task_index="")]
    text = table(rows)
    assert "e/task4" in text and "1.25" in text.splitlines()[1]
    assert growth(rows).splitlines()[1].endswith("1.60")
    file = tmp_path / "m.csv"
    results.append(rows, file)
    pictures = plot(file, tmp_path)
    assert sorted(picture.name for picture in pictures) == sorted(
        f"m-tuned-{kind}.{suffix}" for kind in ("step-time", "step-ratios", "op-ratios") for suffix in ("png", "svg")
    )
    assert all(picture.stat().st_size > 1000 for picture in pictures)
