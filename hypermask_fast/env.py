"""What is installed, which backend serves which op here, and what to type for more: python -m hypermask_fast.env"""

import os
import platform

import torch

from . import backends, ops

_ISA = ("baseline", "AVX2", "AVX-512")
_REMEDY = {
    "cpu": "pip install --no-build-isolation .   (needs a C++ compiler; prints what it leaves out)",
    "cuda": "HYPERMASK_CUDA=1 pip install --no-build-isolation .   (needs nvcc 12.8 or later on PATH)",
    "triton": "pip install triton",
}


def report() -> str:
    """The text that `python -m hypermask_fast.env` prints."""
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    threads = torch.get_num_threads()
    lines = [f"python {platform.python_version()}, torch {torch.__version__}, {threads} threads, GPU: {cuda}"]
    if not backends.NATIVE_PROBLEM:
        lines.append(f"CPU kernels: {_ISA[torch.ops.hypermask_fast.cpu_isa(-1)]} (HYPERMASK_CPU_ISA)")
    if wanted := os.environ.get("HYPERMASK_BACKEND"):
        lines.append(f"HYPERMASK_BACKEND={wanted}")
    for name in backends.BACKENDS[1:]:
        why = backends.problem(name)
        lines.append(f"{name:9} {why or 'ready: ' + ', '.join(backends.served(name))}")
        if why:
            lines.append(f"{'':9} for it: {_REMEDY[name]}")
    served = {op for name in backends.BACKENDS[1:] if not backends.problem(name) for op in backends.served(name)}
    rest = sorted(set(ops.__all__) - served - {"kept_rank", "chunked_output_drift"})
    lines.append(f"reference {', '.join(rest) or 'nothing but on request'}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
