"""csrc/cuda compiled for the CPU: its ops on CPU tensors, each call in two orders of threads, in guarded memory."""

import ctypes
import fcntl
import os
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent / "cuda_emulation"
BUILT = ROOT / "build/emulation"
TORCH = Path(torch.__file__).parent
FLAGS = [
    *("-O2", "-U_FORTIFY_SOURCE", "-std=c++17", "-fPIC", "-fvisibility=hidden"),
    *("-DTORCH_TARGET_VERSION=0x020b000000000000", "-DUSE_CUDA", "-DHYPERMASK_EMULATED"),
    *(f"-I{HERE}", f"-I{ROOT / 'csrc'}", "-isystem", str(TORCH / "include")),
]
# A variable that is read before it was written has any value on a device. Here it has a pattern that no test takes for
# a right answer (GCC from 12 on).
PATTERN = "-ftrivial-auto-var-init=pattern"
# Symbolic: this library's answers about devices, not libtorch's, are the ones its own calls get.
LINK = ["-shared", "-Wl,-Bsymbolic", f"-L{TORCH / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]


# The environment's own programs need not be on PATH.
NINJA = shutil.which("ninja", path=os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")]))
PROBLEM = "" if shutil.which("g++") and NINJA else "no g++ or no ninja"


def flags() -> list[str]:
    probe = subprocess.run(["g++", PATTERN, "-fsyntax-only", "-x", "c++", os.devnull], capture_output=True)
    return FLAGS if probe.returncode else [*FLAGS, PATTERN]


def rules() -> str:
    """What ninja is to do. It compiles again what has changed, included headers and flags as well."""
    sources = sorted((ROOT / "csrc/cuda").glob("*.cu"))
    # These define the schemas.
    schemas = [ROOT / "csrc/cpu" / f"{source.stem}.cpp" for source in sources]
    objects = {f"{s.parent.name}_{s.name}.o": s for s in [*sources, *schemas, *sorted(HERE.glob("*.cpp"))]}
    lines = [
        "rule compile",
        f"  command = g++ {shlex.join(flags())} -MD -MF $out.d -x c++ -c $in -o $out",
        "  deps = gcc",
        "  depfile = $out.d",
        "rule link",
        f"  command = g++ $in {shlex.join(LINK)} -o $out",
        *(f"build {name}: compile {source}" for name, source in objects.items()),
        f"build emulated.so: link {' '.join(objects)}",
    ]
    return "\n".join([*lines, ""])


def build() -> Path:
    """The library, compiled as far as it has changed since the last time, however many test processes ask."""
    BUILT.mkdir(parents=True, exist_ok=True)
    with open(BUILT / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (BUILT / "build.ninja").write_text(rules())
        done = subprocess.run([NINJA, "-C", BUILT], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
    return BUILT / "emulated.so"


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
