"""How far an accelerated op may be from the float64 reference: one table for all tests.

An entry is (relative, absolute). The error of a value is measured against its own size, or, for sums of many terms
("scale"), against the largest entry of the result: what float32 rounding of the terms allows, with room for a few ulp.
"""

import torch
from torch import Tensor

EPS = torch.finfo(torch.float32).eps

TOLERANCES = {
    "exact": (0.0, 0.0),
    "elementwise": (8 * EPS, 1e-37),  # a few roundings; the last number lets denormal results round
    "slope": (8 * EPS, 4e-15),  # the float64 reference itself cancels in 1 - tanh^2
    "sum": (32 * EPS, 1e-37),  # relative to the largest entry
    "adam100": (64 * EPS, 1e-37),  # a hundred steps, relative to the largest entry
}


def assert_close(actual: Tensor, expected: Tensor, kind: str, what: str = "") -> None:
    """Compares with the float64 `expected`: same shape, NaN where it has NaN, within TOLERANCES[kind]."""
    relative, absolute = TOLERANCES[kind]
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    assert torch.equal(actual.isnan(), expected.isnan()), f"{what}: NaN elsewhere than expected"
    kept = ~expected.isnan()
    actual, expected = actual[kept], expected[kept]
    same = actual == expected  # Inf too
    size = expected.abs()
    if kind in ("sum", "adam100") and size.numel():
        size = size.max().expand_as(size)
    error = torch.where(same, 0.0, (actual - expected).abs())
    worst = (error - (absolute + relative * size)).nan_to_num(nan=float("inf"))
    if worst.numel() and worst.max() > 0:
        i = worst.argmax()
        raise AssertionError(f"{what}: {actual[i].item()!r} instead of {expected[i].item()!r}")
