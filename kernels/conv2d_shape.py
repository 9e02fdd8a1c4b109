"""The geometry of a 2-D convolution: its checks, its output's shape, its constants in a kernel."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .host import check

Pair = tuple[int, int]


def pair(value: int | tuple[int, int]) -> Pair:
    check(not isinstance(value, str), f"padding must be a number or two, not {value!r}")
    return (value, value) if isinstance(value, int) else tuple(value)


@dataclass(frozen=True, slots=True)
class Conv2dShape:
    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int

    @classmethod
    def of(cls, weight: Tensor, stride, padding, dilation, groups: int) -> "Conv2dShape":
        check(weight.dim() == 4, f"weight must be (out, in / groups, kh, kw), not {tuple(weight.shape)}")
        return cls(tuple(weight.shape[2:]), tuple(stride), tuple(padding), tuple(dilation), groups)

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    def __str__(self) -> str:
        """The part of a key that `tune` keeps settings under."""
        pairs = zip("kspd", (self.kernel, self.stride, self.padding, self.dilation), strict=True)
        return "".join(f"{name}{h},{w}" for name, (h, w) in pairs) + f"g{self.groups}"

    def constants(self) -> dict[str, int]:
        names = ("K{}", "STRIDE_{}", "PAD_{}", "DILATION_{}")
        values = (self.kernel, self.stride, self.padding, self.dilation)
        return {n.format(axis): v[i] for n, v in zip(names, values, strict=True) for i, axis in enumerate("HW")}

    def output_size(self, size: tuple[int, int]) -> Pair:
        return tuple(
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(size, self.padding, self.dilation, self.kernel, self.stride, strict=True)
        )

    def check(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        """Raises InputError where x, weight, bias and this geometry do not fit together."""
        check(x.dim() == 4, f"x must be (batch, in, height, width), not {tuple(x.shape)}")
        check(
            len(self.stride) == len(self.padding) == len(self.dilation) == 2
            and min(self.stride) > 0 and min(self.dilation) > 0 and min(self.padding) >= 0,
            "stride and dilation must be pairs of at least 1, padding a pair of at least 0",
        )  # fmt: skip
        check(
            self.groups > 0 and weight.shape[0] % self.groups == 0,
            f"groups must divide the {weight.shape[0]} output channels, {self.groups} does not",
        )
        channels = weight.shape[1] * self.groups
        check(x.shape[1] == channels, f"x must have {channels} channels for this weight, not {x.shape[1]}")
        check(min(self.kernel) > 0, f"the kernel must be at least 1 x 1, not {self.kernel}")
        out = self.output_size(x.shape[2:])
        check(min(out) > 0, f"a kernel of {self.kernel} does not fit into an input of {tuple(x.shape[2:])}")
        if bias is not None:
            check(bias.shape == weight.shape[:1], f"bias must be ({weight.shape[0]},), not {tuple(bias.shape)}")

    def new_output(self, x: Tensor, weight: Tensor) -> Tensor:
        """Empty (batch, out, height', width') in x's memory format."""
        nhwc = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        memory = torch.channels_last if nhwc else torch.contiguous_format
        size = (x.shape[0], weight.shape[0], *self.output_size(x.shape[2:]))
        return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=memory)
