"""Memory of a run: how it is asked for, and how much was taken."""

import os
import sys

import torch


def prefer_huge_pages() -> None:
    """Has PyTorch's CPU allocator ask Linux for huge pages, unless the environment has said otherwise.

    A training step walks through the hypernetwork's output layer and its moments, gigabytes of them, once; with
    pages of 4 KB, looking these up costs a good part of that. Takes effect before the process's first large tensor.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def peak_memory(device: torch.device) -> int:
    """Bytes at the peak since the process began: of the GPU's tensors there, of the process on the CPU.

    Returns:
        Bytes; 0 where the operating system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
