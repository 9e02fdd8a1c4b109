"""csrc/cuda compiled for the CPU: its ops on CPU tensors, each call with a block's threads in two orders."""

import ctypes
import fcntl
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

ROOT = Path(__file__).parents[2]
EMULATION = ROOT / "tests/ops/cuda_emulation"
PROBLEM = "" if shutil.which("g++") else "no g++"
TORCH = Path(torch.__file__).parent
LIBRARIES = [f"-L{TORCH / 'lib'}", "-ltorch", "-ltorch_cpu"]


def flags() -> list[str]:
    defines = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DUSE_CUDA"]
    return ["-O2", "-U_FORTIFY_SOURCE", "-std=c++17", "-fPIC", "-fvisibility=hidden", *defines,
            f"-I{EMULATION}", f"-I{ROOT / 'csrc'}", "-isystem", str(TORCH / "include")]  # fmt: skip


def build(folder: Path) -> Path:
    """Compiles once per folder, however many test processes ask."""
    library = folder / "emulated.so"
    with open(folder / "emulated.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            sources = [*(ROOT / "csrc/cuda").glob("*.cu"), *EMULATION.glob("*.cpp")]
            objects = [folder / f"{s.name}.o" for s in sources]
            commands = [
                ["g++", *flags(), "-x", "c++", "-c", str(s), "-o", str(o)]
                for s, o in zip(sources, objects, strict=True)
            ]
            with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
                list(pool.map(run, commands))
            # Symbolic: this library's answers about devices, not libtorch's, are the ones its own calls get.
            run(["g++", "-shared", "-Wl,-Bsymbolic", *map(str, objects), *LIBRARIES, "-o", f"{library}.part"])
            os.replace(f"{library}.part", library)
    return library


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class Emulation:
    """`emulation.hypernet_adam(*args)` is the op of csrc/cuda, run in ascending and in descending order of threads."""

    def __init__(self, library: Path) -> None:
        torch.ops.load_library(library)
        self.library = ctypes.CDLL(str(library))

    def __getattr__(self, op: str):
        def call(*args):
            copies = tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, args)
            runs = []
            for order, arguments in enumerate((copies, args)):
                self.library.emulation_set_descending(order)
                result = getattr(torch.ops.hypermask_emulated, op)(*arguments)
                runs.append((result, tree_flatten((result, arguments))[0]))
            for x, y in zip(runs[0][1], runs[1][1], strict=True):
                assert not isinstance(x, Tensor) or torch.equal(bits(x), bits(y)), f"{op} depends on the order"
            return runs[1][0]

        return call


def bits(x: Tensor) -> Tensor:
    return x.detach().reshape(-1).view(torch.uint8)
