"""The geometry of a 2-D convolution: its output's shape, its constants in a kernel."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.arguments import Size, pair

Pair = tuple[int, int]


def pairs(stride: Size, padding: Size, dilation: Size) -> tuple[Pair, Pair, Pair]:
    """Each as (height, width). Raises InputError on anything but a number or two, large enough."""
    return pair("stride", stride, 1), pair("padding", padding, 0), pair("dilation", dilation, 1)


@dataclass(frozen=True, slots=True)
class Conv2dShape:
    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int

    @classmethod
    def of(cls, weight: Tensor, stride, padding, dilation, groups: int) -> "Conv2dShape":
        height, width = weight.shape[2:]
        return cls((height, width), tuple(stride), tuple(padding), tuple(dilation), groups)

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    def constants(self) -> dict[str, int]:
        names = ("K{}", "STRIDE_{}", "PAD_{}", "DILATION_{}")
        values = (self.kernel, self.stride, self.padding, self.dilation)
        return {n.format(axis): v[i] for n, v in zip(names, values, strict=True) for i, axis in enumerate("HW")}

    def output_size(self, size: Sequence[int]) -> Pair:
        height, width = (
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(size, self.padding, self.dilation, self.kernel, self.stride, strict=True)
        )
        return height, width

    def output(self, x: Tensor, weight: Tensor) -> tuple[int, int, int, int]:
        """(batch, out, height', width')"""
        return (x.shape[0], weight.shape[0], *self.output_size(x.shape[2:]))

    def new_output(self, x: Tensor, weight: Tensor) -> Tensor:
        """Empty (batch, out, height', width') in x's memory format."""
        nhwc = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        memory = torch.channels_last if nhwc else torch.contiguous_format
        return torch.empty(self.output(x, weight), dtype=x.dtype, device=x.device, memory_format=memory)
