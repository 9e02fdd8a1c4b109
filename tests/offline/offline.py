"""Compile what a call would launch on a GPU that is not here, by the launch functions' own choice of settings.

`python offline.py 90`, outside the interpreter, compiles every kernel for compute capability 9.0 and prints what came
out as JSON. A stand-in driver tells Triton which GPU it "has", and every launch stops after the compilation.
"""

import functools
import itertools
import json
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile

import torch
import triton
from torch import empty
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import hypermask_fast.kernels  # noqa: F401 (fills sys.modules)
from hypermask_fast.kernels import host
from hypermask_fast.kernels.conv2d_shape import Conv2dShape
from hypermask_fast.ops.task_rows import TaskRows

SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}
PRECISIONS = {"float32": torch.float32, "tf32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_SOURCES = {file.name: file.read_text().splitlines() for file in Path(host.__file__).parent.glob("*.py")}
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def module(name: str) -> types.ModuleType:
    return sys.modules[f"hypermask_fast.kernels.{name}"]  # the package's attribute is the function of that name


class _Driver:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, capability: int):
        self.capability = capability
        facts = {
            "max_shared_mem": SHARED_LIMIT[capability],
            "multiprocessor_count": MULTIPROCESSORS[capability],
        }
        self.utils = types.SimpleNamespace(get_device_properties=lambda device: facts)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # one kernel cache per capability

    def get_current_stream(self, device: int) -> int:
        return 0


def resources(cubin: bytes) -> dict[str, int]:
    """Registers per thread and bytes of local memory (spills) of a cubin."""
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_CUOBJDUMP), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": found["REG"], "spilled": found["STACK"] + found["LOCAL"]}


def loads(ptx: str) -> dict[str, int]:
    """The fewest bytes that a thread takes at once, by the pointer's name ("" where the compiler lost it).

    Tiles and vectors are loaded under a mask, so with a predicate; numbers like the threshold are not."""
    found: dict[str, int] = {}
    name = ""
    for line in ptx.splitlines():
        if place := re.search(r"\.loc\s.*// (\w+\.py):(\d+):", line):
            file, number = place.groups()
            text = _SOURCES[file][int(number) - 1] if file in _SOURCES else ""
            pointer = re.search(r"tl\.load\((\w+?)(?:_ptr|_at)\b", text)
            name = pointer[1] if pointer else ""
        elif plain := re.search(r"@!?%p\d+ ld\.global[\w.:]*?(?:\.v(\d))?\.[bfus](\d+)", line):
            size = int(plain[1] or 1) * int(plain[2]) // 8
        elif copied := re.search(r"cp\.async\.c[ag]\.shared\.global [^;]*?, (0x\w+)", line):
            size = int(copied[1], 16)
        else:
            continue
        if not place:
            found[name] = min(size, found.get(name, size))
    return found


@functools.cache  # launches of one variant share their kernel
def facts(kernel) -> dict:
    """What the tests assert on: resources, and which matrix instructions the PTX holds."""
    ptx = kernel.asm["ptx"]
    return {
        "warps": kernel.metadata.num_warps,
        "shared": kernel.metadata.shared,
        "mma": "mma.sync" in ptx,
        "wgmma": "wgmma.mma_async" in ptx,
        "tcgen05": "tcgen05.mma" in ptx,
        "tf32": re.search(r"mma[\w.:]*tf32", ptx) is not None,
        # wgmma's left operand: four registers in braces, or the descriptor of a tile in shared memory
        "left from registers": re.search(r"wgmma\.mma_async[^{;]*\{[^}]*\},\s*\{", ptx) is not None,
        "loads": loads(ptx),
        **resources(kernel.asm["cubin"]),
    }


