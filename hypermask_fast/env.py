"""What this installation is and sees: `python -m hypermask_fast.env`."""

import os
import platform
from importlib import metadata

import torch

from . import __version__

_PACKAGES = ("numpy", "safetensors", "scikit-learn", "matplotlib", "pillow", "tensorboard")


def report() -> str:
    """Versions, devices and threads, one "name: value" per line, aligned."""
    lines = {
        "hypermask_fast": __version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": f"{torch.__version__} (built for {_built_for()})",
        **{name: _version(name) for name in _PACKAGES},
        "cpu": f"{os.cpu_count()} logical cores, {torch.get_num_threads()} threads used (OMP_NUM_THREADS sets it)",
        **_gpus(),
    }
    width = max(map(len, lines)) + 1
    return "\n".join(f"{name + ':':<{width}} {value}" for name, value in lines.items())


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
