"""The ops under torch.compile: one graph, the eager numbers, in-place results that the graph sees."""

import shutil

import pytest
import torch
import torch._inductor.config as inductor
from support.arguments import OFFSETS, native_arguments


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


@pytest.mark.native
def test_cpu_compiles_without_graph_break(cpu):
    a = native_arguments(grad=True)
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


@pytest.mark.native
def test_cpu_hypernet_adam_modifies_its_arguments_in_a_graph(cpu):
    """In a graph of its own, and what comes before and after in the same graph sees it."""
    arguments = native_arguments()["hypernet_adam"]
    tensors, settings = arguments[:12], arguments[12:]

    def step(*tensors):
        before = tensors[4].sum()
        results = cpu.hypernet_adam(*tensors, *settings)
        return [before, *results, tensors[4].sum()]

    torch.use_deterministic_algorithms(False)
    mine, theirs = ([t.clone() for t in tensors] for _ in range(2))
    expected = step(*mine)
    torch._dynamo.reset()
    actual = torch.compile(step, fullgraph=True, backend="aot_eager")(*theirs)
    assert not torch.equal(mine[4], tensors[4])
    for x, y in zip([*actual, *theirs], [*expected, *mine], strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.native
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_cpu_inductor_compiles_a_step(cpu, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    # Its headers compiled ahead and the probing of instruction sets take most of the time, and are PyTorch's own.
    monkeypatch.setattr(inductor, "cpp_cache_precompile_headers", False)
    monkeypatch.setattr(inductor.cpp, "vec_isa_ok", True)
    a = native_arguments(grad=True)
    thresholds = torch.tensor([0.2, 0.4, 0.0])

    def step(w0, w1, logits, previous, hidden, weight, bias, targets):
        masked, drift = cpu.masked_weights_drift([w0, w1], logits.sin(), thresholds, OFFSETS, previous, 2)
        return [masked[0].cos(), masked[1], drift, cpu.output_drift(hidden.tanh(), weight, bias, targets)]

    weights, previous, _, _, logits, _ = a["weight_drift"]
    check_compiled(step, [*weights, logits, previous, *a["output_drift"]], "inductor")
