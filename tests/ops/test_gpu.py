"""The native ops on a GPU against float64 on the CPU: values and every gradient; skipped where there is no GPU."""

import pytest
import torch

from hypermask_fast import ops
from hypermask_fast.ops import reference
from hypermask_fast.ops import registry as backends
from hypermask_fast.ops.native import few_rows as small_batch

DEVICE, BACKEND = "cuda", "cuda"
SHAPES = [(1,), (63, 7), (1000, 1), (37, 33, 5)]  # weights, flat together
pytestmark = pytest.mark.skipif(bool(backends.problem(BACKEND)), reason=backends.problem(BACKEND) or "there is one")


def rel(actual, expected):
    """Largest error over the largest entry; NaN, which poisons memory that nothing wrote, fails every comparison."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    assert actual.shape == expected.shape
    return ((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item() if actual.numel() else 0.0


def check(op, leaves, build, tolerance=4e-6):
    """`build(ops or reference, leaves)` on the GPU in float32 and on the CPU in float64: results and gradients."""
    there = [t.to(DEVICE).requires_grad_() for t in leaves]
    here = [t.double().requires_grad_() for t in leaves]
    with backends.use_backend(BACKEND):
        got = build(ops, there)
    wanted = build(reference, here)
    got, wanted = ([*r] if isinstance(r, list | tuple) else [r] for r in (got, wanted))
    for a, b in zip(got, wanted, strict=True):
        assert rel(a, b) < tolerance, op
    if not wanted[0].requires_grad:
        return
    grads = [torch.randn(b.shape) for b in wanted]
    mine = torch.autograd.grad(got, there, [g.to(DEVICE) for g in grads])
    theirs = torch.autograd.grad(wanted, here, [g.double() for g in grads])
    for i, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        assert rel(a, b) < tolerance, f"{op}: gradient {i}"


@pytest.fixture
def target():
    """Weights, flat logits with a gap around the thresholds, previous weights, thresholds, offsets."""
    weights = [torch.randn(shape) for shape in SHAPES]
    sizes = [w.numel() for w in weights]
    offsets = [0, *torch.tensor(sizes).cumsum(0).tolist()]
    logits = torch.randn(offsets[-1])
    logits[(logits.abs() - 0.5).abs() < 1e-3] = 0.7
    previous = torch.cat([w.flatten() for w in weights]) + 0.1 * torch.randn(offsets[-1])
    return weights, logits, previous, torch.full((len(weights),), 0.5), offsets


def test_thresholds_are_the_same_entries(target):
    _, logits, _, _, offsets = target
    logits[5:9] = logits[4]  # ties
    ranks = torch.tensor([0, 100, 999, 3000])
    with backends.use_backend(BACKEND):
        got = ops.mask_thresholds(logits.to(DEVICE), offsets, ranks.to(DEVICE))
    assert torch.equal(got.cpu(), reference.mask_thresholds(logits, offsets, ranks))


def test_masks_and_masked_weights(target):
    weights, logits, _, limits, offsets = target
    check("semi_binary_mask", [logits], lambda m, t: m.semi_binary_mask(t[0], t[0].new_tensor(0.5)))
    count = len(weights)
    check(
        "masked_weights",
        [*weights, logits],
        lambda m, t: m.masked_weights(t[:count], t[-1], limits.to(t[-1]), offsets),
    )


@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("masked", [True, False])
def test_weight_drift(target, norm, masked):
    weights, logits, previous, limits, offsets = target
    count = len(weights)

    def build(m, t):
        mask = (t[-1], limits.to(t[-1])) if masked else (None, None)
        return m.weight_drift(t[:count], previous.to(t[0]), offsets, norm, *mask)

    check("weight_drift", [*weights, logits] if masked else weights, build)


@pytest.mark.parametrize("norm", [1, 2])
def test_masked_weights_drift(target, norm):
    weights, logits, previous, limits, offsets = target
    count = len(weights)

    def build(m, t):
        arguments = t[:count], t[-1], limits.to(t[-1]), offsets, previous.to(t[0]), norm
        masked, drift = m.masked_weights_drift(*arguments)
        return [*masked, drift]

    check("masked_weights_drift", [*weights, logits], build)


@pytest.mark.parametrize(("size", "width", "tasks"), [(1, 1, 1), (101, 25, 4), (3000, 100, 9), (515, 64, 39)])
def test_dense_layer(size, width, tasks):
    hidden, weight, bias = torch.randn(tasks, 1, width), torch.randn(size, width), torch.randn(size)
    targets = torch.randn(tasks, size)
    check("output_drift", [hidden, weight, bias], lambda m, t: m.output_drift(*t, targets.to(t[0])), 2e-5)
    check("hypernet_logits", [hidden[:1], weight, bias], lambda m, t: m.hypernet_logits(*t, size), 2e-5)


@pytest.mark.parametrize(("size", "width", "tasks"), [(1, 1, 1), (101, 25, 5), (3000, 100, 10), (515, 64, 40)])
def test_hypernet_adam(size, width, tasks):
    layer = [torch.randn(size, width), torch.randn(size), 0.1 * torch.randn(size, width), torch.rand(size, width)]
    layer += [0.1 * torch.randn(size), torch.rand(size)]
    rest = [torch.randn(tasks, width), torch.randn(size), torch.randn(tasks - 1, size), torch.tensor(0.3)]
    numbers = torch.tensor(7.0), torch.tensor(1e-3)
    there, here = [t.to(DEVICE) for t in layer], [t.double() for t in layer]
    on_gpu = [t.to(DEVICE) for t in (*rest, *numbers)]
    with backends.use_backend(BACKEND):
        got = ops.hypernet_adam(*on_gpu[:4], *there, *on_gpu[4:])
    wanted = reference.hypernet_adam(*(t.double() for t in rest), *here, *(t.double() for t in numbers))
    for i, (a, b) in enumerate(zip([*got, *there], [*wanted, *here], strict=True)):
        assert rel(a, b) < 2e-5, i


@pytest.mark.skipif(BACKEND != "cuda", reason="the ops for few rows are CUDA's")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 5, 16])
def test_few_rows(rows, dtype):
    """By the rule |ours - fp64| <= 2 |PyTorch in the same dtype - fp64| + eps."""
    eps = torch.finfo(dtype).eps
    assert rows <= small_batch.MAX_ROWS
    x, weight = torch.randn(rows, 1000).to(DEVICE, dtype), torch.randn(1024, 1000).to(DEVICE, dtype)
    hidden, layer, shift = (torch.randn(*s).to(DEVICE, dtype) for s in ((129, 64), (8000, 64), (8000,)))
    calls = [("masked_linear", (x, weight, torch.randn_like(weight)))]
    if dtype != torch.float32:
        calls.append(("chunk_masked_linear", (x, weight, hidden, layer, shift, 16)))
    for op, args in calls:
        args = (*args, torch.zeros((), device=DEVICE, dtype=dtype))
        wanted = getattr(reference, op)(*(t.double() if isinstance(t, torch.Tensor) else t for t in args))
        ours, theirs = (getattr(m, op)(*args, **k) for m, k in ((ops, {"backend": BACKEND}), (reference, {})))
        assert rel(ours, wanted) <= 2 * rel(theirs, wanted) + eps, op
