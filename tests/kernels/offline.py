"""Compile what a call would launch, for GPUs that are not here: no device, the launch functions' own choices.

Run as a program outside the interpreter (`python -m tests.kernels.offline CASES...` is what test_offline does). A stand-in
driver tells Triton which GPU it "has"; every launch then stops after the compilation, whose facts are kept.
"""

import re
import subprocess
import types
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from hypermask_fast.kernels import host

SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class _Driver:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, capability: int):
        self.capability = capability
        limit = {
            "max_shared_mem": SHARED_LIMIT[capability],
            "multiprocessor_count": MULTIPROCESSORS[capability],
        }
        self.utils = types.SimpleNamespace(get_device_properties=lambda device: limit)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # one kernel cache per capability

    def get_current_stream(self, device: int) -> int:
        return 0


def resources(cubin: bytes) -> dict[str, int]:
    """Registers per thread and bytes of local memory (spills, stack) of a cubin, by cuobjdump."""
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_CUOBJDUMP), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": found["REG"], "local": found["STACK"] + found["LOCAL"]}


@contextmanager
def compiling(capability: int):
    """Within it launches compile only; yields the list of what was compiled, as dictionaries."""
    compiled: list[dict] = []
    run = JITFunction.run

    def record(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        ptx = kernel.asm["ptx"]
        compiled.append(
            {
                "kernel": self.__name__,
                "warps": kernel.metadata.num_warps,
                "shared": kernel.metadata.shared,
                "wgmma": "wgmma.mma_async" in ptx or "tcgen05.mma" in ptx,
                "from_registers": re.search(r"wgmma\.mma_async[^{;]*\{[^}]*\},\s*\{", ptx) is not None,
                "mma": "mma.sync" in ptx,
                **resources(kernel.asm["cubin"]),
            }
        )
        return kernel

    saved = host.check_runnable, host.multiprocessors, host.capability
    host.check_runnable = lambda tensor: None
    host.multiprocessors = lambda index: MULTIPROCESSORS[capability]
    host.capability = lambda index: capability
    JITFunction.run = record
    triton.runtime.driver.set_active(_Driver(capability))
    try:
        with torch.no_grad():
            yield compiled
    finally:
        JITFunction.run = run
        host.check_runnable, host.multiprocessors, host.capability = saved
