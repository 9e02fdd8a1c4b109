"""Moments in bfloat16: stochastic rounding, by random bits that are a function of entry and step alone.

They are the same on every backend (csrc/common/rounding.h), from any number of threads and processes, and after a
resume. Where a float32 x lies between the bfloat16 a and b, rounded(x) is b with the probability (x - a) / (b - a),
else a. So its mean is x, and a change far smaller than the distance of two bfloat16 is made now and then, where
rounding to the nearest would never make it.
"""

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_CUT_FROM = 0x7F7F0000  # the largest bfloat16; what is rounded up from there would be Inf


def draws(entries: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """Random integers 0 to 65535 of a step, for the first and for the second moment of entries.

    x = start + stride * entry modulo 2^32, start and stride mixed from the step. The bits of an entry are independent
    from step to step, and those of two entries in one step are uncorrelated.

    Args:
        entries: int64, each a row's number among the rows of all processes, times the width, plus the column.
        step: one entry, a whole number.
    """
    number = 2 * step.reshape(()).to(torch.int64) + 0x9E3779B9
    x = (_mixed(number) + _product(entries, _mixed(number + 1) | 1)) & _MASK
    high = x >> 16
    return (x ^ high) & 0xFFFF, high


def _mixed(x: Tensor) -> Tensor:
    """A permutation of the 32-bit integers in which every bit reaches every bit (lowbias32 by C. Wellons)."""
    x = x & _MASK
    x = _product(x ^ (x >> 16), 0x7FEB352D)
    x = _product(x ^ (x >> 15), 0x846CA68B)
    return x ^ (x >> 16)


def _product(x: Tensor, factor: Tensor | int) -> Tensor:
    """x * factor modulo 2^32, without leaving int64."""
    x = x & _MASK
    return (x * (factor & 0xFFFF) + (((x * (factor >> 16)) & 0xFFFF) << 16)) & _MASK


def rounded(value: Tensor, random: Tensor, *, positive: bool = False) -> Tensor:
    """A float32 tensor as bfloat16: up or down, with a mean of `value`.

    Finite values stay finite, Inf and NaN what they are, and 0 is 0.

    Args:
        random: integers 0 to 65535 of the same shape.
        positive: nothing becomes 0 that was not, because it is divided by; such values become 2^-133.
    """
    bits = value.view(torch.int32)
    result = torch.where(bits & 0x7FFFFFFF < _CUT_FROM, bits + random.to(torch.int32), bits) >> 16
    if positive:
        result = torch.where((result == 0) & (bits != 0), 1, result)
    result = result.to(torch.int16).view(torch.bfloat16)
    return torch.where(value.isnan(), torch.nan, result)
