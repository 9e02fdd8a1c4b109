"""Every contender gives the numbers of the others, step for step, and every case passes its gate."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import gate, layer_ops, registry, steps
from bench.case import OURS
from bench.experiments import experiments, fill, quick

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


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
