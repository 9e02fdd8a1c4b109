"""A chunked hypernetwork's hidden vectors and output layer, and the logits that they generate."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from hypermask_fast.ops import reference
from support.comparing import gap_threshold, randn


def source_of(
    size: int, chunk_size: int, width: int, start: int, more: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden vectors and output layer that generate entries start to start + size, and `more` chunks beyond."""
    chunks = -(-(start + size) // chunk_size) + more
    hidden, weight = randn(chunks, width, dtype=dtype), randn(chunk_size, width, dtype=dtype) / width**0.5
    return hidden, weight, randn(chunk_size, dtype=dtype)


def generated(source: Sequence[Tensor], start: int, shape: Sequence[int]) -> Tensor:
    """Entry by entry: entry f is hidden[f // C] . weight[f % C] + bias[f % C]."""
    hidden, weight, bias = source
    size = len(weight)
    entries = [hidden[f // size] @ weight[f % size] + bias[f % size] for f in range(start, start + prod(shape))]
    return torch.stack(entries).view(*shape)


def threshold_of(source: Sequence[Tensor], start: int, shape: Sequence[int]) -> Tensor:
    """One that no rounding of the generated logits crosses."""
    return gap_threshold(reference.chunk_logits(*(t.double() for t in source), start, shape))
