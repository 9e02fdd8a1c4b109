"""The CUDA ops against the float64 reference: kernels, launches and checks of csrc/cuda, run by a CPU in two orders.

Shapes are cut to several blocks, and blocks to several tiles; segments go beyond one launch's kMaxSegments = 64.
"""

import ctypes
from itertools import pairwise

import pytest
import torch
from tolerances import assert_close

from hypermask_fast.ops import kept_rank, reference

NAN, INF = float("nan"), float("inf")


def double(x):
    return x.detach().double().requires_grad_()


def sized_offsets(sizes, start=3):
    return [start, *(start + torch.tensor(sizes).cumsum(0)).tolist()]


def test_the_emulation_finds_mistakes(emulated):
    self_test = emulated.library.emulation_self_test
    self_test.restype = ctypes.c_char_p
    assert self_test() == b""


# Thresholds


def check_thresholds(emulated, logits, offsets, ranks):
    ranks = torch.as_tensor(ranks)
    actual = emulated.mask_thresholds(logits, offsets, ranks)
    expected = reference.mask_thresholds(logits, offsets, ranks)
    assert torch.equal(actual.nan_to_num(nan=-1.0), expected.nan_to_num(nan=-1.0))


@pytest.mark.parametrize("size", [1, 2, 255, 1000, 4096, 4097, 12_300, 20_011])
def test_thresholds(emulated, size):
    for sparsity in (0, 0.1, 50, 100):
        check_thresholds(emulated, torch.randn(size), [0, size], [kept_rank(sparsity, size)])
    for logits in (
        torch.randint(-3, 4, (size,)).float(),
        torch.full((size,), -0.75),
        1 + 1e-6 * torch.rand(size),
        torch.randn(size) * 1e-41,
        torch.tensor([NAN, -INF, 0.5]).repeat(size // 3 + 1)[:size] * torch.randn(size),
    ):
        for rank in (size // 3, size // 2, size - 1):
            check_thresholds(emulated, logits, [0, size], [rank])


@pytest.mark.parametrize("count", [1, 63, 64, 65, 130])
def test_thresholds_of_many_segments_and_rows(emulated, count):
    sizes = [(7 * i) % 23 * (i % 5 != 0) for i in range(count)]
    sizes[count // 2] = 9000
    offsets = sized_offsets(sizes)
    ranks = [kept_rank(40, size) for size in sizes]
    check_thresholds(emulated, torch.randn(2, offsets[-1] + 5), offsets, ranks)
    check_thresholds(emulated, torch.randn(3, 1, offsets[-1]), offsets, [0] * count)
    check_thresholds(emulated, torch.randn(0, offsets[-1]), offsets, ranks)


def test_a_rank_that_does_not_exist_gives_nan(emulated):
    """The CPU raises; a GPU is not waited for."""
    thresholds = emulated.mask_thresholds(torch.randn(30), [0, 10, 20, 30, 30, 30], torch.tensor([-1, 10, 9, 1, 0]))
    assert thresholds.isnan().tolist() == [True, True, False, True, False] and thresholds[4] == 0


# Masks


def special_logits(size):
    a = torch.randn(size) * torch.randn(size).exp()
    special = torch.tensor([0.0, -0.0, 1e-45, -1e-40, 0.4, -0.4, 0.625, 9.0, -88.0, 3e38, NAN, -NAN, INF, -INF])
    a[: min(size, len(special))] = special[:size]
    return a


@pytest.mark.parametrize("size", [0, 1, 255, 1023, 4096, 70_003])
@pytest.mark.parametrize("threshold", [0.4, 0.0, NAN, INF])
def test_mask_and_gradient(emulated, size, threshold):
    a, threshold, outer = special_logits(size), torch.tensor(threshold), torch.randn(size)
    a64 = double(a)
    expected = reference.semi_binary_mask(a64, threshold.double())
    expected.backward(outer.double())
    assert_close(emulated.semi_binary_mask(a, threshold), expected, "elementwise", "mask")
    assert_close(emulated.semi_binary_mask_backward(outer, a, threshold), a64.grad, "slope", "gradient")


def test_mask_with_a_threshold_per_row(emulated):
    for rows, columns in ((3, 1), (3, 5), (60, 8), (3, 300)):  # 60 rows are more than the blocks that run at a time
        a, threshold, outer = torch.randn(rows, 7, columns), torch.rand(rows, 1, 1), torch.randn(rows, 7, columns)
        a64 = double(a)
        expected = reference.semi_binary_mask(a64, threshold.double())
        expected.backward(outer.double())
        assert_close(emulated.semi_binary_mask(a, threshold), expected, "elementwise", "mask")
        assert_close(emulated.semi_binary_mask_backward(outer, a, threshold), a64.grad, "slope", "gradient")


# Masked weights and their drift


def layers(count):
    """Weights of odd sizes, every fifth empty, with logits before and behind them; the first one's logits begin on 16
    bytes like itself where `count` is even."""
    sizes = [(13 * i) % 31 * (i % 5 != 4) for i in range(count)]
    sizes[0], sizes[count // 2] = 9001, 4096
    offsets = sized_offsets(sizes, 3 if count % 2 else 4)
    offsets.append(offsets[-1] + 8)
    weights = [torch.randn(size) for size in sizes]
    logits = special_logits(offsets[-1] + 5)
    thresholds = torch.rand(count + 1)
    thresholds[::3] = 0
    return weights, logits, thresholds, offsets


def backward_of(outputs, outers, leaves):
    """Gradients, 0 where a leaf is not reached."""
    grads = torch.autograd.grad(outputs, leaves, outers, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True)]


def assert_all_close(actual, expected, kind, what):
    for s, (x, y) in enumerate(zip(actual, expected, strict=True)):
        assert_close(x, y, kind, f"{what} {s}")


COUNTS = [1, 6, 64, 65, 130]


@pytest.mark.parametrize("count", COUNTS)
def test_masked_weights(emulated, count):
    weights, logits, thresholds, offsets = layers(count)
    w64, a64 = [double(w) for w in weights], double(logits)
    expected = reference.masked_weights(w64, a64, thresholds.double(), offsets)
    outers = [torch.randn(w.shape) for w in weights]
    *grad_weights, grad_logits = backward_of(expected, [o.double() for o in outers], [*w64, a64])
    assert_all_close(emulated.masked_weights(weights, logits, thresholds, offsets), expected, "elementwise", "weight")
    actual = emulated.masked_weights_backward(outers, weights, logits, thresholds, offsets)
    assert_all_close(actual[0], grad_weights, "slope", "gradient")
    assert_close(actual[1], grad_logits, "slope", "gradient of logits")


@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("count", COUNTS)
def test_weight_drift(emulated, count, norm, masked):
    weights, logits, thresholds, offsets = layers(count)
    previous = torch.randn(len(logits))
    previous[offsets[0] : offsets[1]] = weights[0]  # did not move: the 2-norm's corner
    extra = (logits, thresholds) if masked else (None, None)
    w64, a64 = [double(w) for w in weights], double(logits)
    extra64 = (a64, thresholds.double()) if masked else (None, None)
    parts = [
        reference.weight_drift(w64[s : s + 1], previous.double()[a:b], [0, b - a], norm,
                               *((a64[a:b], thresholds[s : s + 1].double()) if masked else (None, None)))
        for s, (a, b) in enumerate(pairwise(offsets[: count + 1]))
    ]  # fmt: skip
    norms = emulated.weight_drift(weights, previous, offsets, norm, *extra)
    assert_all_close(norms, parts, "sum", "norm")
    total = reference.weight_drift(w64, previous.double(), offsets, norm, *extra64)
    *grad_weights, grad_logits = backward_of([total * 0.7], [torch.ones_like(total)], [*w64, a64])
    outer = torch.full((count,), 0.7)
    actual = emulated.weight_drift_backward(outer, norms, weights, previous, offsets, norm, *extra)
    assert_all_close(actual[0], grad_weights, "sum", "gradient")
    if masked:
        assert_close(actual[1], grad_logits, "sum", "gradient of logits")


@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("count", COUNTS)
def test_masked_weights_drift(emulated, count, norm):
    weights, logits, thresholds, offsets = layers(count)
    previous = torch.randn(len(logits))
    w64, a64 = [double(w) for w in weights], double(logits)
    *masked, drift = outputs = [
        *reference.masked_weights(w64, a64, thresholds.double(), offsets),
        reference.weight_drift(w64, previous.double(), offsets, norm, a64, thresholds.double()),
    ]
    outers = [torch.randn(w.shape) for w in weights]
    gradients = [o.double() for o in (*outers, torch.tensor(0.7))]
    *grad_weights, grad_logits = backward_of(outputs, gradients, [*w64, a64])
    actual, norms = emulated.masked_weights_drift(weights, logits, thresholds, offsets, previous, norm)
    assert_all_close(actual, masked, "elementwise", "weight")
    assert_close(norms.double().sum(), drift, "sum", "drift")
    common = norms, weights, logits, thresholds, offsets, previous, norm
    actual = emulated.masked_weights_drift_backward(outers, torch.full((count,), 0.7), *common)
    assert_all_close(actual[0], grad_weights, "sum", "gradient")
    assert_close(actual[1], grad_logits, "sum", "gradient of logits")


# The dense output layer

# The last two have more strips of columns and tasks than a block has threads.
SHAPES = [(1, 1), (63, 7), (997, 25), (500, 100), (129, 200), (333, 128), (40, 257), (50, 400)]


def unaligned(x):
    """A copy that begins 4 bytes behind a border of 16."""
    memory = torch.empty(x.numel() + 1)
    return memory[1:].view(x.shape).copy_(x)


def dense_problem(rows, width, tasks):
    weight, bias = torch.randn(rows, width) * 0.1, torch.randn(rows) * 0.1
    hidden, targets = torch.randn(tasks + 1, width), torch.randn(tasks, rows)
    moments = [0.01 * torch.randn(rows, width), torch.randn(rows)]
    moments += [1e-4 * torch.rand(rows, width), 1e-4 * torch.rand(rows)]
    return hidden, targets, weight, bias, moments


@pytest.mark.parametrize("rows, width", SHAPES)
@pytest.mark.parametrize("tasks", [0, 1, 3, 10])
def test_output_drift(emulated, rows, width, tasks):
    hidden, targets, weight, bias, _ = dense_problem(rows, width, tasks)
    hidden = hidden[:tasks, None].contiguous()
    leaves = [double(x) for x in (hidden, weight, bias)]
    expected = reference.output_drift(*leaves, targets.double())
    grads = backward_of([expected * 0.3], [torch.ones_like(expected)], leaves)
    assert_close(emulated.output_drift(hidden, weight, bias, targets), expected, "sum", "drift")
    actual = emulated.output_drift_backward(torch.tensor(0.3), hidden, weight, bias, targets)
    assert_all_close(actual, grads, "sum", "gradient")


@pytest.mark.parametrize("rows, width", SHAPES)
@pytest.mark.parametrize("tasks", [0, 1, 4, 9, 40])
def test_hypernet_adam(emulated, rows, width, tasks):
    hidden, targets, weight, bias, (wm, bm, wv, bv) = dense_problem(rows, width, tasks)
    grad_logits = torch.randn(rows)
    grad_logits[rows // 2] = 0
    state = [weight, bias, wm, wv, bm, bv]
    state64 = [x.double() for x in state]
    rest, tail = [hidden, grad_logits, targets, torch.tensor(0.02)], [torch.tensor(3.0), torch.tensor(1e-3)]
    results = emulated.hypernet_adam(*rest, *state, *tail, 0.9, 0.999, 1e-8)
    expected = reference.hypernet_adam(*(x.double() for x in rest), *state64, *(x.double() for x in tail))
    assert_all_close(results, expected, "sum", "result")
    assert_all_close(state, state64, "sum", "state")


@pytest.mark.parametrize("tasks", [0, 3])
def test_a_hundred_steps_are_those_of_torch_adam(emulated, instruction_errors, tasks):
    """Roots too small and quotients too large in each step, or the other way round: as far as they can be off."""
    rows, width = 61, 12
    hidden, targets, weight, bias, _ = dense_problem(rows, width, tasks)
    weight[5] = 0  # and with one task a row that never gets a gradient: 0 / (0 + eps)
    state = [weight.clone(), bias.clone(), *(torch.zeros_like(x) for x in (weight, weight, bias, bias))]
    layer = [double(weight), double(bias)]
    optimizer = torch.optim.Adam(layer, lr=1e-2)
    for step in range(1, 101):
        hidden, grad_logits = torch.randn(tasks + 1, width), torch.randn(rows)
        grad_logits[5] = 0 if tasks == 0 else 1
        args = hidden, grad_logits, targets, torch.tensor(0.01), *state
        emulated.hypernet_adam(*args, torch.tensor(float(step)), torch.tensor(1e-2), 0.9, 0.999, 1e-8)
        predictions = hidden.double() @ layer[0].t() + layer[1]
        drift = (predictions[:-1] - targets.double()).square().sum()
        optimizer.zero_grad()
        (0.01 * drift + (predictions[-1] * grad_logits.double()).sum()).backward()
        optimizer.step()
    assert_close(state[0], layer[0], "adam100", "weight")
    assert_close(state[1], layer[1], "adam100", "bias")


@pytest.mark.parametrize("rows, width", [(63, 7), (301, 100)])
def test_hypernet_adam_of_unaligned_tensors(emulated, rows, width):
    hidden, targets, weight, bias, (wm, bm, wv, bv) = dense_problem(rows, width, 2)
    rest, tail = [hidden, torch.randn(rows), targets, torch.tensor(0.02)], [torch.tensor(3.0), torch.tensor(1e-3)]
    aligned = [weight, bias, wm, wv, bm, bv]
    shifted = [unaligned(x) for x in aligned]
    expected = emulated.hypernet_adam(*rest, *aligned, *tail, 0.9, 0.999, 1e-8)
    torch.ops.hypermask_emulated.hypernet_adam(*rest, *shifted, *tail, 0.9, 0.999, 1e-8)
    assert_all_close(shifted, [x.double() for x in aligned], "sum", "state")
    assert expected[0].isfinite().all()


@pytest.mark.parametrize("rows, width", [(203, 100), (201, 25)])
def test_a_prediction_does_not_depend_on_the_other_tasks(emulated, rows, width):
    """To the bit, in every mode: a task begins with a drift of exactly 0."""
    hidden, _, weight, bias, _ = dense_problem(rows, width, 20)
    logits = torch.stack([emulated.hypernet_logits(h, weight, bias) for h in hidden])
    assert_close(logits, hidden.double() @ weight.double().t() + bias, "sum", "logits")
    chunks, nothing = hidden[:, None].contiguous(), torch.zeros(21, rows)
    for tasks in (1, 5, 21):
        targets = logits[:tasks].contiguous()
        assert emulated.output_drift(chunks[:tasks].contiguous(), weight, bias, targets) == 0
    *_, grad_bias = emulated.output_drift_backward(torch.tensor(0.5), chunks[:1], weight, bias, nothing[:1])
    assert torch.equal(grad_bias, logits[0])
    state = [x.clone() for x in (weight, bias, *[torch.zeros_like(x) for x in (weight, weight, bias, bias)])]
    one = torch.tensor(1.0)
    args = hidden, torch.zeros(rows), logits[:20].contiguous(), one
    grad_hidden, drift = emulated.hypernet_adam(*args, *state, one, one, 0.9, 0.999, 1e-8)
    assert drift == 0 and not grad_hidden.any() and torch.equal(state[0], weight)


def test_hypernet_adam_lets_nan_show_where_it_belongs(emulated):
    """A NaN gradient reaches its own row and the current task's hidden gradient, nothing else."""
    hidden, targets, weight, bias, (wm, bm, wv, bv) = dense_problem(100, 12, 2)
    grad_logits = torch.randn(100)
    grad_logits[37] = NAN
    state = [weight, bias, wm, wv, bm, bv]
    one = torch.tensor(1.0)
    grad_hidden, drift = emulated.hypernet_adam(hidden, grad_logits, targets, one, *state, one, one, 0.9, 0.999, 1e-8)
    assert grad_hidden[2].isnan().all() and grad_hidden[:2].isfinite().all() and drift.isfinite()
    for x in state:
        assert x[37].isnan().all() and torch.isfinite(x).sum() == x.numel() - x[37].numel()


def test_hypernet_adam_of_too_many_tasks_is_refused(emulated):
    hidden, targets, weight, bias, (wm, bm, wv, bv) = dense_problem(5, 100, 400)
    one = torch.tensor(1.0)
    with pytest.raises(RuntimeError, match="bytes of shared memory"):
        emulated.hypernet_adam(
            hidden, torch.randn(5), targets, one, weight, bias, wm, wv, bm, bv, one, one, 0.9, 0.999, 1e-8
        )
