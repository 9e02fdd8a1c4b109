"""What holds for all native ops: opcheck, torch.compile, any number of threads, every instruction set."""

import pytest
import torch
from op_arguments import NAMES, OFFSETS, arguments
from torch.library import opcheck

from hypermask_fast import reference

pytestmark = pytest.mark.native


def op(name):
    return getattr(torch.ops.hypermask_fast, name).default


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name):
    torch.use_deterministic_algorithms(False)  # opcheck runs the ops through inductor's own paths
    opcheck(op(name), arguments(grad=not name.endswith("backward"))[name])


def test_compile_without_graph_break(cpu):
    torch.use_deterministic_algorithms(False)
    a = arguments(grad=True)
    ranks = torch.tensor([1, 2, 0])

    def step(weights, logits, previous, hidden, weight, bias, targets):
        thresholds = cpu.mask_thresholds(logits, OFFSETS, ranks)
        masked = cpu.masked_weights(weights, logits, thresholds, OFFSETS)
        total = sum(m.sum() for m in masked) + cpu.semi_binary_mask(logits, thresholds[:1]).sum()
        total = total + cpu.weight_drift(weights, previous, OFFSETS, 2, logits, thresholds)
        return total + cpu.output_drift(hidden, weight, bias, targets)

    weights, previous, _, _, logits, _ = (*a["weight_drift"][:2], *a["weight_drift"][2:])
    inputs = (weights, logits, previous, *a["output_drift"])
    expected = step(*inputs)
    expected.backward()
    leaves = [*weights, logits, *a["output_drift"][:3]]
    grads = [x.grad.clone() for x in leaves]
    for x in leaves:
        x.grad = None
    actual = torch.compile(step, fullgraph=True, backend="aot_eager")(*inputs)
    actual.backward()
    torch.testing.assert_close(actual, expected)
    for x, grad in zip(leaves, grads, strict=True):
        torch.testing.assert_close(x.grad, grad)


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
    isa, before = torch.ops.hypermask_fast.cpu_isa, torch.ops.hypermask_fast.cpu_isa(-1)
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
