"""Every kernel compiled for GPUs that are not here: tensor cores used, nothing spilled, shared memory that fits."""

import functools
import itertools
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import pytest

SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
MATRIX_INSTRUCTION = {80: "mma", 90: "wgmma", 100: "tcgen05"}
PRODUCTS = {
    "masked_linear._masked_product", "masked_linear._weight_gradient",
    "masked_conv2d._masked_convolution", "masked_conv2d._weight_gradient",
    "chunk_masked_linear._chunk_product", "chunk_weights._masked_weight", "chunk_weights._gradients",
    "task_batched_linear._task_product", "task_batched_linear._task_weight_gradient",
}  # fmt: skip
MASKED_LEFT = {
    "masked_linear._masked_product", "masked_conv2d._masked_convolution", "chunk_masked_linear._chunk_product",
    "task_batched_linear._task_product",
}  # fmt: skip
OF_SEGMENTS = {
    "masked_weights._masked_weights", "masked_weights._gradients", "weight_drift._partial_sums",
    "weight_drift._gradients",
}  # fmt: skip
OTHERS = {
    "semi_binary_mask._mask", "entropy_select._entropy_select", "weight_drift._norms", "masked_linear._sum_splits",
    "masked_conv2d._finish_gradients",
}  # fmt: skip
GROUPS = {"linear", "convolution", "pointwise", "chunks", "tasks", "elementwise", "targets", "ones"}
PRECISIONS = {"float32", "tf32", "float16", "bfloat16"}
# Bytes that every load of a tile has at least where all is contiguous and aligned. Rows of 100 halves allow 8 at a
# time, and so does a tile of x of 8 rows. (As operands in TF32 Hopper takes what is not transposed only.)
WIDTHS = {"linear": 16, "pointwise": 16, "tasks": 16, "elementwise": 16, "chunks": 8}
WIDE_KERNELS = PRODUCTS | OF_SEGMENTS
VECTORS = {"bias", "ob", "order", "offsets"}  # one entry per row or column: not tiles
# Bytes that may be spilled with one version of Triton, because it does not matter: with 3.6 one address of the chunked
# product in float32, stored before the loop and read once in each step. ptxas does so to keep to 80 registers, with
# which three programs run on a multiprocessor; 3.7 and newer need no spill, so the setting stays.
SPILLS = {("3.6", "chunk_masked_linear._chunk_product", "float32"): 8}
TRITON = ".".join(version("triton").split(".")[:2])
TENSOR_CORE_PRECISIONS = PRECISIONS - {"float32"}
HERE = Path(__file__).parent


def offline(*command: str) -> str:
    """The last line that Python prints in a process where Triton compiles."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE), *(p for p in sys.path if p)])
    environment["TRITON_DEFAULT_FP_FUSION"] = "1"
    answer = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout.splitlines()[-1]


@functools.cache
def compiled(capability: int) -> dict[str, list[dict]]:
    return json.loads(offline(str(HERE / "offline.py"), str(capability)))


@functools.cache
def compiled_grid(capability: int) -> dict[str, list[dict]]:
    return json.loads(offline(str(HERE / "grid.py"), str(capability)))


@functools.cache
def compile_all_at_once() -> None:
    """Without xdist's workers, whose tests run beside each other anyway."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda job: job[0](job[1]), itertools.product((compiled, compiled_grid), SHARED_LIMIT)))


def narrow(kernel: dict, group: str) -> bool:
    """Whether some tile is loaded in pieces smaller than its alignment allows."""
    tiles = {name: size for name, size in kernel["loads"].items() if name not in VECTORS}
    weights = [tiles.get(name, 16) for name in ("w", "a", "g")]
    return min(tiles.values(), default=0) < WIDTHS[group] or min(weights) < 16