@contextmanager
def compiling(capability: int) -> Iterator[list[dict]]:
    """Within it launches compile only; yields the list of what was compiled."""
    compiled: list[dict] = []
    run = JITFunction.run

    def record(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        name = f"{self.fn.__module__.rsplit('.')[-1]}.{self.__name__}"  # two files may each have a kernel of one name
        compiled.append({"kernel": name, "block_m": options.get("BLOCK_M", 64), **facts(kernel)})
        return kernel

    saved = host.check_runnable, host.gpu
    host.check_runnable = lambda tensor: None
    host.gpu = lambda device: host.Gpu(capability, MULTIPROCESSORS[capability])
    JITFunction.run = record
    triton.runtime.driver.set_active(_Driver(capability))
    try:
        yield compiled
    finally:
        JITFunction.run = run
        host.check_runnable, host.gpu = saved


def linear(dtype: torch.dtype) -> None:
    op = module("masked_linear")
    weight, logits, threshold = empty(1024, 1000, dtype=dtype), empty(1024, 1000, dtype=dtype), empty((), dtype=dtype)
    for rows in (8, 256):
        x, grad = empty(rows, 1000, dtype=dtype), empty(rows, 1024, dtype=dtype)
        op.launch_product(x, weight, logits, threshold, empty(1024, dtype=dtype))
    op.launch_product(grad, weight.t(), logits.t(), threshold, None)
    op.launch_weight_gradient(grad, x, weight, logits, threshold)


def convolution(dtype: torch.dtype) -> None:
    op = module("masked_conv2d")
    threshold, bias = empty((), dtype=dtype), empty(64, dtype=dtype)
    weight, shape = empty(64, 64, 3, 3, dtype=dtype), Conv2dShape((3, 3), (1, 1), (1, 1), (1, 1), 1)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = empty(32, 64, 32, 32, dtype=dtype, memory_format=memory_format)
        y = torch.empty_like(x)
        op.launch_convolution(x, weight, weight, threshold, bias, y, shape)
        if memory_format is torch.contiguous_format:
            op.launch_convolution(y, weight, weight, threshold, None, x, shape, transposed=True)
            op.launch_weight_gradient(y, x, weight, weight, threshold, shape)
    wide = empty(1024, 512, 3, 3, dtype=dtype)  # enough tiles of its own: the epilogue writes dW and da
    x, y = empty(8, 512, 7, 7, dtype=dtype), empty(8, 1024, 7, 7, dtype=dtype)
    op.launch_weight_gradient(y, x, wide, wide, threshold, Conv2dShape((3, 3), (1, 1), (1, 1), (1, 1), 1))


def pointwise(dtype: torch.dtype) -> None:
    op, shape = module("masked_conv2d"), Conv2dShape((1, 1), (1, 1), (0, 0), (1, 1), 1)
    x = empty(32, 64, 32, 32, dtype=dtype, memory_format=torch.channels_last)
    weight, y, threshold = empty(64, 64, 1, 1, dtype=dtype), torch.empty_like(x), empty((), dtype=dtype)
    op.launch_convolution(x, weight, weight, threshold, empty(64, dtype=dtype), y, shape)
    op.launch_convolution(y, weight, weight, threshold, None, x, shape, transposed=True)
    op.launch_weight_gradient(y, x, weight, weight, threshold, shape)


def chunks(dtype: torch.dtype) -> None:
    weight, threshold, bias = empty(1024, 1024, dtype=dtype), empty((), dtype=dtype), empty(1024, dtype=dtype)
    for rows, width in ((8, 100), (64, 64)):
        source = empty(128, width, dtype=dtype), empty(8192, width, dtype=dtype), empty(8192, dtype=dtype)
        x = empty(rows, 1024, dtype=dtype)
        y = module("chunk_masked_linear").launch_fused(x, weight, *source, 0, threshold, bias)
        assert y is not None, "these chunks hold whole rows"
    op = module("chunk_weights")
    op.launch_masked_weight(weight, *source, 0, threshold, dtype)
    op.launch_gradients(weight, weight, *source, 0, threshold, (True,) * 4)


def tasks(dtype: torch.dtype) -> None:
    op = module("task_batched_linear")
    x, weight, thresholds = empty(256, 1024, dtype=dtype), empty(1000, 1024, dtype=dtype), empty(10, dtype=dtype)
    logits, bias = empty(10, 1000, 1024, dtype=dtype), empty(10, 1000, dtype=dtype)
    for ids in (None, torch.zeros(256, dtype=torch.int64)):
        y = empty(*(() if ids is not None else (10,)), 256, 1000, dtype=dtype)
        table = () if ids is None else TaskRows.of(ids, 10)[1:]
        op.launch_task_product(x, weight, logits, thresholds, bias, y, *table)
        op.launch_task_weight_gradient(y, x, weight, logits, thresholds, *table)


CONVOLUTIONS = (  # in, out, side, kernel, stride: ResNet-20 at width 32 (stages, transitions), ResNet-50, batch 32
    (3, 16, 32, 3, 1), (16, 32, 32, 3, 1), (32, 32, 32, 3, 1), (32, 64, 32, 3, 2), (64, 64, 16, 3, 1),
    (64, 128, 16, 3, 2), (128, 128, 8, 3, 1), (128, 128, 28, 3, 1), (512, 512, 7, 3, 1), (64, 256, 56, 1, 1),
    (1024, 256, 14, 1, 1),
)  # fmt: skip
MLP = ((1000, 1024), (1000, 1000), (10, 1000))  # permuted-mnist


def targets(dtype: torch.dtype) -> None:
    """The shapes that are measured, as they are measured."""
    threshold = empty((), dtype=dtype)
    _target_linear(dtype, threshold)
    _target_convolutions(dtype, threshold)
    _target_tasks(dtype)


def _target_linear(dtype: torch.dtype, threshold: torch.Tensor) -> None:
    op, chunk = module("masked_linear"), module("chunk_masked_linear")
    weight = empty(4096, 4096, dtype=dtype)
    for rows in (1, 16, 64, 256, 8192):
        x = empty(rows, 4096, dtype=dtype)
        op.launch_product(x, weight, weight, threshold, weight[0])
        op.launch_product(x, weight.t(), weight.t(), threshold, None)
        op.launch_weight_gradient(x, x, weight, weight, threshold)
    for width in (64, 100):
        chunks = -(-weight.numel() // 8000)
        source = empty(chunks, width, dtype=dtype), empty(8000, width, dtype=dtype), empty(8000, dtype=dtype)
        for rows in (1, 64):
            found = chunk.launch_fused(empty(rows, 4096, dtype=dtype), weight, *source, 0, threshold, weight[0])
            assert found is not None, "33 rows begin at one position of their chunks"
        second = empty(1000, 1000, dtype=dtype)  # the MLP's second layer behind its first, weight and bias
        found = chunk.launch_fused(empty(64, 1000, dtype=dtype), second, *source, 1025000, threshold, None)
        assert found is not None, "these chunks hold whole rows"
        module("chunk_weights").launch_masked_weight(weight, *source, 0, threshold, dtype)
        module("chunk_weights").launch_gradients(weight, weight, *source, 0, threshold, (True,) * 4)


def _target_convolutions(dtype: torch.dtype, threshold: torch.Tensor) -> None:
    op = module("masked_conv2d")
    for inputs, outputs, side, kernel, stride in CONVOLUTIONS:
        shape = Conv2dShape((kernel, kernel), (stride, stride), (kernel // 2, kernel // 2), (1, 1), 1)
        weight, bias = empty(outputs, inputs, kernel, kernel, dtype=dtype), empty(outputs, dtype=dtype)
        x = empty(32, inputs, side, side, dtype=dtype).contiguous(memory_format=torch.channels_last)
        y = shape.new_output(x, weight)
        op.launch_convolution(x, weight, weight, threshold, bias, y, shape)
        op.launch_convolution(y, weight, weight, threshold, None, x, shape, transposed=True)
        op.launch_weight_gradient(y, x, weight, weight, threshold, shape)


def _target_tasks(dtype: torch.dtype) -> None:
    op, thresholds = module("task_batched_linear"), empty(10, dtype=dtype)
    for outputs, inputs in MLP:
        weight, logits = empty(outputs, inputs, dtype=dtype), empty(10, outputs, inputs, dtype=dtype)
        for rows, ids in ((1000, None), (256, torch.zeros(256, dtype=torch.int64))):
            table, every = ((), (10,)) if ids is None else (TaskRows.of(ids, 10)[1:], ())
            x, y = empty(rows, inputs, dtype=dtype), empty(*every, rows, outputs, dtype=dtype)
            op.launch_task_product(x, weight, logits, thresholds, weight[:, 0], y, *table)
            dx = empty(*every, rows, inputs, dtype=torch.float32 if ids is None else dtype)
            op.launch_task_product(y, weight.t(), logits.transpose(1, 2), thresholds, None, dx, *table)
            op.launch_task_weight_gradient(y, x, weight, logits, thresholds, *table)


def elementwise(dtype: torch.dtype) -> None:
    logits, thresholds = empty(10, 4096, dtype=dtype), empty(10, 1, dtype=dtype)
    ops = torch.ops.hypermask_triton
    ops.semi_binary_mask_with_slope(logits, thresholds)
    ops.semi_binary_mask_backward(logits, logits, thresholds)
    ops.entropy_select(empty(10, 64, 100, dtype=dtype))
    weights = [empty(64, 64, dtype=dtype), empty(64, dtype=dtype)] * 22  # as many tensors as ResNet-20 has
    offsets = [0, *itertools.accumulate(w.numel() for w in weights)]
    flat, thresholds = empty(offsets[-1], dtype=dtype), empty(44, dtype=dtype)
    masked = weights, flat, thresholds, offsets
    ops.masked_weights(*masked)
    ops.masked_weights_backward(weights, *masked, (True, True))
    for norm in (1, 2):
        arguments = weights, flat, offsets, norm, flat, thresholds
        _, norms = ops.weight_drift(*arguments)
        ops.weight_drift_backward(empty(()), norms, *arguments)


def ones(dtype: torch.dtype) -> None:
    """Sizes of 1, which Triton makes constants of the kernel: code that treats them as values no longer compiles."""
    threshold, one, row = empty((), dtype=dtype), empty(1, dtype=dtype), empty(1, 1, dtype=dtype)
    linear, convolution = module("masked_linear"), module("masked_conv2d")
    linear.launch_product(row, row, row, threshold, one)
    linear.launch_weight_gradient(row, row, row, row, threshold)
    for channels, groups, side in ((1, 1, 1), (8, 8, 9)):  # one channel in all, one channel a group
        x, weight = empty(1, channels, side, side, dtype=dtype), empty(channels, 1, 3, 3, dtype=dtype)
        shape = Conv2dShape((3, 3), (1, 1), (1, 1), (1, 1), groups)
        convolution.launch_convolution(x, weight, weight, threshold, empty(channels, dtype=dtype), x, shape)
        convolution.launch_convolution(x, weight, weight, threshold, None, x, shape, transposed=True)
        convolution.launch_weight_gradient(x, x, weight, weight, threshold, shape)
    module("chunk_masked_linear").launch_fused(row, row, row, row, one, 0, threshold, one)
    module("chunk_weights").launch_masked_weight(row, row, row, one, 0, threshold, dtype)
    module("chunk_weights").launch_gradients(row, row, row, row, one, 0, threshold, (True,) * 4)
    tasks = module("task_batched_linear")
    for y, table in ((row[None], ()), (row, TaskRows.of(torch.zeros(1, dtype=torch.int64), 1)[1:])):
        tasks.launch_task_product(row, row, row[None], one, row, y, *table)
        tasks.launch_task_weight_gradient(y, row, row, row[None], one, *table)
    ops, masked = torch.ops.hypermask_triton, ([one], one, one, [0, 1])
    ops.semi_binary_mask_with_slope(row, row)
    ops.semi_binary_mask_backward(row, row, row)
    ops.entropy_select(row[None])
    ops.masked_weights(*masked)
    ops.masked_weights_backward([one], *masked, (True, True))
    arguments = [one], one, [0, 1], 2, one, one
    _, norms = ops.weight_drift(*arguments)
    ops.weight_drift_backward(empty(()), norms, *arguments)


ONCE = (targets, ones)  # in bfloat16 only


def compile_everything(capability: int) -> dict[str, list[dict]]:
    """What each group of kernels compiles to, per precision."""
    found = {}
    for precision, dtype in PRECISIONS.items():
        setting = "tf32" if precision == "tf32" else "ieee"
        torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = setting
        for group in (linear, convolution, pointwise, chunks, tasks, elementwise, targets, ones):
            if (group is elementwise and precision == "tf32") or (group in ONCE and precision != "bfloat16"):
                continue
            with compiling(capability) as compiled:
                group(dtype)
            unique = {json.dumps(kernel): kernel for kernel in compiled}
            found[f"{group.__name__} {precision}"] = list(unique.values())
    return found


if __name__ == "__main__":
    print(json.dumps(compile_everything(int(sys.argv[1]))))
