"""How far an accelerated op may be from the float64 reference: one table for all tests.

The error of a value is measured against its own size, or, for sums of many terms, against the largest entry of the
result: what the rounding of the terms allows, with room for a few ulp.
"""

from typing import NamedTuple

import torch
from torch import Tensor

EPS = torch.finfo(torch.float32).eps


class Tolerance(NamedTuple):
    """An error may be `absolute`, and `relative` times the value's size, or times the result's largest entry."""

    relative: float
    absolute: float
    of_largest: bool = False


TINY = 1e-37  # lets denormal results round

TOLERANCES = {
    "exact": Tolerance(0.0, 0.0),
    "elementwise": Tolerance(8 * EPS, TINY),  # a few roundings
    "slope": Tolerance(8 * EPS, 4e-15),  # the float64 reference itself cancels in 1 - tanh^2
    "sum": Tolerance(32 * EPS, TINY, of_largest=True),
    "dense": Tolerance(32 * EPS, TINY, of_largest=True),  # of the dense output layer
    "adam100": Tolerance(64 * EPS, TINY, of_largest=True),  # a hundred steps
    # Triton: sums of a few hundred products in another order, measured up to 7e-7 in the interpreter. A GPU's
    # exponential and division are approximate too, an entry of the mask off by up to 6e-7, and cuDNN takes the
    # algorithm that it likes.
    "triton": Tolerance(1e-5 if torch.cuda.is_available() else 2e-6, TINY, of_largest=True),
    # csrc/cuda on a GPU; the dense layer's kernel approximates roots and quotients.
    "cuda": Tolerance(4e-6, TINY, of_largest=True),
    "cuda dense": Tolerance(2e-5, TINY, of_largest=True),
    # A whole network in float32, whose layers' roundings add up; measured up to 4e-6.
    "network": Tolerance(2e-5, 1e-6, of_largest=True),
    # A derivative along all parameters at once: what is left of a sum whose terms cancel.
    "along all": Tolerance(1e-4, 1e-4),
    # Statistics and distances in float64, against a recipe in NumPy, whose pseudo-inverse and sums round otherwise.
    "statistics": Tolerance(1e-9, 1e-12),
    # Half precision without a peer: one rounding of the largest result.
    "float16": Tolerance(2**-10, TINY, of_largest=True),
    "bfloat16": Tolerance(2**-7, TINY, of_largest=True),
    "gradient float16": Tolerance(4 * 2**-10, TINY, of_largest=True),
    "gradient bfloat16": Tolerance(4 * 2**-7, TINY, of_largest=True),
}


def assert_close(
    actual: Tensor, expected: Tensor, kind: str, what: str = "", *, peer: Tensor | None = None, rounding: float = 0.5
) -> None:
    """Compares with the float64 `expected`: same shape, NaN where it has NaN, within TOLERANCES[kind].

    In half precision the yardstick is `peer`, PyTorch's result in that dtype, in place of the table:
    |actual - expected| <= 2 |peer - expected| + rounding * eps, each of the largest entry expected.
    """
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    assert torch.equal(actual.isnan(), expected.isnan()), f"{what}: NaN elsewhere than expected"
    if not expected.numel():
        return
    relative, absolute, of_largest = TOLERANCES[kind]
    if peer is not None:
        of_largest, absolute = True, TINY
        relative = 2 * relative_error(peer, expected) + rounding * torch.finfo(peer.dtype).eps
    kept = ~expected.isnan()
    actual, expected = actual[kept], expected[kept]
    size = expected.abs()
    if of_largest and size.numel():
        size = size.max().expand_as(size)
    error = torch.where(actual == expected, 0.0, (actual - expected).abs())  # Inf equals Inf too
    worst = (error - (absolute + relative * size)).nan_to_num(nan=float("inf"))
    if worst.numel() and worst.max() > 0:
        i = worst.argmax()
        allowed = f"{relative:.2e} of {size[i].item():.3g}"
        raise AssertionError(f"{what}: {actual[i].item()!r} instead of {expected[i].item()!r}, allowed {allowed}")


def assert_all_close(actual, expected, kind: str, what: str = "") -> None:
    """`assert_close` for each pair of two sequences of the same length."""
    for i, (x, y) in enumerate(zip(actual, expected, strict=True)):
        assert_close(x, y, kind, f"{what} {i}")


def relative_error(values: Tensor, expected: Tensor) -> float:
    """The largest error over the largest magnitude expected; NaN where the values have one that is not expected."""
    error = (values.detach().double().cpu() - expected.detach().double().cpu()).abs()
    return (error.max() / expected.detach().double().cpu().abs().max().clamp_min(1e-30)).item()
