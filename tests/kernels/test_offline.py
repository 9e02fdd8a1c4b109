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
SPILLED_LIMIT = 16  # bytes: a few registers saved around a call (a division's subroutine), none in the loops
MATRIX_INSTRUCTION = {80: "mma", 90: "wgmma", 100: "tcgen05"}
PRODUCTS = {
    "_masked_product", "_weight_gradient", "_masked_convolution", "_chunk_product", "_masked_weight",
    "_task_product", "_task_weight_gradient",
}  # fmt: skip
MASKED_LEFT = {"_masked_product", "_masked_convolution", "_chunk_product", "_task_product"}
GROUPS = ["linear", "convolution", "chunks", "tasks", "elementwise"]
PRECISIONS = ["float32", "tf32", "float16", "bfloat16"]
HERE = Path(__file__).parent


@functools.cache
def everything() -> dict[int, dict[str, list[dict]]]:
    """What all kernels compile to, one process per capability beside each other."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(SHARED_LIMIT, pool.map(compiled, SHARED_LIMIT), strict=True))


def compiled(capability: int) -> dict[str, list[dict]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    environment["TRITON_DEFAULT_FP_FUSION"] = "1"
    command = [sys.executable, str(HERE / "offline.py"), str(capability)]
    answer = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout.splitlines()[-1])


@pytest.mark.parametrize("capability", SHARED_LIMIT)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_compiles_well(capability, group, precision):
    if group == "elementwise" and precision == "tf32":
        pytest.skip("no products in it")
    kernels = everything()[capability][f"{group} {precision}"]
    assert kernels
    for kernel in kernels:
        assert kernel["spilled"] <= SPILLED_LIMIT, kernel
        assert kernel["shared"] <= SHARED_LIMIT[capability], kernel
        if kernel["kernel"] in PRODUCTS and precision != "float32":
            assert kernel[MATRIX_INSTRUCTION[capability]], kernel
        if kernel["kernel"] in MASKED_LEFT and precision != "float32" and capability == 90:
            assert kernel["left from registers"], kernel


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
    answer = subprocess.run(
        [sys.executable, "-c", program, str(HERE)], capture_output=True, text=True, env=environment
    )
    assert int(answer.stdout.split()[-1]) > SPILLED_LIMIT, answer.stderr
