"""The ops under torch.compile: one graph, the eager numbers, in-place results that the graph sees."""

import shutil

import pytest
import torch
from support.arguments import OFFSETS, native_arguments
from support.comparing import DEVICE, randn
from torch._dynamo.utils import counters


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
    *tensors, beta1, beta2, eps = native_arguments()["hypernet_adam"]

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


@pytest.mark.native
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_cpu_inductor_compiles_a_step(cpu, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    a = native_arguments(grad=True)
    thresholds = torch.tensor([0.2, 0.4, 0.0])

    def step(w0, w1, logits, previous, hidden, weight, bias, targets):
        masked, drift = cpu.masked_weights_drift([w0, w1], logits.sin(), thresholds, OFFSETS, previous, 2)
        return [masked[0].cos(), masked[1], drift, cpu.output_drift(hidden.tanh(), weight, bias, targets)]

    weights, previous, _, _, logits, _ = a["weight_drift"]
    check_compiled(step, [*weights, logits, previous, *a["output_drift"]], "inductor")


def own(values, task):
    """Those of one task, whose id is a tensor (1,)."""
    return values.index_select(0, task)[0]


# An op under a task that is a tensor, as a compiled model calls it, and the shapes of what it differentiates; what each
# of the two tasks has of its own comes first. The layers are in test_layer_ops.
OF_A_TASK = {
    "semi_binary_mask": (
        lambda kernels, task, limits, a: kernels.semi_binary_mask(own(a, task), own(limits, task)),
        ((2, 3, 5),),
    ),
    "masked_weights": (
        lambda kernels, task, limits, a, v, w: torch.cat(
            [m.flatten() for m in kernels.masked_weights((v, w), own(a, task), limits, (0, 6, 10))]
        ),
        ((2, 10), (2, 3), (4,)),
    ),
    "entropy_select": (
        lambda kernels, task, limits, x: kernels.entropy_select(x * own(limits, task)), ((3, 4, 5),),
    ),
    "weight_drift": (
        lambda kernels, task, limits, a, v, w: kernels.weight_drift(
            (v, w), own(a, 1 - task), (0, 6, 10), 2, own(a, task), limits
        ),
        ((2, 10), (2, 3), (4,)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OF_A_TASK)
def test_triton_compiles_to_one_graph_for_all_tasks(triton, name):
    """Forward and backward without a graph break, the eager numbers, and no other code for another task."""
    call, shapes = OF_A_TASK[name]

    def op(*args):
        return call(triton, *args)

    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    counters.clear()
    for task, limits in ((0, (0.3, 0.4)), (1, (0.5, 0.2))):
        leaves = [randn(*shape).requires_grad_() for shape in shapes]
        given = torch.tensor([task], device=DEVICE), torch.tensor(limits, device=DEVICE), *leaves
        y, expected = compiled(*given), op(*given)
        assert torch.equal(y, expected)
        if y.is_floating_point():
            seed = torch.randn_like(y)
            ours, theirs = (torch.autograd.grad(found, leaves, seed) for found in (y, expected))
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert counters["stats"]["unique_graphs"] == 1
