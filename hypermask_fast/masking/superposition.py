"""A pass under the masks of many tasks at once: every parameter reads as sum_t alpha_t W * m_t."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .masks import Convolution, Layer
from .norms import TaskNorm


class Superposition:
    """What such a pass runs under. What tasks have of their own, parameters and statistics, is their mean.

    Attributes:
        weights: one tensor per segment, which gradients can reach.
        ids: of the tasks that are superposed.
    """

    def __init__(self, weights: Sequence[Tensor], ids: Sequence[int]) -> None:
        self.weights, self.ids = tuple(weights), tuple(ids)

    def parameter(self, segment: int, plain: Tensor) -> Tensor:
        return self.weights[segment]

    def own(self, values: nn.ParameterList, plain: Tensor) -> Tensor:
        return torch.stack([values[task].detach() for task in self.ids]).mean(0)

    def tasks(self) -> None:
        return None

    def statistic(self, module: nn.Module, name: str, stacked: Tensor, plain: Tensor) -> Tensor | None:
        rows = stacked[list(self.ids)]
        return rows.mean(0) if rows.is_floating_point() else rows[0]

    def linear(self, layer: Layer, x: Tensor) -> Tensor:
        return F.linear(x, layer.weight, layer.bias)

    def conv2d(self, layer: Convolution, x: Tensor) -> Tensor:
        return layer.convolve(x, layer.weight, layer.bias)

    def batch_norm(self, layer: TaskNorm, x: Tensor, *args: Any) -> Tensor:
        return layer.normalise(x, *args)
