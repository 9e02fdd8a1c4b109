"""Measures both paths of the masked layers over a grid of shapes: the table `hypermask_fast.ops.paths` chooses by.

    python -m bench.paths                       writes hypermask_fast/tables/GPU.json
    python -m bench.paths --out F --seconds 60  another file, and no longer than that

Needs an NVIDIA GPU. Mask first and the fused kernel of every backend that serves the call are replayed from a CUDA
graph over sets of inputs that no cache holds; a kernel that fails or whose result differs is reported and left out.
Kernels are compiled beforehand by as many processes as there are cores, some shapes ahead of the measurement. The file
is written anew after every shape, so that a run which is cut off keeps what it has.
"""

import argparse
import json
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from itertools import chain, islice, product, repeat
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

import hypermask_fast
from hypermask_fast import ops
from hypermask_fast.ops import paths
from hypermask_fast.ops.paths import Entry

from . import machine, op_cases
from .case import Unavailable
from .op_case import BOTH, FORWARD, OpCase, calling, flat
from .op_cases import Convolution
from .op_run import OpRun, Results, by_backend, sets

_LINEAR = ((784, 400), (1024, 1000), (1000, 1000), (4096, 1024), (4096, 4096))  # in, out
_ROWS = (1, 16, 64, 256, 1024, 8192)
_CHUNK, _WIDTH = 8000, 100  # of the chunked hypernetwork
# Inputs, outputs, side of the image, window, stride: ResNet-20 (k = 2) and ResNet-50, channels last.
_CONVOLUTIONS = (
    (32, 32, 32, 3, 1), (32, 64, 32, 3, 2), (64, 64, 16, 3, 1), (128, 128, 8, 3, 1),
    (128, 128, 28, 3, 1), (512, 512, 7, 3, 1), (64, 256, 56, 1, 1), (1024, 256, 14, 1, 1),
)  # fmt: skip
_BATCHES = (1, 32, 256)
_DTYPES = (torch.bfloat16, torch.float32)
# Shapes that are compiled at a time, and the seconds for them: a dozen first, so that soon there is an entry, then one
# dtype and direction of the grid.
FIRST, AHEAD = (12, 10), (54, 60)
_TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 6e-3, torch.float32: 3e-3}  # TF32 included


@dataclass(frozen=True)
class Shape:
    """One layer's call.

    Attributes:
        sizes: what the op's function in `op_cases` is given.
        measured: rows, outputs and reduced of the product, and the window's taps, as the choice of paths counts them.
    """

    op: str
    sizes: tuple
    measured: tuple[int, int, int, int]
    gradient: bool = False
    dtype: torch.dtype = torch.bfloat16

    @property
    def case(self) -> OpCase:
        return getattr(op_cases, self.op)(*self.sizes)

    @property
    def direction(self) -> str:
        return BOTH if self.gradient else FORWARD


def linear(rows: int, inputs: int, outputs: int, gradient: bool, dtype: torch.dtype) -> Shape:
    return Shape("masked_linear", (rows, inputs, outputs), (rows, outputs, inputs, 1), gradient, dtype)


