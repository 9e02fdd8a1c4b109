"""The benchmarks themselves: wrong results get no time, peers agree, a quick run goes through, results can be read."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import bench.__main__
from bench import gate, machine, registry, results, steps, worker
from bench import runner as runner_module
from bench import table as table_module
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

    def __init__(self, device, threads, malloc):
        self.worker, self.waiting = worker.Worker(device), []

    def send(self, command, **arguments):
        self.waiting.append(worker.answer(self.worker, {"do": command, **arguments}))

    def answer(self):
        reply = self.waiting.pop(0)
        if "error" in reply:
            raise runner_module.Failed(reply["error"])
        return reply

    def ask(self, command, **arguments):
        self.send(command, **arguments)
        return self.answer()

    def alive(self):
        return True

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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["no-such-benchmark"], "there are split-mnist, permuted-mnist"),
        (["thresholds", "--without", "torch.sorted"], "there are ours, torch.sort"),
        (["thresholds", "--json", "{}/none/rows.json"], "none/rows.json: No such file or directory"),
        (["thresholds", "--csv", "{}"], ": Is a directory"),
        (["thresholds", "--csv", __file__], "is no results file of this version"),
        (["--turns", "0"], "argument --turns: must be 1 or more, not 0"),
        (["--device", "cuda"], "PyTorch sees no GPU"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_measured(monkeypatch, capsys, tmp_path, words, message):
    monkeypatch.setattr(bench.__main__, "Runner", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    try:
        code = bench.__main__.main([word.format(tmp_path) for word in words])
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forgets a process's peak")
def test_peak_memory_leaves_out_what_was_freed_before():
    """Freed by malloc, and kept by it: `tuned` is told to keep all."""
    program = (
        "import torch; from bench import worker; cpu = torch.device('cpu'); x = torch.ones(1 << 26); del x; "
        "before = worker.peak_memory(cpu); worker._reset_peak_memory(); print(before - worker.peak_memory(cpu))"
    )
    name, _, value = machine.MALLOC["tuned"].partition("=")
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=os.environ | {name: value}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 250e6  # of 268


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
    for use in (lambda: results.append([first], file), lambda: results.read(file)):
        with pytest.raises(ValueError, match="its columns are other, columns"):
            use()


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


def test_table_of_files_and_of_what_is_none(tmp_path, capsys):
    file = tmp_path / "m.csv"
    results.append([], file)
    assert file.read_text() == ""
    results.append([a_row()], file)
    assert table_module.main([str(file)]) == 0
    assert "e/task0" in capsys.readouterr().out
    (tmp_path / "other.csv").write_text("a,b\n")
    for name, message in (("none.csv", "none.csv: No such file or directory"), ("other.csv", "is no results file")):
        with pytest.raises(SystemExit) as ended:
            table_module.main([str(tmp_path / name)])
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
