"""What holds for all native ops: opcheck, torch.compile, any number of threads, every instruction set."""

import shutil

import pytest
import torch
from op_arguments import NAMES, OFFSETS, arguments
from torch.library import opcheck

from hypermask_fast.ops import reference

pytestmark = pytest.mark.native


def op(name):
    return getattr(torch.ops.hypermask_native, name).default


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name):
    torch.use_deterministic_algorithms(False)  # opcheck runs the ops through inductor's own paths
    opcheck(op(name), arguments(grad=not name.endswith("backward"))[name])


def results_and_grads(step, inputs):
    """What step gives, in float32 scalars or tensors, and the gradient of every input that takes one."""
    inputs = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
    results = step(*inputs)
    sum(r.sum() for r in results).backward()
    return [*results, *(x.grad for x in inputs if x.requires_grad)]


def check_compiled(step, inputs, backend):
    """In one graph, and with the numbers of the uncompiled step."""
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    expected = results_and_grads(step, inputs)
    for actual, wanted in zip(results_and_grads(compiled, inputs), expected, strict=True):
        torch.testing.assert_close(actual, wanted)


def test_compile_without_graph_break(cpu):
    a = arguments(grad=True)
    ranks = torch.tensor([1, 2, 0])

    def step(w0, w1, logits, previous, hidden, weight, bias, targets):
        weights = [w0, w1]
        thresholds = cpu.mask_thresholds(logits, OFFSETS, ranks)
        masked = cpu.masked_weights(weights, logits, thresholds, OFFSETS)
        both, drift = cpu.masked_weights_drift(weights, logits, thresholds, OFFSETS, previous)
        mask = cpu.semi_binary_mask(logits, thresholds[:1])
        weight_drift = cpu.weight_drift(weights, previous, OFFSETS, 2, logits, thresholds)
        row = cpu.hypernet_logits(hidden[:1], weight, bias, 50)
        output_drift = cpu.output_drift(hidden, weight, bias, targets)
        return [*masked, *both, drift, mask, weight_drift, row * row, output_drift]

    weights, previous, _, _, logits, _ = a["weight_drift"]
    check_compiled(step, [*weights, logits, previous, *a["output_drift"]], "aot_eager")


def test_a_compiled_step_modifies_its_arguments(cpu):
    """hypernet_adam in a graph of its own, and what comes before and after in the same graph sees it."""
    *tensors, beta1, beta2, eps = arguments()["hypernet_adam"]

    def step(*tensors):
        before = tensors[4].sum()
        results = cpu.hypernet_adam(*tensors, beta1, beta2, eps)
        return [before, *results, tensors[4].sum()]

    torch.use_deterministic_algorithms(False)
    mine, theirs = ([t.clone() for t in tensors] for _ in range(2))
    expected = step(*mine)
    torch._dynamo.reset()
    actual = torch.compile(step, fullgraph=True, backend="aot_eager")(*theirs)
    assert not torch.equal(mine[4], tensors[4])
    for x, y in zip([*actual, *theirs], [*expected, *mine], strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_compiles_a_step(cpu, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    a = arguments(grad=True)
    thresholds = torch.tensor([0.2, 0.4, 0.0])

    def step(w0, w1, logits, previous, hidden, weight, bias, targets):
        masked, drift = cpu.masked_weights_drift([w0, w1], logits.sin(), thresholds, OFFSETS, previous, 2)
        return [masked[0].cos(), masked[1], drift, cpu.output_drift(hidden.tanh(), weight, bias, targets)]

    weights, previous, _, _, logits, _ = a["weight_drift"]
    check_compiled(step, [*weights, logits, previous, *a["output_drift"]], "inductor")


def large_results(cpu):
    """Results of every op at a size that is cut into many parts."""
    torch.manual_seed(3)
    size, rows, width, tasks = 150_001, 9001, 37, 5
    logits, w, g = torch.randn(size, requires_grad=True), torch.randn(size, requires_grad=True), torch.randn(size)
    offsets = [0, 100_000, size]
    thresholds = cpu.mask_thresholds(logits, offsets, torch.tensor([30_000, 20_000]))
    masked = cpu.masked_weights([w[:100_000], w[100_000:]], logits, thresholds, offsets)
    drift = cpu.weight_drift([w[:100_000], w[100_000:]], g, offsets, 1, logits, thresholds)
    both, drift_too = cpu.masked_weights_drift([w[:100_000], w[100_000:]], logits, thresholds, offsets, g, 2)
    (sum((m * m).sum() for m in (*masked, *both)) + drift + drift_too).backward()
    state = [torch.randn(rows, width), torch.randn(rows), *(torch.rand(s) for s in [(rows, width)] * 2 + [(rows,)] * 2)]
    hidden, targets = torch.randn(tasks + 1, width), torch.randn(tasks, rows)
    one = torch.tensor(1.0)
    value = cpu.output_drift(hidden[:-1, None], *state[:2], targets)
    logits_now = cpu.hypernet_logits(hidden[:1, None], *state[:2], rows)
    results = cpu.hypernet_adam(hidden, torch.randn(rows), targets, one, *state, one, one * 1e-3)
    return [thresholds, *masked, drift, drift_too, logits.grad, w.grad, value, logits_now, *results, *state]


def test_any_number_of_threads_gives_the_same_bits(cpu, isa):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = large_results(cpu)
        for threads in (2, 3, 4):
            torch.set_num_threads(threads)
            for repeat in range(3):
                for i, (x, y) in enumerate(zip(large_results(cpu), expected, strict=True)):
                    assert torch.equal(x, y), f"result {i} with {threads} threads, repeat {repeat}"
    finally:
        torch.set_num_threads(before)


def test_instruction_sets_agree(cpu):
    isa, before = torch.ops.hypermask_native.cpu_isa, torch.ops.hypermask_native.cpu_isa(-1)
    try:
        isa(0)
        expected = large_results(cpu)
        for choice in range(1, before + 1):
            isa(choice)
            for x, y in zip(large_results(cpu), expected, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5 * y.detach().abs().max().item())
    finally:
        isa(before)


def test_empty_everything(cpu):
    empty = torch.empty(0)
    assert cpu.mask_thresholds(empty, [0, 0], torch.tensor([0])).tolist() == [0.0]
    assert cpu.masked_weights([empty], empty, torch.zeros(1), [0, 0])[0].shape == (0,)
    assert cpu.weight_drift([empty], empty, [0, 0]).item() == 0
    assert cpu.weight_drift([], empty, [0]).item() == 0
    hidden, weight, bias = torch.empty(0, 1, 4), torch.randn(3, 4), torch.randn(3)
    assert cpu.output_drift(hidden, weight, bias, torch.empty(0, 3)).item() == 0
    assert cpu.output_drift(torch.randn(2, 1, 4), torch.empty(0, 4), empty, torch.empty(2, 0)).item() == 0
    assert reference.output_drift(hidden, weight, bias, torch.empty(0, 3)).item() == 0
