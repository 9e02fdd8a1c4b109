"""Adam's step of many tensors in one call: the numbers of PyTorch's fused Adam."""

import pytest
import torch
from support.backends import EXTENSION, instruction_set
from support.tolerances import assert_close
from torch.library import opcheck

SIZES = [(), (13,), (16,), (400, 41), (3, 16384), (0,), (7, 5)]  # whole vectors and what is left behind them, and cuts
DECAYS = {"plain": (0.0, False, False), "l2": (0.1, False, False), "decoupled": (0.1, True, False)}
DECAYS |= {"maximize": (0.0, False, True), "all": (0.1, True, True), "l2, maximize": (0.1, False, True)}
pytestmark = pytest.mark.native


def drawn(seed=0):
    """Weights, both moments and counters, which differ."""
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(size, generator=generator) for size in SIZES]
    first = [torch.randn(size, generator=generator) * 1e-2 for size in SIZES]
    second = [torch.rand(size, generator=generator) * 1e-4 for size in SIZES]
    return weights, first, second, [torch.tensor(float(i % 3)) for i in range(len(SIZES))]


def stepped(step, beta1=0.9, times=3, **settings):
    weights, first, second, counts = drawn()
    for i in range(times):
        grads = drawn(1 + i)[1]
        step(weights, grads, first, second, counts, beta1)
    return [*weights, *first, *second, *counts]


def pytorchs(decay, decoupled, maximize):
    def step(weights, grads, first, second, counts, beta1):
        function = torch._fused_adamw_ if decoupled else torch._fused_adam_
        numbers = {"lr": 1e-2, "beta1": beta1, "beta2": 0.999, "eps": 1e-8, "weight_decay": decay}
        torch._foreach_add_(counts, 1)
        function(weights, grads, first, second, [], counts, **numbers, amsgrad=False, maximize=maximize)

    return step


def ours(decay, decoupled, maximize):
    def step(weights, grads, first, second, counts, beta1):
        settings = 1e-2, beta1, 0.999, 1e-8, decay, decoupled, maximize
        EXTENSION.fused_adam(weights, grads, first, second, counts, *settings)

    return step


@pytest.mark.parametrize("beta1", [0.9, 0.3])
@pytest.mark.parametrize("isa", ["avx2", "avx512"])
@pytest.mark.parametrize("name", DECAYS)
def test_to_the_bit_with_fused_multiply_adds(name, isa, beta1):
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("PyTorch runs without fused multiply-adds")
    with instruction_set(isa):
        found, expected = stepped(ours(*DECAYS[name]), beta1), stepped(pytorchs(*DECAYS[name]), beta1)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("name", DECAYS)
def test_to_rounding_without_them(name):
    with instruction_set("baseline"):
        found = stepped(ours(*DECAYS[name]))
    for a, b in zip(found, stepped(pytorchs(*DECAYS[name])), strict=True):
        assert_close(a, b.double(), "sum")


def test_the_same_bits_from_one_thread_and_two():
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(stepped(ours(0.1, False, False)))
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *found))


def test_opcheck():
    weights, first, second, counts = drawn()
    opcheck(
        EXTENSION.fused_adam.default,
        (weights, first, first[:], second, counts, 1e-2, 0.9, 0.999, 1e-8, 0, False, False),
    )
    opcheck(EXTENSION.count_steps.default, (counts,))


@pytest.mark.parametrize(
    ("which", "bad", "told"),
    [
        (1, lambda t: t[:-1], "there must be a gradient, two moments and a counter for each of the 7 weights"),
        (1, lambda t: [t[0].double(), *t[1:]], "a gradient must be float32"),
        (2, lambda t: [*t[:3], t[3].t(), *t[4:]], "a first moment must be contiguous"),
        (3, lambda t: [*t[:-1], t[-1][:1]], r"a second moment must have shape \(7, 5\), not \(1, 5\)"),
        (4, lambda t: [torch.zeros(2), *t[1:]], "a counter must have one entry, not 2"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_stepped(which, bad, told):
    weights, first, second, counts = drawn()
    arguments = [weights, [t.clone() for t in first], first, second, counts]
    before = [t.clone() for t in (*weights, *first, *second, *counts)]
    arguments[which] = bad(arguments[which])
    with pytest.raises(RuntimeError, match=f"fused_adam: {told}"):
        EXTENSION.fused_adam(*arguments, 1e-2, 0.9, 0.999, 1e-8, 0.0, False, False)
    assert all(map(torch.equal, before, (*weights, *first, *second, *counts)))
