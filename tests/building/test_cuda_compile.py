"""The CUDA sources compile for every architecture, to what they are meant to be; launches are laid out right."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from importlib import util
from pathlib import Path

import pytest
import torch

from hypermask_fast.ops.native.dense import dense_shared_bytes, on_tensor_cores

ROOT = Path(__file__).parents[2]
ARCHITECTURES = ("80", "90", "100")
# Registers per thread: four blocks of 256 threads on a multiprocessor, or what the kernel's own number leaves it.
REGISTERS = {
    "dense.cu": 128,  # two blocks
    "few_rows.cu": 232,  # one block of 256 by its shared memory: sums of 32 x 64 outputs and 64 rows of x take 96
    "chunk_few_rows.cu": 168,  # one block of 384: a warp has the logits and weights of 48 x 32 entries
}
# What a kernel reads and writes in bulk goes by 16 bytes: (part of the mangled name, loads, stores) at least, in the
# code for aligned rows and segments. ILi4: packs of 4 floats, ModeE2: Adam, E4: its second half; Lb1: aligned rows.
STREAMS = {
    "masks.cu": [
        ("mask_forward_kernel", 1, 1), ("mask_backward_kernel", 2, 1),
        ("weights_forward_kernel", 2, 1), ("weights_backward_kernel", 3, 2),
        ("drift_forward_kernel", 3, 0), ("drift_backward_kernel", 3, 2),
    ],
    "thresholds.cu": [("count_kernel", 1, 0)],
    "dense.cu": [  # a tile has 4 packs a thread; W of two tiles, m and v of two more
        (r"dense_kernelILi4ELi[48]ELN\w+ModeE2Ef", 24, 12), (r"dense_kernelILi4ELi[48]ELN\w+ModeE1E", 8, 4),
        (r"dense_kernelILi4ELi[48]ELN\w+ModeE0E", 8, 0), (r"dense_kernelILi1ELi[48]ELN\w+ModeE2Ef", 6, 3),
        (r"dense_kernelILi1ELi[48]ELN\w+ModeE1E", 2, 1), (r"dense_kernelILi1ELi[48]ELN\w+ModeE0E", 2, 0),
        (r"dense_kernelILi4ELi[48]ELN\w+ModeE4Ef", 24, 12), (r"dense_kernelILi1ELi[48]ELN\w+ModeE4Ef", 6, 3),
        # Moments in bfloat16 go by 8 bytes.
        (r"dense_kernelILi4ELi[48]ELN\w+ModeE[24]ENS\w+Bfloat16", 8, 4),
        (r"dense_kernelILi1ELi[48]ELN\w+ModeE[24]ENS\w+Bfloat16", 2, 1),
        (r"dense_kernelILi4ELi[48]ELN\w+ModeE3E", 8, 0), (r"dense_kernelILi1ELi[48]ELN\w+ModeE3E", 2, 0),
        # By tensor cores, two packs of the weight at a time.
        (r"dense_tensor_kernelILN\w+ModeE[24]Ef", 24, 6), (r"dense_tensor_kernelILN\w+ModeE[24]ENS\w+Bfloat16", 8, 2),
        (r"dense_tensor_kernelILN\w+ModeE1E", 8, 2), (r"dense_tensor_kernelILN\w+ModeE3E", 8, 0),
    ],
    # Copies to shared memory of W and logits, three stages: in half precision 8 of each, in float32 4.
    "few_rows.cu": [
        (r"\d+masked_linear_kernelI(?:6__half|13__nv_bfloat16)Li[1248]ELb1E", 48, 0),
        (r"\d+masked_linear_kernelIfLi[12]ELb1E", 24, 0),
    ],
    "chunk_few_rows.cu": [(r"chunk_masked_linear_kernelI\w+Li[12]ELb1E", 6, 0)],
}  # fmt: skip
# Products by tensor cores: (part of the mangled name, how many at least), three for one in float32.
TENSOR_CORES = {"dense.cu": [(r"dense_tensor_kernelILN\w+ModeE[12]E", 18), (r"dense_tensor_kernelILN\w+ModeE[34]E", 6)]}
SOURCES = sorted(p.name for p in (ROOT / "csrc/cuda").glob("*.cu"))


def cuobjdump() -> str | None:
    """CUDA's, or the one that comes with Triton."""
    triton = util.find_spec("triton")
    folder = Path(triton.origin).parent / "backends/nvidia/bin" if triton else None
    return shutil.which("cuobjdump") or (folder and shutil.which(str(folder / "cuobjdump")))


