"""Moments in bfloat16: what they are rounded to, the same by every backend, and by whom.

Most problems here are exact in float32, whatever the order of the operations: betas of a half, gradients and moments of
few bits. So every backend has the very same numbers to round, and the bits have to be equal.
"""

import numpy as np
import pytest
import torch
from support.backends import CPU, NATIVE, on
from support.comparing import NAN
from support.dense import SHAPES
from support.refusals import assert_refused, whoever_is_asked

from hypermask_fast import InputError, ops
from hypermask_fast.ops import reference
from hypermask_fast.ops.rounding import draws, rounded

EXACT = 0.5, 0.5, 1e-8  # beta1, beta2, eps
SIZES = [*((shape, 1) for shape in SHAPES), ((101, 25), 3), ((1000, 100), 10), ((70, 64), 40)]
LR = torch.tensor(1e-3)


def exact_layer(rows, width, dtype=torch.bfloat16):
    """weight, bias, weight_m, weight_v, bias_m, bias_v."""
    m = torch.randint(-128, 129, (rows, width)) / 128
    v = torch.randint(1, 129, (rows, width)) / 128
    return [
        torch.randn(rows, width),
        torch.randn(rows),
        m.to(dtype),
        v.to(dtype),
        torch.randn(rows),
        torch.rand(rows),
    ]


def exact_gradient(rows, width, tasks):
    """factors (tasks, rows) and hidden (tasks, width) whose product has at most 12 bits: a row has one factor."""
    factors = torch.zeros(tasks, rows)
    factors[torch.arange(rows) % tasks, torch.arange(rows)] = torch.randint(-63, 64, (rows,)) / 64
    return factors, torch.randint(-31, 32, (tasks, width)) / 32


def step_of(op, tasks, rows, width):
    """What `op` takes before the layer, of no drift, and where its layer's tensors go."""
    factors, hidden = exact_gradient(rows, width, tasks)
    if op == "factored_adam":
        return [factors, torch.ones(tasks), hidden], slice(0, 1), slice(2, 4)
    # The current task's gradient alone: those of earlier tasks come from products, which are rounded otherwise.
    return [hidden, factors.sum(0), torch.zeros(tasks - 1, rows), torch.tensor(0.0)], slice(0, 2), slice(2, 6)


def stepped(backend, op, problem, layer, number, first_row=0, settings=EXACT):
    """The layer after a step; its moments are NaN wherever the step does not write."""
    before, parameters, moments = problem
    layer = [x.to(backend.device, copy=True) for x in layer]
    tail = torch.tensor(float(number)), LR
    rest, tail = ([x.to(backend.device) for x in tensors] for tensors in (before, tail))
    more = *settings, 0.0, False, False, first_row
    getattr(backend, op)(*rest, *layer[parameters], *layer[moments], *tail, *more)
    return [x.cpu() for x in layer]


class Reference:
    device = "cpu"

    def __getattr__(self, op):
        return getattr(reference, op)


@on(*NATIVE, "cuda")
@pytest.mark.parametrize("op", ["hypernet_adam", "factored_adam"])
@pytest.mark.parametrize(("shape", "tasks"), SIZES)
def test_every_backend_rounds_to_the_same_bits(backend, shape, tasks, op):
    problem, layer = step_of(op, tasks, *shape), exact_layer(*shape)
    expected = stepped(Reference(), op, problem, layer, 7, first_row=1000)
    found = stepped(backend, op, problem, layer, 7, first_row=1000)
    for name, x, y, at in (("weight_m", found[2], expected[2], 2), ("weight_v", found[3], expected[3], 3)):
        assert x.dtype == torch.bfloat16 and torch.equal(x, y), name
        assert x.numel() < 50 or not torch.equal(x, layer[at])
    assert (found[0] - expected[0]).abs().max() < 1e-6


@on(*NATIVE, "cuda")
def test_a_step_is_that_of_the_moments_before_they_are_rounded(backend):
    """Weight and bias are those of a float32 layer with the same moments, to the bit; so are all other results."""
    rows, width, tasks = 333, 41, 3
    hidden, targets, grad = torch.randn(tasks, width), torch.randn(tasks - 1, rows), torch.randn(rows)
    before = [x.to(backend.device) for x in (hidden, grad, targets, torch.tensor(0.1))]
    tail = [x.to(backend.device) for x in (torch.tensor(3.0), LR)]
    layers, results = [], []
    for dtype in (torch.bfloat16, torch.float32):
        torch.manual_seed(3)
        layer = [x.to(backend.device) for x in exact_layer(rows, width, dtype)]
        results.append(backend.hypernet_adam(*before, *layer, *tail))
        layers.append(layer)
    for i in (0, 1, 4, 5):
        assert torch.equal(layers[0][i], layers[1][i])
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)
    for x, y in zip(layers[0][2:4], layers[1][2:4], strict=True):  # and the moments are within one rounding of these
        assert ((x.float() - y).abs() <= 2**-7 * y.abs() + 2.0**-133).all() and not torch.equal(x.float(), y)