def conv2d(layer: Convolution, gradient: bool, dtype: torch.dtype) -> Shape:
    rows = layer.batch * (-(-layer.side // layer.stride)) ** 2
    taps = layer.kernel**2
    return Shape("masked_conv2d", (layer, True), (rows, layer.outputs, layer.inputs * taps, taps), gradient, dtype)


def chunk_linear(rows: int, inputs: int, outputs: int, gradient: bool, dtype: torch.dtype) -> Shape:
    sizes = (rows, inputs, outputs, _CHUNK, _WIDTH)
    return Shape("chunk_masked_linear", sizes, (rows, outputs, inputs, 1), gradient, dtype)


def grid() -> Iterator[Shape]:
    """Forward passes in bfloat16 first: they decide most."""
    for gradient, dtype in product((False, True), _DTYPES):
        for (inputs, outputs), rows in product(_LINEAR, _ROWS):
            yield linear(rows, inputs, outputs, gradient, dtype)
        for batch, sizes in product(_BATCHES, _CONVOLUTIONS):
            yield conv2d(Convolution("", *sizes, batch=batch), gradient, dtype)
    for (inputs, outputs), rows in product(_LINEAR, _ROWS):
        yield chunk_linear(rows, inputs, outputs, False, torch.bfloat16)


# -- one shape --------------------------------------------------------------------------------------------------------


def fused_backends(shape: Shape, args: tuple) -> list[str]:
    """The backends whose fused kernel serves this call."""
    return [name for name in paths.FUSED_BACKENDS if not ops.OPS[shape.op].refusal(name, *args)]


def results(shape: Shape, function: Callable[..., Tensor], args: tuple) -> Results:
    """What a path gives: forward, or forward and backward to every float argument."""
    case = shape.case
    returned = case.call(calling(function), args, shape.direction, shape.dtype)()
    return case.named(args, shape.direction, returned)


def agree(one: Results, other: Results, dtype: torch.dtype) -> bool:
    """Whether the two paths give the same up to rounding."""

    def near(a: Tensor, b: Tensor) -> bool:
        a, b = a.double(), b.double()
        return bool((a - b).norm() <= _TOLERANCE[dtype] * b.norm())

    return all(name in one and near(one[name], other[name]) for name in other)


def measure(shape: Shape, device: torch.device, seconds: float = 0.05) -> tuple[str, float, float]:
    """The backend with the fastest fused kernel, and microseconds of a call, (backend, fused, mask first).

    A kernel that fails or whose result differs from mask first's is reported and left out.

    Raises:
        Unavailable: no backend has a fused kernel that is right, or one can't be captured.
    """
    case = shape.case
    inputs = partial(case.inputs, shape.direction, device, shape.dtype)
    arguments = [inputs()]
    if not shape.gradient:
        count = sets(sum(tensor.nbytes for tensor in flat(arguments[0])), device)
        arguments += [inputs(seed) for seed in range(1, count)]
    if not (names := fused_backends(shape, arguments[0])):
        raise Unavailable(f"no backend runs {shape.op} fused here")
    first = by_backend(shape.op, "plain")
    expected = results(shape, first, arguments[0])
    functions = {}
    for name in names:
        fused = by_backend(shape.op, name)
        if fault := _fault(shape, fused, arguments[0], expected):
            print(f"{shape}: WRONG: {name} {fault}", file=sys.stderr)
        else:
            functions[name] = fused
    if not functions:
        raise Unavailable(f"WRONG: {' and '.join(names)}")
    functions[paths.MASK_FIRST] = first
    runs = {}
    for name, function in functions.items():
        calls = [case.call(calling(function), args, shape.direction, shape.dtype) for args in arguments]
        runs[name] = OpRun(calls, graph=True)
    if device.type == "cuda":
        for run in runs.values():
            run.capture()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(5):  # taking turns
        for name, run in runs.items():
            times[name].append(microseconds(run, device, seconds / 10))
    found = {name: median(values) for name, values in times.items()}
    mask_first_us = found.pop(paths.MASK_FIRST)
    fastest = min(found, key=found.get)
    return fastest, found[fastest], mask_first_us


def _fault(shape: Shape, fused: Callable[..., Tensor], args: tuple, expected: Results) -> str:
    """What is wrong with a fused kernel's results, "" if nothing is."""
    try:
        return "" if agree(results(shape, fused, args), expected, shape.dtype) else "differs from mask first"
    except Exception as error:
        if machine.device_lost():
            raise
        return f"fails: {machine.first_line(error)}"


def microseconds(run: OpRun, device: torch.device, seconds: float) -> float:
    """Of one call, over as many as fit into the time."""

    def timed(count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            run.run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - began) / count

    timed(1)
    return timed(max(1, int(seconds / timed(1)))) / run.calls * 1e6


# -- compiling ahead --------------------------------------------------------------------------------------------------


def compile_fused(shape: Shape) -> None:
    """Runs the fused kernels of a shape once: their code is then on disk, in Triton's cache."""
    args = shape.case.inputs(shape.direction, torch.device("cuda"), shape.dtype)
    for name in fused_backends(shape, args):
        results(shape, by_backend(shape.op, name), args)
    torch.cuda.empty_cache()


def compiled(shapes: Iterable[Shape], pool: Executor) -> Iterator[Shape]:
    """The shapes again, some at a time, once the pool has compiled these; it rests while they are measured.

    What it can't compile is compiled, or fails, as it is measured.
    """
    shapes = iter(shapes)
    for count, seconds in chain((FIRST,), repeat(AHEAD)):
        if not (ahead := list(islice(shapes, count))):
            return
        with suppress(BrokenProcessPool):
            wait([pool.submit(compile_fused, shape) for shape in ahead], timeout=seconds)
        yield from ahead


# -- the table --------------------------------------------------------------------------------------------------------


def entries(shapes: Iterable[Shape], timer: Callable[[Shape], tuple[str, float, float]]) -> Iterator[Entry]:
    """An entry per shape that can be measured; what is left out is said on stderr."""
    for shape in shapes:
        try:
            backend, fused, first = timer(shape)
        except Exception as error:
            if getattr(error, "broken", False) or machine.device_lost():
                raise
            print(f"{shape} is left out: {machine.first_line(error)}", file=sys.stderr)
            continue
        dtype = str(shape.dtype).removeprefix("torch.")
        *sizes, taps = shape.measured
        times = round(fused, 2), round(first, 2)
        yield Entry(shape.op, *sizes, dtype, shape.gradient, *times, backend, taps)


def write(path: Path, gpu: str, found: list[Entry]) -> None:
    """The whole table, in one step; one entry a line."""
    about = {
        "gpu": gpu,
        "measured": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": machine.version("triton"),
        "driver": machine.driver(),
        "command": "python -m bench.paths",
    }
    lines = ",\n  ".join(json.dumps(asdict(entry)) for entry in found)
    head = json.dumps(about, indent=1).rstrip("\n}")
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    scratch.write_text(f'{head},\n "entries": [\n  {lines}\n ]\n}}\n')
    scratch.replace(path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.paths", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, metavar="F", help="the file; default: the package's own table of this GPU")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after that many")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("a table can be measured on an NVIDIA GPU only: PyTorch sees none", file=sys.stderr)
        return 2
    gpu, device, began = torch.cuda.get_device_name(), torch.device("cuda"), time.monotonic()
    path = arguments.out or Path(hypermask_fast.__file__).parent / "tables" / paths.file_name(gpu)
    found: list[Entry] = []
    cores = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(min(cores, 12), multiprocessing.get_context("spawn")) as pool:
        for entry in entries(compiled(grid(), pool), lambda shape: measure(shape, device)):
            found.append(entry)
            write(path, gpu, found)
            times = f"fused {entry.fused_us} us by {entry.backend}, mask first {entry.mask_first_us} us"
            sizes = f"{entry.rows} x {entry.reduced} -> {entry.outputs}"
            print(f"{entry.op} {sizes} {entry.dtype} gradient={entry.gradient}: {times}")
            if time.monotonic() - began > arguments.seconds:
                print(f"stopped after {arguments.seconds:.0f} s")
                break
    print(f"{len(found)} entries in {path}")
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main())
