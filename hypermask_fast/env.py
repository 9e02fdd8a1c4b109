"""What this installation is and sees, which backend serves which op, and what to type for more.

Printed by `python -m hypermask_fast.env` and `hypermask-fast env`.
"""

import os
import platform
from importlib import metadata

import torch

from . import ops
from .ops import registry
from .ops.paths import MASK_FIRST

_PACKAGES = ("hypermask-fast", "numpy", "safetensors", "scikit-learn", "matplotlib", "pillow", "triton", "tensorboard")
_ISA = ("baseline", "AVX2", "AVX-512")
_NO_DEVICE = "no CUDA device"  # as `registry.problem` begins
_REMEDY = {
    "cpu": "pip install --no-build-isolation .   (needs a C++ compiler; prints what it leaves out)",
    "cuda": "HYPERMASK_CUDA=1 pip install --no-build-isolation .   (needs nvcc 12.8 or later on PATH)",
    "triton": "pip install triton",
}


def report() -> str:
    """Versions, devices, threads and backends, one "name: value" per line, aligned."""
    lines = {
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": f"{torch.__version__} (built for {_built_for()})",
        **{name: _version(name) for name in _PACKAGES},
        "cpu": f"{os.cpu_count()} logical cores, {torch.get_num_threads()} threads used (OMP_NUM_THREADS sets it)",
        **_gpus(),
        **_backends(),
    }
    width = max(map(len, lines)) + 1
    return "\n".join(f"{name + ':':<{width}} {value}" for name, value in lines.items())


def _backends() -> dict[str, str]:
    """Each backend's ops, or why it is not there and what brings it."""
    lines = {}
    if wanted := os.environ.get("HYPERMASK_BACKEND"):
        known = wanted in ("auto", *registry.BACKENDS)
        lines["HYPERMASK_BACKEND"] = (
            wanted if known else f"{wanted}, which is none of auto, {', '.join(registry.BACKENDS)}"
        )
    ready = [name for name in registry.BACKENDS[1:] if not registry.problem(name)]
    for name in registry.BACKENDS[1:]:
        kind = f" ({_ISA[torch.ops.hypermask_fast.cpu_isa(-1)]})" if name == "cpu" and name in ready else ""
        serves = f"ready{kind}: {', '.join(registry.served(name))}"
        lines[f"backend {name}"] = serves if name in ready else registry.problem(name) + _remedy(name)
    served = {op for name in (*ready, MASK_FIRST) for op in registry.served(name)}
    lines[MASK_FIRST] = f"on any device, W * m and then PyTorch's product: {', '.join(registry.served(MASK_FIRST))}"
    rest = sorted(set(ops.__all__) - served - {"kept_rank", "chunked_output_drift"})
    lines["backend reference"] = f"what no other serves: {', '.join(rest) or 'nothing'}"
    return lines


def _remedy(backend: str) -> str:
    """What to type for a backend that is not there, unless its problem says it or all that it lacks is a GPU."""
    problem = registry.problem(backend)
    told = problem.startswith(_NO_DEVICE) or "pip install" in problem
    return "" if told else f"; for it: {_REMEDY[backend]}"


def _built_for() -> str:
    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU only"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return f"not installed (pip install {package})"


def _gpus() -> dict[str, str]:
    if not torch.cuda.is_available():
        return {"gpu": "none that PyTorch sees; training uses the CPU"}
    gpus = {}
    for i in range(torch.cuda.device_count()):
        seen = torch.cuda.get_device_properties(i)
        gpus[f"gpu {i}"] = (
            f"{seen.name}, {seen.total_memory / 2**30:.0f} GiB, compute capability {seen.major}.{seen.minor}"
        )
    return gpus


if __name__ == "__main__":
    print(report())
