"""All tensors of a network in one launch: they lie anywhere, each with a segment of the flat space.

Their addresses are arguments of the launch, so that nothing is copied to the device for it and a CUDA graph can hold
it; where each block lies is in a table on the device, made once per network.
"""

import functools
import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import host
from .device import multiple
from .host import cdiv

BLOCK = 2048
MOST = 64  # segments per launch: three addresses each are 1.5 of the 4 KiB that arguments may take


@triton.jit
def tensor_of(pointers, segment, COUNT: tl.constexpr):
    """pointers[segment] of a tuple, whose index would have to be a constant: by comparisons, eight at a time."""
    found = pointers[0]
    for group in tl.static_range(0, COUNT, 8):
        if segment // 8 == group // 8:
            for s in tl.static_range(group, group + 8):
                if s < COUNT:
                    found = tl.where(segment == s, pointers[s], found)
    return found


@triton.jit
def place_of(row_ptr, BY: tl.constexpr, BLOCK: tl.constexpr):
    """A table's row as (first entry in the segment, the same in the flat space, number of entries)."""
    begin, flat, count = tl.load(row_ptr + 1), tl.load(row_ptr + 2), tl.load(row_ptr + 3).to(tl.int32)
    return multiple(begin, BLOCK), multiple(flat, BY), multiple(count, BY)


@triton.jit
def fill_gap(row_ptr, out_ptr, BLOCK: tl.constexpr):
    """Zeros where the row's block lies, which is in no segment."""
    begin, count = tl.load(row_ptr + 2), tl.load(row_ptr + 3)
    local = tl.arange(0, BLOCK)
    tl.store(out_ptr + begin + local, tl.zeros((BLOCK,), out_ptr.dtype.element_ty), mask=local < count)


@functools.lru_cache(maxsize=256)
def tables(offsets: tuple[int, ...], entries: int | None, device: torch.device) -> list[tuple[slice, Tensor]]:
    """For each launch its segments and its blocks: (blocks, 4) int64 on the device, of a block the segment counted
    from the launch's first, the first entry in it and in the flat space, the number of entries.

    With `entries` the first launch also has blocks for what no segment covers of that many; their segment is -1.
    """
    last = len(offsets) - 1
    launches = []
    for first in range(0, last, MOST):
        part = slice(first, min(first + MOST, last))
        ranges = [(s - first, offsets[s], offsets[s + 1]) for s in range(part.start, part.stop)]
        if first == 0 and entries is not None:
            ranges += [(-1, 0, offsets[0]), (-1, offsets[-1], entries)]
        blocks = [
            (segment, at - begin, at, min(BLOCK, end - at))
            for segment, begin, end in ranges
            for at in range(begin, end, BLOCK)
        ]
        table = torch.tensor(blocks, dtype=torch.int64, device=device).view(-1, 4)
        launches.append((part, table))
    return launches


@functools.lru_cache(maxsize=256)
def first_blocks(offsets: tuple[int, ...], device: torch.device) -> Tensor:
    """(segments + 1,) int64 on the device: how many blocks lie before each segment, and all of them."""
    counts = (cdiv(end - begin, BLOCK) for begin, end in itertools.pairwise(offsets))
    return torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int64, device=device)


def borders_of(weights: Sequence[Tensor], offsets: Sequence[int]) -> tuple[int, ...]:
    """Those of the weights' segments: more may follow."""
    return tuple(offsets[: len(weights) + 1])


def constants(offsets: Sequence[int]) -> dict[str, int]:
    """BY and BLOCK of the functions above: all segments begin and end at multiples of BY."""
    return {"BY": host.common_factor(*offsets), "BLOCK": BLOCK}