@on(*CPU, "emulated", "cuda")
def test_a_shard_draws_by_its_global_rows(backend):
    rows, width, border = 64, 25, 23
    problem, layer = step_of("factored_adam", 1, rows, width), exact_layer(rows, width)
    whole = stepped(backend, "factored_adam", problem, layer, 5)
    (factors, scales, hidden), *slices = problem
    for part, first in ((slice(0, border), 0), (slice(border, rows), border)):
        own = [factors[:, part].contiguous(), scales, hidden], *slices
        found = stepped(backend, "factored_adam", own, [x[part].contiguous() for x in layer], 5, first_row=first)
        for x, y in zip(found[2:4], whole[2:4], strict=True):
            assert torch.equal(x, y[part])


@on(*CPU)
def test_any_number_of_threads_gives_the_same_bits(backend):
    problem, layer = step_of("hypernet_adam", 3, 4133, 33), exact_layer(4133, 33)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(stepped(backend, "hypernet_adam", problem, layer, 5))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))


@on(*NATIVE, "cuda")
@pytest.mark.parametrize("width", [1, 3, 7, 16, 31, 64, 100])
def test_every_moment_is_written_and_nothing_else(backend, width):
    """NaN in a row's factor reaches that row alone; NaN moments in one row stay there."""
    rows = 37
    problem, layer = step_of("factored_adam", 1, rows, width), exact_layer(rows, width)
    layer[2][5], layer[3][5] = NAN, NAN
    problem[0][0][0, 11] = NAN
    found = stepped(backend, "factored_adam", problem, layer, 2)
    clean = torch.ones(rows, dtype=torch.bool)
    clean[[5, 11]] = False
    for x in (found[0], found[2], found[3]):
        assert x[~clean].isnan().all() and x[clean].isfinite().all()


@on(*NATIVE, "cuda")
@pytest.mark.parametrize("payload", [-1, 0x7FFFFFFF, 0x7F800001, -0x400000, 0x7FC0FFFF], ids=hex)
def test_nan_of_any_bits_stays_nan(backend, payload):
    """Not what an addition makes of its bits."""
    rows = 40
    problem, layer = step_of("factored_adam", 1, rows, 33), exact_layer(rows, 33)
    problem[0][0].view(torch.int32)[0, ::3] = payload
    for number in range(1, 6):
        layer = stepped(backend, "factored_adam", problem, layer, number)
        for x in layer[2:4]:
            assert x[::3].isnan().all() and x[1::3].isfinite().all()


@on(*NATIVE, "cuda")
def test_what_is_at_the_ends_of_the_range(backend):
    """Finite moments stay finite, Inf and NaN what they are, and a second moment that is not 0 is not rounded to 0."""
    largest = torch.finfo(torch.bfloat16).max
    values = torch.tensor([0.0, largest, float("inf"), NAN, 2.0**-133, 2.0**-126])
    m, v = values.repeat(64, 1), values.repeat(64, 1)
    layer = [torch.zeros_like(m), torch.zeros(64), m.bfloat16(), v.bfloat16(), torch.zeros(64), torch.zeros(64)]
    layer[2][:, 1] *= torch.tensor([1, -1]).repeat(32)
    problem = [torch.zeros(1, 64), torch.ones(1), torch.ones(1, 6)], slice(0, 1), slice(2, 4)
    for number in range(1, 40):
        # beta1 and beta2 keep all of m and v but for their last bits: the largest lies between the largest and Inf
        layer = stepped(backend, "factored_adam", problem, layer, number, settings=(0.999, 0.999, 1e-8))
        if number == 1:
            assert layer[2][:, 1].isfinite().all()
    m, v = layer[2].float(), layer[3].float()
    assert (m[:, 0] == 0).all() and (v[:, 0] == 0).all()
    assert m[:, 1].isfinite().all() and v[:, 1].isfinite().all()
    assert m[:, 2].isnan().all() and v[:, 2].isinf().all()  # Inf - Inf in float32 as well
    assert m[:, 3].isnan().all() and v[:, 3].isnan().all()
    assert (v[:, 4] == 2.0**-133).all() and (v[:, 5] > 0).all() and m[:, 4:].isfinite().all()


# The rounding itself


