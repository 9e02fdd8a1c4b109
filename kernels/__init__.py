"""Triton kernels of the method, one file per op; needs triton and CUDA tensors (or TRITON_INTERPRET=1)."""

from .masked_conv2d import masked_conv2d
from .masked_linear import masked_linear

__all__ = ["masked_conv2d", "masked_linear"]
