"""Fingerprints of the weights that make a task's features, to see whether statistics are still of these weights."""

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..masking.norms import OWN
from .features import TaskModel

# `ops.checksum` would do as well, but without the extension and on a GPU it takes a call for every 256 bytes.
_AT_ONCE = 1 << 17  # words of 8 bytes that are mixed at a time
_ODD = 0x9E3779B97F4A7C15 - 2**64
_LOW = 0xFFFFFFFF
_SAMPLE = 64  # entries of a tensor that are looked at every time


def fingerprints(model: TaskModel, tasks: Iterable[int]) -> dict[int, bytes]:
    """Of each task, 32 bytes of all that its features are made of: shared parameters and buffers, and its own.

    Exact integer sums over the tensors' bits and their places, so the same on every device and with any number of
    threads. Reads every weight once.
    """
    tasks = tuple(tasks)
    shared, own = hashlib.sha256(), {task: hashlib.sha256() for task in tasks}
    for name, tensor, task in _parts(model):
        if task is None:
            _feed(shared, name, tensor)
        elif task in own:
            _feed(own[task], name.replace(f".{task}", ".*"), tensor)
    return {task: hashlib.sha256(shared.digest() + digest.digest()).digest() for task, digest in own.items()}


def glance(model: TaskModel) -> tuple:
    """What differs once a weight was changed: in place (version counters), exchanged, or through `.data` as a whole
    (a few entries of each tensor are looked at, those of a view are not worth a pass over all weights)."""
    tensors = [tensor.detach() for _, tensor, _ in _parts(model)]
    places = tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)  # noqa: SLF001
    few = [t.flatten()[:: max(1, t.numel() // _SAMPLE)].double() for t in tensors if t.numel()]
    sums = torch.stack([f.mean() for f in few] + [f.square().mean() for f in few]).tolist()
    return places, tuple(map(repr, sums))


def _parts(model: TaskModel) -> Iterator[tuple[str, Tensor, int | None]]:
    """Name, tensor, and whose it is (None: all tasks') of everything that decides features."""
    plain = {id(parameter) for parameter, _ in model.own_values()}
    own: dict[int, int] = {id(e): task for task, e in enumerate(model.hypernet.embeddings)}
    for _, values in model.own_values():
        own |= {id(value): task for task, value in enumerate(values)}
    for name, parameter in model.named_parameters():
        if id(parameter) not in plain:
            yield name, parameter, own.get(id(parameter))
    stacked = {id(buffer) for module in model.statistics() for buffer in module.stacked().values()}
    for name, buffer in model.named_buffers():
        if id(buffer) in stacked:
            for task, row in enumerate(buffer):
                yield f"{name}.{task}", row, task
        elif not name.rpartition(".")[2].startswith(OWN):
            yield name, buffer, None


def _feed(digest: Any, name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    bits = tensor.detach().contiguous().flatten().view(torch.uint8)
    if bits.storage_offset() % 8:
        bits = bits.clone()
    whole = len(bits) // 8 * 8
    if whole:
        digest.update(_sum(bits[:whole].view(torch.int64)).cpu().numpy().tobytes())
    digest.update(bits[whole:].cpu().numpy().tobytes())


def _sum(words: Tensor) -> Tensor:
    """Of (n,) words a scalar: each is mixed with its place first, so that words which change places show."""
    total = words.new_zeros(())
    for begin in range(0, len(words), _AT_ONCE):
        part = words[begin : begin + _AT_ONCE]
        places = torch.arange(begin, begin + len(part), device=words.device)
        mixed = (part ^ (part >> 32 & _LOW)) * _ODD * (2 * places + 1)
        total += (mixed ^ (mixed >> 32 & _LOW)).sum()
    return total
