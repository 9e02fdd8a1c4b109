"""How much memory a hypernetwork takes, how much there is, and which chunk size fits."""

import os
import warnings
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import torch

from .errors import InputError

TRAINED, KEPT = 16, 4  # bytes per float32 parameter: with its gradient and Adam's two moments, and by itself


def parameters(tensors: Sequence[int], inputs: int, hidden: Sequence[int], chunk: int | None, of_chunk: int) -> int:
    """How many parameters a hypernetwork has besides the tasks' embeddings.

    The trunk, inputs + hidden layers, and after it, with N entries in all and H the last hidden width,

        dense: N (H + 1);  in chunks: C (H + 1) + chunks * of_chunk.

    Args:
        tensors: entries of each tensor that chunks are not to straddle; a single number where they may.
        inputs: size of a task's embedding; of_chunk: of a chunk's embedding, which comes beside it.
        hidden: widths; chunk: C, or None for a dense one.
    """
    size, rows, of_chunks = sum(tensors), chunk, 0
    if chunk is None:
        rows = size
    else:
        inputs, of_chunks = inputs + of_chunk, _chunks(tensors, chunk) * of_chunk
        rows = min(chunk, max(tensors))
    trunk = sum((a + 1) * b for a, b in pairwise((inputs, *hidden)))
    return trunk + rows * (hidden[-1] + 1) + of_chunks


def chunk_size(tensors: Sequence[int], inputs: int, hidden: Sequence[int], of_chunk: int, budget: int) -> int:
    """The largest C whose hypernetwork trains within `budget` bytes: `TRAINED` times its parameters.

    Raises:
        InputError: there is none.
    """
    row = hidden[-1] + 1
    fixed = parameters(tensors, inputs, hidden, 1, of_chunk) - row - sum(tensors) * of_chunk
    room = budget // TRAINED - fixed
    chunk = min(room // row, max(tensors))
    while chunk > 0:  # fewer entries in a chunk make more chunks, whose embeddings take room too
        fitting = min((room - _chunks(tensors, chunk) * of_chunk) // row, chunk)
        if fitting == chunk:
            return chunk
        chunk = fitting
    best = max(1, round((sum(tensors) * of_chunk / row) ** 0.5))
    least = TRAINED * parameters(tensors, inputs, hidden, best, of_chunk)
    raise InputError(
        f"no hypernetwork of hidden widths {tuple(hidden)} trains within {shown(budget)}: the smallest, of "
        f"chunk_size={best}, takes {shown(least)}"
    )


def _chunks(tensors: Sequence[int], chunk: int) -> int:
    return sum(-(-entries // chunk) for entries in tensors)


def check_memory(parameters: int, devices: Sequence[torch.device], hint: str) -> None:
    """Raises InputError where so many parameters don't fit; warns where they fit, but not their training.

    Args:
        devices: where they are to lie; the first one that is too small is named.
        hint: what to do about it.
    """
    for device in devices:
        memory = total_memory(device)
        if memory is None:
            continue
        where = f"the {shown(memory)} of {device.type}"
        if parameters * KEPT > memory:
            raise InputError(
                f"the hypernetwork takes {shown(parameters * KEPT)} ({shown(parameters * (TRAINED - 4))} with Adam's "
                f"moments), more than {where}: {hint}"
            )
        if parameters * (TRAINED - 4) > memory:
            warnings.warn(
                f"training the hypernetwork takes {shown(parameters * (TRAINED - 4))} with Adam's moments, more than "
                f"{where}: {hint}",
                stacklevel=4,
            )


def total_memory(device: torch.device) -> int | None:
    """Bytes that a device has; of the CPU what this process may use. None: not known."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type != "cpu" or not hasattr(os, "sysconf"):
        return None
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # of a container
        with suppress(OSError, ValueError):
            limits.append(int(Path("/sys/fs/cgroup", name).read_text(encoding="ascii")))
    return min(limits)


def shown(count: int) -> str:
    """Bytes in words, such as "34.9 GB"."""
    for unit, size in (("GB", 10**9), ("MB", 10**6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1000:.1f} kB"
