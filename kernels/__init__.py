"""Triton kernels of the method, one file per op; needs triton and CUDA tensors (or TRITON_INTERPRET=1)."""

from .chunk_masked_conv2d import chunk_masked_conv2d
from .chunk_masked_linear import chunk_masked_linear
from .masked_conv2d import masked_conv2d
from .masked_linear import masked_linear

__all__ = ["chunk_masked_conv2d", "chunk_masked_linear", "masked_conv2d", "masked_linear"]
