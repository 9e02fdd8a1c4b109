"""Every op on every backend that is here, forward, and forward and backward."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from hypermask_fast.ops import OPS
from hypermask_fast.ops.registry import problem

from ..op_case import calling
from .shapes import SHAPES, cases
from .timing import DEVICES, device_and_dtype, directions, param

ONLY_ON = {"cpu": "cpu", "cuda": "cuda", "triton": "cuda"}  # backend -> device; the others run on both
KERNELS = ("cuda", "triton")  # replayed from a graph; the others may look at values, and wait for them
IN_HALF_PRECISION = (
    "masked_linear",
    "masked_conv2d",
    "chunk_masked_linear",
    "chunk_masked_conv2d",
    "task_batched_linear",
)


def benchmarks() -> Iterator[Any]:
    """Shape, op, direction, device and backend; the reference first, which the others are compared with."""
    for shape in SHAPES:
        for op, case in cases(shape).items():
            backends = ["reference", *(name for name in OPS[op].offers if not problem(name))]
            halves = ["cuda-bfloat16"] if "cuda" in DEVICES and op in IN_HALF_PRECISION else []
            for direction in directions(case):
                for device in (*DEVICES, *halves):
                    for backend in backends:
                        if ONLY_ON.get(backend, device) in device:
                            yield param(shape, op, direction, device, backend, device=device)


@pytest.mark.parametrize(("shape", "op", "direction", "device", "backend"), list(benchmarks()))
def test_op(benchmark, timing, shape, op, direction, device, backend):
    case, entry = cases(shape)[op], OPS[op]
    if why := entry.refusal(backend, *case.inputs(direction, *device_and_dtype(device))):
        pytest.skip(why)
    timing(
        benchmark,
        case,
        calling(partial(entry, backend=backend)),
        direction,
        device,
        name=backend,
        baseline="reference",
        group=f"{op}, {shape}, {direction}, {device}",
        graph=backend in KERNELS,
    )