def faults(kernel: dict, capability: int, group: str, precision: str) -> list[str]:
    name, on_tensor_cores = kernel["kernel"], precision in TENSOR_CORE_PRECISIONS
    instruction = MATRIX_INSTRUCTION[capability] if kernel["block_m"] >= 64 else "mma"  # wgmma's and tcgen05's least
    found = {
        "spills": kernel["spilled"] > SPILLS.get((TRITON, name, precision), 0),
        "shared memory": kernel["shared"] > SHARED_LIMIT[capability],
        "no tensor cores": name in PRODUCTS and on_tensor_cores and not kernel[instruction],
        "tensor cores in float32": precision == "float32" and any(kernel[i] for i in MATRIX_INSTRUCTION.values()),
        "TF32": name in PRODUCTS and kernel["tf32"] != (precision == "tf32"),
        "masked weight not in registers": name in MASKED_LEFT
        and on_tensor_cores
        and instruction == "wgmma"
        and not kernel["left from registers"],
        "narrow loads": group in WIDTHS and name in WIDE_KERNELS and precision != "tf32" and narrow(kernel, group),
    }
    return [fault for fault, there in found.items() if there]


@pytest.mark.parametrize("capability", SHARED_LIMIT)
def test_compiles_well(capability):
    compile_all_at_once()
    found = compiled(capability)
    assert {name.split()[0] for name in found} == GROUPS and {name.split()[1] for name in found} == PRECISIONS
    seen = {kernel["kernel"] for kernels in found.values() for kernel in kernels}
    assert seen == PRODUCTS | OF_SEGMENTS | OTHERS
    wrong = {
        (name, json.dumps(kernel)): why
        for name, kernels in found.items()
        for kernel in kernels
        if (why := faults(kernel, capability, *name.split()))
    }
    assert not wrong


@pytest.mark.parametrize("capability", SHARED_LIMIT)
def test_every_setting_that_the_heuristics_give_fits(capability):
    """In mixed dtypes too, as under autocast: W and logits of 4 bytes beside products in half precision."""
    compile_all_at_once()
    found = compiled_grid(capability)
    assert {kernel["kernel"] for kernels in found.values() for kernel in kernels} >= PRODUCTS
    wrong = {}
    for name, kernels in found.items():
        group, dtype, _ = name.split()
        precision = "tf32" if dtype == "float32" else dtype
        for kernel in kernels:
            why = faults(kernel, capability, group, precision)
            if group == "chunks":  # whose logits are a product in the layer's own dtype
                why = [fault for fault in why if fault != "TF32"]
            if why:
                wrong[name, json.dumps(kernel)] = why
    assert not wrong


def test_the_asserts_see_spills_and_narrow_loads():
    """Tiles too large for the registers, and rows of odd length, must fail the assert above; else it proves nothing."""
    program = (
        "import json, offline, torch\n"
        "from hypermask_fast.kernels.tiles import Tiles\n"
        "e, odd = torch.empty(256, 256), torch.empty(64, 1001)\n"
        "with offline.compiling(80) as found:\n"
        "    offline.module('masked_linear').launch_weight_gradient(e, e, e, e, e[0, 0], tiles=Tiles(128, 128, 32))\n"
        "    offline.module('masked_linear').launch_product(odd, odd, odd, e[0, 0], None, Tiles(64, 64, 32, 8))\n"
        "print(json.dumps(found))"
    )
    large, odd = json.loads(offline("-c", program))
    assert faults(large, 80, "linear", "float32") == ["spills"]
    assert faults(odd, 80, "linear", "float32") == ["narrow loads"]


def test_a_mask_of_more_entries_than_32_bits_count():
    """Entries of one run, all under one threshold, are counted in 64 bits, as are the addresses."""
    program = (
        "import json, offline, torch\n"
        "e = torch.empty(16)\n"
        "with offline.compiling(90):\n"
        "    kernel = offline.module('semi_binary_mask')._mask.warmup(\n"
        "        e, e, None, e, None, 2**31, 2**21, BACKWARD=False, WITH_SLOPE=False, BLOCK=1024, grid=(1,))\n"
        "print(json.dumps(kernel.asm['ttir']))"
    )
    arithmetic = re.findall(r"arith\.(?:addi|muli) .*: (?:tensor<\d+x)?(i\d+)", json.loads(offline("-c", program)))
    assert len(arithmetic) >= 4 and set(arithmetic) == {"i64"}
