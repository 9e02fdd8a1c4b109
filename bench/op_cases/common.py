"""What cases of several kinds of ops share."""

from collections.abc import Sequence
from itertools import accumulate
from math import prod

from torch import Tensor

from ..op_case import Draw

Shapes = Sequence[tuple[int, ...]]
THRESHOLD = 0.5  # of logits that are uniform on (-2, 2): a quarter is dropped
BLOCK = 1 << 20  # entries handled at a time wherever a copy of the largest tensor would show in the peak memory
# Sums over all N entries, which PyTorch in float32 adds up in an order that depends on the number of threads.
OF_SUMS = {"drift": 1e-4, "hidden_grad": 1e-4, "grad/hidden": 1e-4}


def offsets_of(shapes: Shapes) -> tuple[int, ...]:
    return tuple(accumulate((prod(shape) for shape in shapes), initial=0))


def threshold_of(draw: Draw) -> Tensor:
    return draw.full(1, value=THRESHOLD)
