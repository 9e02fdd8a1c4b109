"""Memory of a run: how it is asked for, and how much was taken."""

import ctypes
import os
import sys

import torch

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # of mallopt, malloc.h
_MIB = 1 << 20


def tune_allocator() -> None:
    """Has the CPU's memory kept once it was asked for, unless the environment has said otherwise.

    Each training step makes temporaries of many megabytes. glibc gives such back to Linux at once, and every page of
    the next ones is then a page fault. For a program to call as it begins.
    """
    if sys.platform != "linux" or "GLIBC_TUNABLES" in os.environ:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries do without
    if mallopt is not None:
        for option, value in ((_MMAP_THRESHOLD, 32 * _MIB), (_TRIM_THRESHOLD, 1024 * _MIB), (_TOP_PAD, 64 * _MIB)):
            mallopt(option, value)


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
