"""csrc/cuda compiled for the CPU: its ops on CPU tensors, each call in two orders of threads, in guarded memory."""

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
LIBRARIES = [f"-L{TORCH / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]


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
    """`emulation.hypernet_adam(*args)` is the op of csrc/cuda on copies of the tensors, run in ascending and in
    descending order of threads; what it writes in place is in the arguments afterwards.

    The ascending run's tensors, outputs and scratch memory included, end at a protected page, the descending run's
    begin behind one: an access beyond an end is an error.
    """

    def __init__(self, library: Path) -> None:
        torch.ops.load_library(library)
        self.library = ctypes.CDLL(str(library))
        self.library.emulation_end.restype = ctypes.c_char_p

    def __getattr__(self, op: str):
        def call(*args):
            runs = [self.run(op, args, order) for order in (0, 1)]
            for x, y in zip(*(tree_flatten(run)[0] for run in runs), strict=True):
                assert not isinstance(x, Tensor) or torch.equal(bits(x), bits(y)), f"{op} depends on the order"
            result, written = runs[1]
            for x, y in zip(tree_flatten(args)[0], tree_flatten(written)[0], strict=True):
                if isinstance(x, Tensor):
                    x.detach().copy_(y)
            return result

        return call

    def run(self, op: str, args: tuple, order: int) -> tuple:
        self.library.emulation_begin(order)
        try:
            copies = tree_map(same_place, args)
            result = getattr(torch.ops.hypermask_emulated, op)(*copies)
        finally:
            damage = self.library.emulation_end().decode()
        assert not damage, f"{op}: {damage}"
        return result, copies


def same_place(x: object) -> object:
    """A copy of a tensor, at an address of the same alignment, up to 16 bytes."""
    if not isinstance(x, Tensor) or x.is_meta or not x.is_contiguous():
        return x
    x = x.detach()
    offset = x.data_ptr() % 16
    memory = torch.empty(offset + x.nbytes, dtype=torch.uint8)
    return memory[offset:].view(x.dtype).view(x.shape).copy_(x)


def bits(x: Tensor) -> Tensor:
    return x.detach().reshape(-1).view(torch.uint8)