def test_the_random_bits_by_hand():
    """NumPy's 32-bit integers, which wrap."""

    def mixed(x):
        x ^= x >> np.uint32(16)
        x *= np.uint32(0x7FEB352D)
        x ^= x >> np.uint32(15)
        x *= np.uint32(0x846CA68B)
        return x ^ (x >> np.uint32(16))

    entries = np.array([0, 1, 99, 12345, 2**32 - 1, 2**32, 2**32 + 99, 2**36 + 5], dtype=np.uint64)
    for step in (1, 2, 1000, 2**24, 2**31 + 3):
        with np.errstate(over="ignore"):
            number = np.array([(2 * step + 0x9E3779B9) % 2**32, (2 * step + 0x9E3779BA) % 2**32]).astype(np.uint32)
            start, stride = mixed(number)
            x = start + (stride | np.uint32(1)) * (entries & np.uint64(0xFFFFFFFF)).astype(np.uint32)
        first, second = draws(
            torch.from_numpy(entries.astype(np.int64)), torch.tensor(float(step), dtype=torch.float64)
        )
        assert second.tolist() == (x >> np.uint32(16)).tolist()
        assert first.tolist() == ((x ^ (x >> np.uint32(16))) & np.uint32(0xFFFF)).tolist()


@pytest.mark.parametrize("exponent", [0, 10, -130, -140, 120])
@pytest.mark.parametrize("sign", [1, -1])
def test_rounding_goes_up_and_down_with_the_right_mean(exponent, sign):
    """Over all 65536 draws it is the value itself, exactly."""
    values = (sign * (1 + torch.rand(20, dtype=torch.float64)) * 2.0**exponent).float()
    random = torch.arange(65536).expand(20, -1)
    found = rounded(values[:, None].expand(20, 65536).contiguous(), random)
    assert torch.equal(found.double().mean(1), values.double())
    assert all(len(row.unique()) <= 2 for row in found)


def test_an_entrys_draws_are_uniform_over_the_steps_and_those_of_two_entries_uncorrelated():
    entries = torch.tensor([0, 1, 2, 13, 100, 65536, 3 * 65536, 2**20, 203_600_999])
    steps = 4000
    numbers = torch.stack([torch.cat(draws(entries, torch.tensor(s))) for s in range(1, steps + 1)]).double() / 65536
    assert (numbers.mean(0) - 0.5).abs().max() < 4.5 * (12 * steps) ** -0.5
    assert ((numbers - 0.5).square().mean(0) - 1 / 12).abs().max() < 0.01
    centred = numbers - numbers.mean(0)
    correlations = torch.corrcoef(centred.t()) - torch.eye(len(centred[0]))
    assert correlations.abs().max() < 4.5 * steps**-0.5
    following = torch.stack([(centred[:-1, i] * centred[1:, i]).mean() for i in range(len(centred[0]))]) * 12
    assert following.abs().max() < 4.5 * steps**-0.5


@on("cpu-baseline", "emulated")
def test_moments_of_tiny_changes_do_not_stall(backend):
    """They fall by a thousandth a step, less than half of two bfloat16's distance: to the nearest none would move."""
    rows, width, steps = 20, 50, 300
    layer = exact_layer(rows, width)
    layer[2], layer[3] = torch.ones(rows, width).bfloat16(), torch.ones(rows, width).bfloat16()
    problem = [torch.zeros(1, rows), torch.ones(1), torch.ones(1, width)], slice(0, 1), slice(2, 4)
    for number in range(1, steps + 1):
        layer = stepped(backend, "factored_adam", problem, layer, number, settings=(0.999, 0.999, 1e-8))
    to_nearest = torch.ones(()).bfloat16()
    for _ in range(steps):
        to_nearest = (0.999 * to_nearest.float()).bfloat16()
    expected = 0.999**steps  # 0.74
    assert to_nearest == 1
    for moment in layer[2:4]:
        assert abs(moment.double().mean() - expected) < 0.01
        assert moment.double().std() < 0.1


# Bad input


@whoever_is_asked
@pytest.mark.parametrize("op", ["hypernet_adam", "factored_adam"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_m": torch.ones(50, 6).bfloat16()}, "weight_v must be torch.bfloat16, as weight_m, not torch.float32"),
        ({"weight_v": torch.ones(50, 6).bfloat16()}, "weight_v must be torch.float32, as weight, not torch.bfloat16"),
        ({"weight_m": torch.ones(50, 6).half()}, "weight_m must be torch.float32, as weight, not torch.float16"),
    ],
)
def test_moments_of_two_dtypes_are_refused(asked, op, change, message):
    assert_refused(op, asked, change, message)


def test_moments_in_bfloat16_are_those_of_a_float32_layer():
    layer = [x.double() for x in exact_layer(5, 3)]
    layer[2], layer[3] = layer[2].bfloat16(), layer[3].bfloat16()
    rest = torch.zeros(1, 5).double(), torch.ones(1).double(), torch.ones(1, 3).double()
    with pytest.raises(InputError, match="weight_m must be torch.float64, as weight, not torch.bfloat16"):
        ops.factored_adam(*rest, layer[0], *layer[2:4], torch.tensor(1.0), LR)
