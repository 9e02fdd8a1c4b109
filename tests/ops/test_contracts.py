"""What holds for all native ops: errors before memory is touched, opcheck, torch.compile, threads, instruction sets."""

import pytest
import torch
from torch.library import opcheck

from hypermask_fast import reference

pytestmark = pytest.mark.native

OFFSETS = [0, 12, 17, 18]


def arguments(grad=False):
    """Valid arguments of every op, by name."""
    weights = [torch.randn(3, 4).requires_grad_(grad), torch.randn(5).requires_grad_(grad)]
    logits, thresholds = torch.randn(18).requires_grad_(grad), torch.tensor([0.2, 0.4, 0.0])
    previous, norms = torch.randn(18), torch.rand(2)
    weight, bias = torch.randn(50, 6).requires_grad_(grad), torch.randn(50).requires_grad_(grad)
    hidden, targets = torch.randn(3, 1, 6).requires_grad_(grad), torch.randn(3, 50)
    state = [torch.rand(50, 6), torch.rand(50), torch.rand(50, 6), torch.rand(50, 6), torch.rand(50), torch.rand(50)]
    one = torch.tensor(1.0)
    plain = [w.detach() for w in weights]
    return {
        "mask_thresholds": (logits.detach(), OFFSETS, torch.tensor([1, 2, 0])),
        "semi_binary_mask": (logits, torch.tensor(0.3)),
        "semi_binary_mask_backward": (torch.randn(18), logits.detach(), torch.tensor(0.3)),
        "masked_weights": (weights, logits, thresholds, OFFSETS),
        "masked_weights_backward": (plain, plain, logits.detach(), thresholds, OFFSETS),
        "weight_drift": (weights, previous, OFFSETS, 1, logits, thresholds),
        "weight_drift_backward": (norms, norms, plain, previous, OFFSETS, 2, logits.detach(), thresholds),
        "masked_weights_drift": (weights, logits, thresholds, OFFSETS, previous, 1),
        "masked_weights_drift_backward": (
            *(plain, norms, norms, plain, logits.detach(), thresholds),
            *(OFFSETS, previous, 2),
        ),
        "output_drift": (hidden, weight, bias, targets),
        "output_drift_backward": (one, hidden.detach(), weight.detach(), bias.detach(), targets),
        "hypernet_logits": (hidden.detach()[0, 0], weight, bias),
        "hypernet_adam": (torch.randn(3, 6), torch.randn(50), targets[:2], one, *state, one, one, 0.9, 0.99, 1e-8),
    }


def op(name):
    return getattr(torch.ops.hypermask_fast, name).default


NAMES = sorted(arguments())


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name):
    torch.use_deterministic_algorithms(False)  # opcheck runs the ops through inductor's own paths
    opcheck(op(name), arguments(grad=not name.endswith("backward"))[name])


def replaced(value, how):
    """A bad version of one argument, or None where the fault does not apply."""
    if isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
        inner = replaced(value[0], how)
        return None if inner is None else [inner, *value[1:]]
    if not isinstance(value, torch.Tensor):
        return None
    if how == "dtype":
        return value.double()
    if how == "stride" and value.numel() > 1:
        return value.detach().repeat_interleave(2, dim=-1)[..., ::2]
    if how == "expanded" and value.numel() > 1:  # a small memory that claims more than 2^31 entries
        return torch.zeros(1, dtype=value.dtype).expand(2**33)
    if how == "device":
        return value.detach().to("meta")
    if how == "shape" and value.dim() > 0:
        return torch.cat([value, value], dim=-1).contiguous().detach()
    return None


# Logits may go on behind the last offset.
MORE_ALLOWED = {("mask_thresholds", 0), ("masked_weights", 1), ("masked_weights_backward", 2)}


@pytest.mark.parametrize("how", ["dtype", "stride", "expanded", "shape"])
@pytest.mark.parametrize("name", NAMES)
def test_bad_tensors_are_refused(name, how):
    valid = arguments()[name]
    tried = 0
    for i, value in enumerate(valid):
        bad = replaced(value, how)
        if bad is None or (name == "semi_binary_mask" and how == "shape" and i == 0):
            continue
        if how == "shape" and (name, i) in MORE_ALLOWED:
            continue
        tried += 1
        with pytest.raises(RuntimeError) as caught:
            op(name)(*valid[:i], bad, *valid[i + 1 :])
        assert name.removesuffix("_backward") in str(caught.value) and "\n" not in str(caught.value).split("(origin")[0]
    assert tried or how == "shape"


@pytest.mark.parametrize(
    "offsets, message",
    [
        ([], "at least one border"),
        ([-1, 5, 18], "negative"),
        ([0, 9, 5, 18], "ascend"),
        ([0, 12, 17, 19], "beyond"),
        ([0, 2**40], "beyond"),
    ],
)
def test_bad_offsets_are_refused(offsets, message):
    logits, count = torch.randn(18), max(len(offsets) - 1, 0)
    with pytest.raises(RuntimeError, match=message):
        op("mask_thresholds")(logits, offsets, torch.zeros(count, dtype=torch.long))
    with pytest.raises(RuntimeError, match=message):
        op("masked_weights")([], logits, torch.zeros(count), offsets)
    with pytest.raises(RuntimeError, match=message):
        op("weight_drift")([], logits, offsets, 1, None, None)
    with pytest.raises(RuntimeError, match=message):
        op("masked_weights_drift")([], logits, torch.zeros(count), offsets, logits, 1)


def test_meta_tensors_beside_others_are_refused():
    """One suffices for the shape function to be called, whose result would be memory that nobody has written."""
    hidden, weight, bias, targets = arguments()["output_drift"]
    assert op("output_drift")(*(t.to("meta") for t in (hidden, weight, bias, targets))).is_meta
    with pytest.raises(RuntimeError, match="one device, not on cpu and meta"):
        op("output_drift")(hidden, weight, bias, targets.to("meta"))


def test_other_bad_arguments_are_refused():
    valid = arguments()
    with pytest.raises(RuntimeError, match="outside segment 1"):
        op("mask_thresholds")(torch.randn(18), OFFSETS, torch.tensor([1, 5, 0]))
    with pytest.raises(RuntimeError, match="outside segment 0"):
        op("mask_thresholds")(torch.randn(18), OFFSETS, torch.tensor([-1, 0, 0]))
    with pytest.raises(RuntimeError, match="norm must be 1 or 2"):
        op("weight_drift")(*valid["weight_drift"][:3], 3, None, None)
    with pytest.raises(RuntimeError, match="go together"):
        op("weight_drift")(*valid["weight_drift"][:5], None)
    adam = list(valid["hypernet_adam"])
    with pytest.raises(RuntimeError, match="must not share memory"):
        op("hypernet_adam")(*adam[:6], adam[4], *adam[7:])
    with pytest.raises(RuntimeError, match="one chunk"):
        op("output_drift")(torch.randn(3, 2, 6), *valid["output_drift"][1:])


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
