"""What was measured on what: the machine's name, versions, and the rates its floors are computed with."""

import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from hypermask_fast import __version__, threads
from hypermask_fast.ops.registry import problem

# Settings that whole runs are made under, as environment variables of every contender. As shipped, glibc returns every
# large temporary to the kernel and pays page faults for the next, and OpenMP's threads spin for long while they wait;
# tuned, freed memory is kept and a thread that waits soon sleeps.
_KEEP = f"glibc.malloc.mmap_threshold={1 << 40}:glibc.malloc.trim_threshold={1 << 40}:glibc.malloc.top_pad={1 << 26}"
AS_SHIPPED = "as shipped"
MALLOC: dict[str, dict[str, str]] = {AS_SHIPPED: {}, "tuned": {"GLIBC_TUNABLES": _KEEP, **threads.WAITING}}
_DECIDING = ("GLIBC_TUNABLES", "THP_MEM_ALLOC_ENABLE", *threads.HOW_TO_WAIT)


def environment(malloc: str) -> dict[str, str]:
    """This process's environment under a setting, whatever it says of allocator and waiting by itself."""
    return {name: value for name, value in os.environ.items() if name not in _DECIDING} | MALLOC[malloc]


def malloc_setting(malloc: str) -> str:
    """The variables of a setting as one would type them."""
    return typed(MALLOC[malloc])


def typed(variables: dict[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in variables.items())


def describe(device: torch.device) -> dict[str, Any]:
    """Columns of the results file that are the same for a whole run."""
    backend = _backend(device)
    if device.type == "cuda":
        name = kind = torch.cuda.get_device_name(device)
    else:  # one name of a CPU may come with several instruction sets
        name = _cpu_name()
        kind = f"{name} {backend.removeprefix('cpu')}"
    return {
        "machine": slug(kind, os.cpu_count() or 1),
        "device": name,
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "library": __version__,
        "triton": version("triton"),
        "hypnettorch": version("hypnettorch"),
        "backend": backend,
        "commit": commit(),
    }


def slug(name: str, cores: int) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + f"-{cores}-cores"


def _cpu_name() -> str:
    with suppress(OSError, StopIteration), open("/proc/cpuinfo") as file:
        return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    return platform.processor() or platform.machine()


def version(package: str) -> str:
    """Of an installed package, "" where it is not there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def driver() -> str:
    """Version of NVIDIA's driver, "" where there is none."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with suppress(OSError, IndexError):
        return subprocess.run(command, capture_output=True, text=True).stdout.splitlines()[0].strip()
    return ""


def device_lost() -> bool:
    """Whether the GPU is lost to this process: after a fault in a kernel every later call fails as well."""
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def first_line(error: Exception) -> str:
    """An error's kind and the first line of what it says."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _backend(device: torch.device) -> str:
    """The fastest backend that is there for this device, and the instruction set the CPU's kernels use."""
    names = ("cuda", "triton") if device.type == "cuda" else ("cpu",)
    there = [name for name in names if not problem(name)]
    if there == ["cpu"]:
        return f"cpu ({('baseline', 'AVX2', 'AVX-512')[torch.ops.hypermask_native.cpu_isa(-1)]})"
    return "+".join(there) or "reference"


def commit() -> str:
    """The checkout's commit, with a "+" where files differ from it."""
    root = Path(__file__).parents[1]

    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], cwd=root, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        head = git("rev-parse", "--short", "HEAD")
        # Results are written between the runs of one measurement: they do not change what is measured.
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
    except OSError:
        return os.environ.get("HYPERMASK_COMMIT", "")
    return head + ("+" if changed else "") or os.environ.get("HYPERMASK_COMMIT", "")


def rates(device: torch.device, quick: bool = False) -> dict[str, float]:
    """Bytes and operations per second, each the best of several tries.

    "bandwidth": in place over an array larger than any cache (on a GPU: a copy), bytes read plus bytes written;
    "float32", "bfloat16": a large matrix product. `quick`: over small ones, to see that it works.
    """
    if device.type == "cuda":
        source = torch.randn(1 << (20 if quick else 28), device=device)
        target = torch.empty_like(source)
        found = {"bandwidth": 8 * source.numel() / _best(lambda: target.copy_(source), device)}
        del source, target
        sizes = {"float32": 4096, "bfloat16": 8192}
    else:
        array = torch.rand(1 << (20 if quick else 26)).add_(0.5)
        found = {"bandwidth": 8 * array.numel() / _best(lambda: array.mul_(0.9999), device)}
        del array
        sizes = {"float32": 2048}
    for dtype, n in sizes.items():
        n = 256 if quick else n
        a, b = (torch.randn(n, n, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
        out = torch.empty_like(a)
        found[dtype] = 2 * n**3 / _best(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device)
    return found


def _best(run: Callable[[], object], device: torch.device, tries: int = 7) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    best = float("inf")
    for _ in range(tries):
        wait()
        began = time.perf_counter()
        run()
        wait()
        best = min(best, time.perf_counter() - began)
    return best
