"""A checksum of what a tensor holds: whether it is still the same, by whatever way it was written to."""

import torch
from torch import Tensor

from . import native

_checksum_operator = native.operator("checksum", lambda data: data.new_empty((), dtype=torch.int64))

_LANES, _BLOCK = 64, 64 * 1024  # lanes of 32 bits; bytes
_LANE, _OF_BLOCK, _MIX, _FOLD = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x9E3779B185EBCA87
_AT_ONCE = 256  # blocks
_LOW = 0xFFFFFFFF


def is_fast(tensor: Tensor) -> bool:
    """Whether `checksum` takes about as long as reading the tensor once, and waits for no device."""
    return tensor.device.type == "cpu" and not native.PROBLEM


def checksum(tensor: Tensor) -> int:
    """A 64-bit checksum of a tensor's entries: sum over blocks of 64 KiB of a hash of the block's bytes and number.

    A change of one entry always changes it, another change but for a chance of about 2^-64. Shape and dtype are not
    part of it. The same on every device, and for any number of threads. For a tensor on a GPU it waits.
    """
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return int(_checksum_operator(data) if is_fast(data) else definition(data))


def definition(data: Tensor) -> Tensor:
    """Scalar int64 of (n,) uint8. In a block, 64 lanes take a 32-bit word of each row: l <- M rotate(l ^ word, 13)."""
    total = torch.full((), len(data), dtype=torch.int64, device=data.device)
    for begin in range(0, len(data), _AT_ONCE * _BLOCK):
        part = data[begin : begin + _AT_ONCE * _BLOCK]
        first, whole = begin // _BLOCK, len(part) // _BLOCK * _BLOCK
        for some in (part[:whole].view(-1, _BLOCK), part[None, whole:]):
            if some.numel():
                total = total + _of_blocks(some, first).sum()
            first += len(some)
    return total


def _of_blocks(blocks: Tensor, first: int) -> Tensor:
    """(b,) int64 of b blocks of as many bytes (b, n), the first of which has this number."""
    count, size = blocks.shape
    numbers = torch.arange(first, first + count, device=blocks.device)
    row = 4 * _LANES
    padded = torch.nn.functional.pad(blocks, (0, -size % row)).contiguous()
    words = padded.view(torch.int32).view(count, -1, _LANES).long() & _LOW
    lanes = (torch.arange(_LANES, device=blocks.device) * _LANE + numbers[:, None] * _OF_BLOCK) & _LOW
    for r in range(words.shape[1]):
        mixed = lanes ^ words[:, r]
        turned = (mixed << 13) & _LOW | mixed >> 19
        lanes = turned * _MIX & _LOW  # the low 32 bits are right though the product wraps
    sums = numbers
    for lane in range(_LANES):
        sums = (sums ^ lanes[:, lane]) * (_FOLD - 2**64)
        sums = sums ^ (sums >> 29 & (1 << 35) - 1)
    return sums
