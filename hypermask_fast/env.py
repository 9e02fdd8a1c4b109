"""What this installation is and sees, which backend serves which op, and what to type for more.

Printed by `python -m hypermask_fast.env` and `hypermask-fast env`.
"""

import os
import platform
from importlib import metadata

import torch

from . import startup, threads
from .ops import OPS, registry

_PACKAGES = ("hypermask-fast", "numpy", "safetensors")
_EXTRAS = {  # package -> the extra that it comes with
    **dict.fromkeys(("scikit-learn", "matplotlib", "pillow", "rich", "tomli-w"), "train"),
    "triton": "triton",
    "tensorboard": "tensorboard",
}
_ISA = ("baseline", "AVX2", "AVX-512")
_NO_DEVICE = "no CUDA device"  # as `registry.problem` begins
_REMEDY = {
    "cpu": "pip install --no-build-isolation .   (needs a C++ compiler; prints what it leaves out)",
    "cuda": "HYPERMASK_CUDA=1 pip install --no-build-isolation .   (needs nvcc 12.8 or later on PATH)",
    "triton": 'pip install "hypermask-fast[triton]"',
}


def report() -> str:
    """Versions, devices, threads and backends, one "name: value" per line, aligned."""
    lines = {
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": f"{torch.__version__} (built for {_built_for()})",
        **{name: _version(name) or "not installed" for name in _PACKAGES},
        **{
            name: _version(name) or f'not installed (pip install "hypermask-fast[{_EXTRAS[name]}]")' for name in _EXTRAS
        },
        **_threads(),
        **_gpus(),
        **_backends(),
    }
    width = max(map(len, lines)) + 1
    return "\n".join(f"{name + ':':<{width}} {value}" for name, value in lines.items())


def _threads() -> dict[str, str]:
    """The processors there are for this process, what it makes of them, and what any other program would set."""
    found, number = threads.processors(), torch.get_num_threads()
    quota = "no quota" if found.quota is None else f"a quota of {found.quota:g} (cgroup)"
    cores = "" if found.cores == found.allowed else f" on {found.cores} cores"
    many, waiting = (threads.said(os.environ, names) for names in (threads.HOW_MANY, threads.HOW_TO_WAIT))
    return {
        "cpu": f"{found.visible} logical cores visible, {found.allowed} in the affinity mask{cores}, {quota}",
        "threads": f"{number} threads used ({_decided(many) or 'as PyTorch chooses; OMP_NUM_THREADS sets it'})",
        "waiting": _decided(waiting) or "OpenMP's default: threads spin for long, which is slow beside other work",
        "in your program": f"set before PyTorch is imported: {_typed(threads.variables({}, found))}",
    }


def _decided(values: dict[str, str]) -> str:
    """Variables that decide something, and whose they are; "" where there are none."""
    who = "the command line" if values.keys() & startup.CHOSEN.keys() else "the environment"
    return f"{_typed(values)}, set by {who}" if values else ""


def _typed(values: dict[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in values.items())


def _backends() -> dict[str, str]:
    """Each backend's ops, or why it is not there and what brings it."""
    lines = {}
    if wanted := os.environ.get("HYPERMASK_BACKEND"):
        known = wanted in ("auto", *registry.BACKENDS)
        lines["HYPERMASK_BACKEND"] = (
            wanted if known else f"{wanted}, which is none of auto, {', '.join(registry.BACKENDS)}"
        )
    others = [name for name in registry.BACKENDS if name != registry.REFERENCE]
    ready = [name for name in others if not registry.problem(name)]
    kinds = {registry.PLAIN: " (PyTorch's own products, on any device)"}
    if "cpu" in ready:
        kinds["cpu"] = f" ({_ISA[torch.ops.hypermask_native.cpu_isa(-1)]})"
    for name in others:
        serves = f"ready{kinds.get(name, '')}: {', '.join(registry.served(name))}"
        lines[f"backend {name}"] = serves if name in ready else registry.problem(name) + _remedy(name)
    rest = sorted(OPS.keys() - {op for name in ready for op in registry.served(name)})
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
    """ "" where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


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