def instructions(sass: str) -> dict[str, Counter]:
    """Kernel -> how often each instruction appears in it."""
    found: dict[str, Counter] = {}
    for line in sass.splitlines():
        if match := re.search(r"Function : (\S+)", line):
            count = found[match[1]] = Counter()
        elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]+)", line):
            count[match[1]] += 1
    return found


def check_instructions(source: str, sass: str) -> None:
    kernels = instructions(sass)
    for part, products in TENSOR_CORES.get(source, ()):
        matching = {name: count for name, count in kernels.items() if re.search(part, name)}
        assert matching, part
        for name, count in matching.items():
            assert sum(n for op, n in count.items() if op.startswith("HMMA") and "TF32" in op) >= products, name
    for part, loads, stores in STREAMS.get(source, ()):
        matching = {name: count for name, count in kernels.items() if re.search(part, name)}
        assert matching, part
        for name, count in matching.items():
            wide = Counter({op: n for op, n in count.items() if ".128" in op})
            assert sum(n for op, n in wide.items() if op.startswith("LDG")) >= loads, f"{name}: {wide}"
            assert sum(n for op, n in wide.items() if op.startswith("STG")) >= stores, f"{name}: {wide}"


STRICT = "-Werror=all-warnings"


def built_with_the_package(source: str) -> Path | None:
    """What this environment's own build has made of the source, if nothing has changed since, and a warning would have
    failed it: where NVCC_APPEND_FLAGS says so, as in continuous integration, nvcc need not compile it once more."""
    ninja = shutil.which("ninja", path=os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")]))
    folder = ROOT / "build" / f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    built = folder / "csrc" / "cuda" / source.replace(".cu", ".o")
    if STRICT not in os.environ.get("NVCC_APPEND_FLAGS", "") or not (ninja and built.exists()):
        return None
    would = subprocess.run([ninja, "-C", folder, "-n", built], capture_output=True, text=True)
    return built if would.returncode == 0 and "no work to do" in would.stdout else None


def compiled(source: str, folder: Path) -> Path:
    include = Path(torch.__file__).parent / "include"
    command = ["nvcc", "-O3", "-std=c++17", "--expt-relaxed-constexpr", "--threads=0", "-DUSE_CUDA", STRICT]
    command += ["-DTORCH_TARGET_VERSION=0x020b000000000000", f"-isystem={include}"]
    command += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    built = folder / "out.o"
    done = subprocess.run(
        [*command, "-c", str(ROOT / "csrc/cuda" / source), "-o", str(built)],
        capture_output=True, text=True, env={**os.environ, "TMPDIR": str(folder)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return built


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("source", SOURCES)
def test_what_is_compiled_for_each_architecture(source, tmp_path):
    """No spills; registers and shared memory for the blocks that a multiprocessor is to hold; accesses of 16 bytes."""
    if not (tool := cuobjdump()):
        pytest.skip("no cuobjdump to look at what is compiled with")
    built = built_with_the_package(source) or compiled(source, tmp_path)

    def shown(what: str, arch: str) -> str:
        return subprocess.run(
            [tool, what, "-arch", f"sm_{arch}", built], capture_output=True, text=True, check=True
        ).stdout

    for arch in ARCHITECTURES:
        used = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", shown("-res-usage", arch))
        assert used, f"nothing was compiled for sm_{arch}"
        registers, stack, shared, local = (max(map(int, numbers)) for numbers in zip(*used, strict=True))
        assert (stack, local) == (0, 0), "spilled"
        assert registers <= REGISTERS.get(source, 64)
        # Static; what a launch asks for itself is checked against the GPU's limit there.
        assert shared <= 16 * 1024  # four blocks on an A100's multiprocessor with room for a cache
        check_instructions(source, shown("-sass", arch))


LAUNCH_TEST = r"""
#include "common/launch.h"
#include <cassert>
#include <cstdio>
#include <initializer_list>
#include <utility>
using namespace hypermask;
int main() {
  static_assert(sizeof(int64_t) == 8 && sizeof(decltype(BlockTable::first_block[0])) == 8, "64-bit offsets");
  const int64_t big = (int64_t{1} << 33) + 5;  // more than 2^31 entries in one segment
  const int64_t sizes[] = {0, 1, kTileEntries, 0, kTileEntries + 1, big, 0, 7};
  BlockTable table;
  fill_table(table, sizes, 8);
  int64_t block = 0;
  for (int s = 0; s < 8; ++s) {
    const int64_t blocks = ceil_div(sizes[s], kTileEntries);
    assert(table.first_block[s] == block);
    for (int64_t b : {int64_t{0}, blocks / 2, blocks - 1}) {
      if (b < 0 || b >= blocks) continue;
      assert(BlockTable::find(table, block + b) == s);
      const int64_t begin = (block + b - table.first_block[s]) * kTileEntries;
      assert(begin >= 0 && begin < sizes[s]);
    }
    block += blocks;
  }
  assert(table.first_block[8] == block && (block - 1) * kTileEntries > INT32_MAX);
  for (int64_t width : {1, 2, 3, 4, 25, 50, 100, 128, 255, 256, 257, 1000, 1028, 4096}) {
    for (int64_t tasks : {0, 1, 4, 5, 16, 17, 40, 400}) {
      const DenseLayout l = dense_layout(tasks, width, true);
      assert(l.pack * l.packs == width && l.slots >= tasks && l.slots % l.chunk == 0);
      assert(tasks == 0 || l.slots - tasks < l.chunk);
      assert(l.lanes >= 1 && (l.lanes == 1 || l.lanes * l.packs <= kThreads) && l.rows == kDensePacks * l.lanes);
      assert(l.stride >= width && l.stride % l.pack == 0 && (l.pack == 1 || l.stride / 4 % 2 == 1));
      assert(l.rows % 4 == 0 && l.rows <= kThreads);  // so that everything in shared memory begins on 16 bytes
      const DenseLayout single = dense_layout(tasks, width, false);
      assert(single.pack == 1 && single.packs == width);
      for (const auto& [makes, steps] : {std::pair(false, false), std::pair(true, false), std::pair(true, true)}) {
        const int needed = 4 * dense_shared_floats(l, dense_tiles(l, makes, steps));
        std::printf("%d %d %d %d 0 %d\n", int(tasks), int(width), int(makes), int(steps), needed);
      }
      assert(on_tensor_cores(tasks, width, true) == (tasks >= kTensorTasks && width % 4 == 0));
      if (on_tensor_cores(tasks, width, false) || !on_tensor_cores(tasks, width, true)) continue;
      const DenseLayout t = tensor_layout(tasks, width);
      assert(t.groups * kTensorSide >= width && (t.groups - 1) * kTensorSide < width);
      assert(t.slots >= tasks && t.slots % 8 == 0 && t.slots <= t.blocks * kTensorSide);
      assert(t.rows % kTensorRows == 0 && t.rows <= kThreads && t.hidden_stride >= width);
      assert(t.hidden_stride % 16 == 8 && t.factor_stride % 32 == 8 && t.factor_stride >= t.rows);  // banks
      // What is read of the last columns' group beyond a row's end still lies in the block's shared memory.
      assert(t.groups * kTensorSide - width <= t.factor_floats);
      for (const auto& [makes, steps] : {std::pair(false, false), std::pair(true, false), std::pair(true, true)}) {
        const int needed = 4 * dense_shared_floats(t, dense_tiles(t, makes, steps));
        std::printf("%d %d %d %d 1 %d\n", int(tasks), int(width), int(makes), int(steps), needed);
      }
    }
  }
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_launch_arithmetic(tmp_path):
    source = tmp_path / "launch.cpp"
    source.write_text(LAUNCH_TEST)
    program = str(tmp_path / "launch")
    subprocess.run(["g++", "-std=c++17", "-Wall", f"-I{ROOT / 'csrc'}", str(source), "-o", program], check=True)
    lines = subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines()
    found = [tuple(map(int, line.split())) for line in lines]
    assert sum(not tensor_cores for *_, tensor_cores, _ in found) == 14 * 8 * 3
    for tasks, width, makes, steps, tensor_cores, needed in found:
        assert dense_shared_bytes(tasks, width, bool(makes), bool(steps), bool(tensor_cores)) == needed
    by_tensor_cores = {(tasks, width) for tasks, width, *_, tensor_cores, _ in found if tensor_cores}
    assert by_tensor_cores == {(tasks, width) for tasks, width, *_ in found if on_tensor_cores(tasks, width)}
    assert 2 * (dense_shared_bytes(104, 100, True, True, tensor_cores=True) + 1024 + 256) <= 228 * 1024
    for tasks in (1, 10):  # on an H200's multiprocessor, each with one KiB besides: three that step, four by registers
        assert 3 * (dense_shared_bytes(tasks, 100, True, True) + 1024) <= 228 * 1024
        assert 4 * (dense_shared_bytes(tasks, 100, False, False) + 1024) <= 228 * 1024
