"""MaskedLinear and MaskedConv2d: nn.Linear and nn.Conv2d with a mask."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..errors import InputError
from .access import MaskedModule, masked_parameter, parameter_of, replicate
from .scope import PLAIN


class LayerMask(NamedTuple):
    """A mask for one layer called on its own, outside of a HyperMask model.

    Attributes:
        logits: the weight's mask logits, of its shape.
        threshold: of the weight's |logits|, one entry.
        bias_logits: the bias's mask logits, of its shape; None leaves the bias as it is.
        bias_threshold: of the bias's |logits|, one entry; None with them.
    """

    logits: Tensor
    threshold: Tensor
    bias_logits: Tensor | None = None
    bias_threshold: Tensor | None = None


class _Masked(MaskedModule):
    """What both masked layers share: parameters that read as the running pass has them, and a mask of their own."""

    weight: Any = masked_parameter("weight")
    bias: Any = masked_parameter("bias")

    _replicate_for_data_parallel = replicate

    def _running(self) -> Any:
        """The pass that this call is within; None where the layer is an ordinary one."""
        running = None if self.mask_scope is None else self.mask_scope.running
        return None if running is PLAIN else running

    def _check_mask(self, mask: LayerMask, weight: Tensor, bias: Tensor | None) -> None:
        if not isinstance(mask, LayerMask):
            raise InputError(f"a layer on its own takes a LayerMask(logits, threshold), not {type(mask).__name__}")
        logits, _, bias_logits, bias_threshold = mask
        if (bias_logits is None) != (bias_threshold is None):
            raise InputError("a mask's bias_logits and bias_threshold go together, one is missing")
        if bias_logits is not None and bias is not None and bias_logits.shape != bias.shape:
            shape = tuple(bias_logits.shape)
            raise InputError(f"bias_logits must have the bias's shape {tuple(bias.shape)}, not {shape}")
        if logits.shape != weight.shape:
            raise InputError(
                f"mask logits must have the weight's shape {tuple(weight.shape)}, not {tuple(logits.shape)}"
            )

    def _parts_by(self, mask: LayerMask) -> tuple[Tensor, Tensor | None]:
        """The weight as it is, and the bias under its mask."""
        weight, bias = self.weight, self.bias
        self._check_mask(mask, weight, bias)
        if bias is None or mask.bias_logits is None or mask.bias_threshold is None:
            return weight, bias
        return weight, bias * ops.semi_binary_mask(mask.bias_logits, mask.bias_threshold)

    def _check_dtype(self, x: Tensor) -> None:
        dtype = parameter_of(self, "weight").dtype
        if x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
            raise InputError(f"{type(self).__name__} has weights of {dtype}: its input must be too, not {x.dtype}")


class MaskedLinear(_Masked, nn.Linear):
    """y = x (W * m)^T + b * m_b: nn.Linear with a mask; same constructor, same parameter names.

    Inside a HyperMask model the mask comes from the running task. Alone it takes a `LayerMask`, and without one
    is an ordinary nn.Linear.
    """

    def forward(self, input: Tensor, mask: LayerMask | None = None) -> Tensor:
        """input: (..., in_features), the weight's dtype -> (..., out_features). Raises InputError on another shape."""
        if input.dim() == 0 or input.shape[-1] != self.in_features:
            raise InputError(f"MaskedLinear expects input (..., {self.in_features}), not {tuple(input.shape)}")
        self._check_dtype(input)
        if mask is not None:
            weight, bias = self._parts_by(mask)
            return ops.masked_linear(input, weight, mask.logits, mask.threshold, bias)
        running = self._running()
        return F.linear(input, self.weight, self.bias) if running is None else running.linear(self, input)


class MaskedConv2d(_Masked, nn.Conv2d):
    """y = conv2d(x, W * m) + b * m_b: nn.Conv2d with a mask; same constructor, same parameter names.

    Inside a HyperMask model the mask comes from the running task. Alone it takes a `LayerMask`, and without one
    is an ordinary nn.Conv2d.
    """

    def forward(self, input: Tensor, mask: LayerMask | None = None) -> Tensor:
        """input: (batch, in_channels, h, w) or (in_channels, h, w). Raises InputError on another shape."""
        if input.dim() not in (3, 4) or input.shape[-3] != self.in_channels:
            raise InputError(
                f"MaskedConv2d expects input (batch, {self.in_channels}, height, width), not {tuple(input.shape)}"
            )
        self._check_dtype(input)
        if mask is not None:
            return self._forward_masked(input, mask)
        running = self._running()
        return self._conv_forward(input, self.weight, self.bias) if running is None else running.conv2d(self, input)

    def geometry(self, x: Tensor) -> tuple | None:
        """Stride, padding, dilation and groups for `ops.masked_conv2d`; None where it can't serve: x without a batch,
        padding other than by a number of zeros."""
        if x.dim() != 4 or self.padding_mode != "zeros" or isinstance(self.padding, str):
            return None
        return self.stride, self.padding, self.dilation, self.groups

    def padded(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """x, padded where that is more than a number of zeros, and the zeros (height, width) still to pad it with."""
        if self.padding_mode == "zeros" and not isinstance(self.padding, str):
            return x, self.padding
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return F.pad(x, self._reversed_padding_repeated_twice, mode), (0, 0)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """This layer's convolution, padding mode included, with another weight and bias."""
        return self._conv_forward(x, weight, bias)

    def _forward_masked(self, x: Tensor, mask: LayerMask) -> Tensor:
        weight, bias = self._parts_by(mask)
        geometry = self.geometry(x)
        if geometry is None:
            return self._conv_forward(x, weight * ops.semi_binary_mask(mask.logits, mask.threshold), bias)
        return ops.masked_conv2d(x, weight, mask.logits, mask.threshold, bias, *geometry)


CALLED: dict[type, type] = {nn.Linear: MaskedLinear, nn.Conv2d: MaskedConv2d}  # layers with kernels of their own
