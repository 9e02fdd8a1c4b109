"""The hypernetwork's dense output layer with hidden vectors, targets and moments."""

from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

# The last two have more strips of columns and tasks than a block of the CUDA kernels has threads.
SHAPES = [(1, 1), (63, 7), (997, 25), (1000, 100), (500, 100), (4133, 33), (129, 200), (333, 128), (40, 257), (50, 400)]
SIZES = [*product(SHAPES, (0, 1, 3, 6, 10)), ((101, 25), 4), ((3000, 100), 9), ((515, 64), 39)]  # layer, earlier tasks


# Around the number of tasks from which the extension works in larger blocks, and the width up to which it does; widths
# and rows around those of its vectors and blocks. (rows, width, tasks).
MANY = [*product((1, 63, 81), (1, 15, 16, 17, 25, 64), (15, 16, 40)), *product((63, 81), (65, 100), (16, 40))]
MANY += [(8311, 25, 17), (4211, 60, 100)]


class Dense(NamedTuple):
    weight: Tensor  # (N, H)
    bias: Tensor
    hidden: Tensor  # (t + 1, H)
    targets: Tensor  # (t, N), those of the earlier tasks
    moments: list[Tensor]  # weight_m, weight_v, bias_m, bias_v


def dense_problem(rows: int, width: int, tasks: int, weight_v: float = 1e-4, bias_v: float = 1e-4) -> Dense:
    """weight_v, bias_v: the largest second moments."""
    weight, bias = torch.randn(rows, width) * 0.1, torch.randn(rows) * 0.1
    hidden, targets = torch.randn(tasks + 1, width), torch.randn(tasks, rows)
    moments = [0.01 * torch.randn(rows, width), weight_v * torch.rand(rows, width)]
    return Dense(weight, bias, hidden, targets, [*moments, torch.randn(rows), bias_v * torch.rand(rows)])
