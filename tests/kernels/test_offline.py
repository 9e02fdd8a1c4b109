"""Every kernel compiled for GPUs that are not here: tensor cores used, nothing spilled, shared memory that fits."""

import functools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
MATRIX_INSTRUCTION = {80: "mma", 90: "wgmma", 100: "tcgen05"}
PRODUCTS = {
    "_masked_product", "_weight_gradient", "_masked_convolution", "_chunk_product", "_masked_weight",
    "_task_product", "_task_weight_gradient",
}  # fmt: skip
MASKED_LEFT = {"_masked_product", "_masked_convolution", "_chunk_product", "_task_product"}
GROUPS = {"linear", "convolution", "chunks", "tasks", "elementwise", "targets"}
PRECISIONS = {"float32", "tf32", "float16", "bfloat16"}
TENSOR_CORE_PRECISIONS = PRECISIONS - {"float32"}
HERE = Path(__file__).parent


@functools.cache
def compiled(capability: int) -> dict[str, list[dict]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    environment["TRITON_DEFAULT_FP_FUSION"] = "1"
    command = [sys.executable, str(HERE / "offline.py"), str(capability)]
    answer = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout.splitlines()[-1])


@functools.cache
def compile_all_at_once() -> None:
    """Without xdist's workers, whose tests run beside each other anyway."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compiled, SHARED_LIMIT))


def faults(kernel: dict, capability: int, precision: str) -> list[str]:
    name, on_tensor_cores = kernel["kernel"], precision in TENSOR_CORE_PRECISIONS
    instruction = MATRIX_INSTRUCTION[capability] if kernel["block_m"] >= 64 else "mma"  # wgmma's and tcgen05's least
    found = {
        "spills": kernel["spilled"] > 0,
        "shared memory": kernel["shared"] > SHARED_LIMIT[capability],
        "no tensor cores": name in PRODUCTS and on_tensor_cores and not kernel[instruction],
        "masked weight not in registers": name in MASKED_LEFT
        and on_tensor_cores
        and instruction == "wgmma"
        and not kernel["left from registers"],
    }
    return [fault for fault, there in found.items() if there]


@pytest.mark.parametrize("capability", SHARED_LIMIT)
def test_compiles_well(capability):
    compile_all_at_once()
    found = compiled(capability)
    assert {name.split()[0] for name in found} == GROUPS and {name.split()[1] for name in found} == PRECISIONS
    seen = {kernel["kernel"] for kernels in found.values() for kernel in kernels}
    assert seen >= PRODUCTS | {"_entropy_select", "_mask", "_partial_sums", "_norms", "_gradients"}
    wrong = {
        (name, json.dumps(kernel)): why
        for name, kernels in found.items()
        for kernel in kernels
        if (why := faults(kernel, capability, name.split()[1]))
    }
    assert not wrong


def test_the_asserts_see_a_spill():
    """Tiles too large for the registers must fail the assert above, or it would prove nothing."""
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import offline, torch\n"
        "from hypermask_fast.kernels.settings import Tiles\n"
        "e = torch.empty(256, 256)\n"
        "with offline.compiling(80) as found:\n"
        "    offline.module('masked_linear').launch_weight_gradient(e, e, e, e, e[0, 0], tiles=Tiles(128, 128, 32))\n"
        "print(found[0]['spilled'])"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    answer = subprocess.run([sys.executable, "-c", program, str(HERE)], capture_output=True, text=True, env=environment)
    assert int(answer.stdout.split()[-1]) > 0, answer.stderr
