"""How much memory a run has taken."""

import sys

import torch


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
