"""How much memory a hypernetwork takes, how much there is, and which chunk size fits."""

import os
import warnings
from collections.abc import Sequence
from itertools import pairwise
from math import inf
from pathlib import Path

import torch

from .errors import InputError

_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
KEPT, WITH_ADAM, TRAINED = 4, 12, 16  # bytes per float32 parameter: by itself, with Adam's moments, and its gradient
ROUNDED = 8  # with moments in bfloat16, which a dense output layer may have: nearly all of a hypernetwork


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
        f"no hypernetwork of hidden widths {tuple(hidden)} trains within {readable(budget)}: the smallest, of "
        f"chunk_size={best}, takes {readable(least)}"
    )


def _chunks(tensors: Sequence[int], chunk: int) -> int:
    return sum(-(-entries // chunk) for entries in tensors)


def check_memory(parameters: int, devices: Sequence[torch.device], hint: str) -> None:
    """Raises InputError where so many parameters don't fit; warns where they fit, but not their training.

    Args:
        devices: where they are to lie; the first one that is too small is named.
        hint: what to do about it.
    """
    kept, trained = readable(parameters * KEPT), readable(parameters * WITH_ADAM)
    for device in devices:
        memory = total_memory(device)
        where = f"the {readable(memory)} of {device.type}"
        if parameters * KEPT > memory:
            raise InputError(
                f"the hypernetwork takes {kept} ({trained} with Adam's moments), more than {where}: {hint}"
            )
        if parameters * WITH_ADAM > memory:
            warnings.warn(
                f"training the hypernetwork takes {trained} with Adam's moments, more than {where}: {hint}",
                stacklevel=4,
            )


def total_memory(device: torch.device) -> float:
    """Bytes that the device has, or that this process may have of them; inf where nothing tells."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return min(_physical(), _cgroup(), _address_space()) if device.type == "cpu" else inf


def _physical() -> float:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on Windows
        return inf


def _cgroup() -> float:
    """What a container, or a job of a cluster, may have."""
    for path in _CGROUP_LIMITS:
        try:
            return int(Path(path).read_text())
        except (OSError, ValueError):  # not there, or "max"
            continue
    return inf


def _address_space() -> float:
    """`ulimit -v`."""
    try:
        import resource
    except ImportError:  # not on Windows
        return inf
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return inf if limit == resource.RLIM_INFINITY else limit


def readable(size: float) -> str:
    """Bytes in words, three digits of them: "34.9 GB"."""
    units = iter(("bytes", "kB", "MB", "GB", "TB", "PB"))
    unit = next(units)
    for larger in units:
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.3g} {unit}"
