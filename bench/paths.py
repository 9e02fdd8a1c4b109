"""Measures both paths of the masked layers over a grid of shapes: the table `hypermask_fast.ops.paths` chooses by.

    python -m bench.dispatch                       writes hypermask_fast/tables/GPU.json
    python -m bench.dispatch --out F --seconds 60  another file, and no longer than that

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
from itertools import islice, product
from math import prod
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from hypermask_fast import ops
from hypermask_fast.ops import paths as dispatch
from hypermask_fast.ops import registry as backends
from hypermask_fast.ops.paths import Entry
from hypermask_fast.ops.plain import mask_first

from . import machine
from .case import Unavailable
from .op_run import OpRun, Results, sets

_LINEAR = ((784, 400), (1024, 1000), (1000, 1000), (4096, 1024), (4096, 4096))  # in, out
_ROWS = (1, 16, 64, 256, 1024, 8192)
_CHUNK, _WIDTH = 8000, 100  # of the chunked hypernetwork
# Inputs, outputs, side of the image, window, stride: ResNet-20 (k = 2) and ResNet-50.
_CONVOLUTIONS = (
    (32, 32, 32, 3, 1), (32, 64, 32, 3, 2), (64, 64, 16, 3, 1), (128, 128, 8, 3, 1),
    (128, 128, 28, 3, 1), (512, 512, 7, 3, 1), (64, 256, 56, 1, 1), (1024, 256, 14, 1, 1),
)  # fmt: skip
_BATCHES = (1, 32, 256)
_DTYPES = (torch.bfloat16, torch.float32)
_AHEAD = 54  # shapes compiled at a time: one dtype and direction of the grid
_PATIENCE = 60  # seconds for them
_TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 6e-3, torch.float32: 3e-3}  # TF32 included


@dataclass(frozen=True)
class Shape:
    """One layer's call: `x` and `weight` shapes; geometry: a convolution's stride and padding."""

    op: str
    x: tuple[int, ...]
    weight: tuple[int, ...]
    geometry: tuple[int, ...] = ()
    gradient: bool = False
    dtype: torch.dtype = torch.bfloat16

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Rows, outputs and reduced, as the dispatcher counts them."""
        rows = prod(self.x[:-1]) if not self.geometry else self.x[0] * (-(-self.x[2] // self.geometry[0])) ** 2
        return rows, self.weight[0], prod(self.weight[1:])


def grid() -> Iterator[Shape]:
    """Forward passes in bfloat16 first: they decide most."""
    for gradient, dtype in product((False, True), _DTYPES):
        for (inputs, outputs), rows in product(_LINEAR, _ROWS):
            yield Shape("masked_linear", (rows, inputs), (outputs, inputs), (), gradient, dtype)
        for batch, (inputs, outputs, side, window, stride) in product(_BATCHES, _CONVOLUTIONS):
            x, weight = (batch, inputs, side, side), (outputs, inputs, window, window)
            yield Shape("masked_conv2d", x, weight, (stride, window // 2), gradient, dtype)
    for (inputs, outputs), rows in product(_LINEAR, _ROWS):
        yield Shape("chunk_masked_linear", (rows, inputs), (outputs, inputs))


# -- one shape --------------------------------------------------------------------------------------------------------


def inputs(shape: Shape, seed: int, device: torch.device) -> tuple:
    """The op's arguments, random."""
    generator = torch.Generator(device).manual_seed(seed)

    def made(*size: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(size, generator=generator, device=device) * scale
        return values.to(shape.dtype).requires_grad_(shape.gradient)

    x, weight = made(*shape.x), made(*shape.weight, scale=prod(shape.weight[1:]) ** -0.5)
    bias, threshold = made(shape.weight[0]), torch.full((1,), 0.5, device=device, dtype=shape.dtype)
    if shape.op.startswith("chunk"):
        chunks = -(-weight.numel() // _CHUNK)
        hidden, layer, shift = made(chunks, _WIDTH), made(_CHUNK, _WIDTH, scale=_WIDTH**-0.5), made(_CHUNK)
        return (x, weight, hidden, layer, shift, 0, threshold, bias, *shape.geometry)
    if shape.geometry:
        x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_(shape.gradient)
    return (x, weight, made(*shape.weight), threshold, bias, *shape.geometry)


def call(function: Callable[..., Tensor], args: tuple, gradient: bool) -> Callable[[], Results]:
    """A forward pass, or forward and backward to every float argument."""
    leaves = [t for t in args if isinstance(t, Tensor) and t.requires_grad]

    def run() -> Results:
        with torch.set_grad_enabled(gradient):
            y = function(*args)
        found = torch.autograd.grad(y, leaves, torch.ones_like(y)) if gradient else ()
        return {"y": y.detach(), **{f"grad{i}": g for i, g in enumerate(found)}}

    return run


def agree(one: Results, other: Results, dtype: torch.dtype) -> bool:
    """Whether the two paths give the same up to rounding."""

    def near(a: Tensor, b: Tensor) -> bool:
        a, b = a.double(), b.double()
        return bool((a - b).norm() <= _TOLERANCE[dtype] * b.norm())

    return all(near(one[name], other[name]) for name in other)


def measure(shape: Shape, device: torch.device, seconds: float = 0.05) -> tuple[str, float, float]:
    """The backend with the fastest fused kernel, and microseconds of a call, (backend, fused, mask first).

    A kernel that fails or whose result differs from mask first's is reported and left out.

    Raises:
        Unavailable: no backend has a fused kernel that is right, or one can't be captured.
    """
    arguments = [inputs(shape, 0, device)]
    if not shape.gradient:
        one_set = sum(t.nbytes for t in arguments[0] if isinstance(t, Tensor))
        arguments += [inputs(shape, seed, device) for seed in range(1, sets(one_set, device))]
    if not (names := backends.fused_backends(shape.op, *arguments[0])):
        raise Unavailable(f"no backend runs {shape.op} fused here")
    first = getattr(mask_first, shape.op)
    expected = call(first, arguments[0], shape.gradient)()
    paths = {}
    for name in names:
        fused = partial(getattr(ops, shape.op), backend=name)
        if fault := _fault(call(fused, arguments[0], shape.gradient), expected, shape.dtype):
            print(f"{shape}: WRONG: {name} {fault}", file=sys.stderr)
        else:
            paths[name] = fused
    if not paths:
        raise Unavailable(f"WRONG: {' and '.join(names)}")
    paths[dispatch.MASK_FIRST] = first
    runs = {
        name: OpRun([call(path, args, shape.gradient) for args in arguments], graph=True)
        for name, path in paths.items()
    }
    if device.type == "cuda":
        for run in runs.values():
            run.capture()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(5):  # taking turns
        for name, run in runs.items():
            times[name].append(_microseconds(run, device, seconds / 10))
    found = {name: median(values) for name, values in times.items()}
    mask_first_us = found.pop(dispatch.MASK_FIRST)
    fastest = min(found, key=found.get)
    return fastest, found[fastest], mask_first_us


def _fault(fused: Callable[[], Results], expected: Results, dtype: torch.dtype) -> str:
    """What is wrong with a fused kernel's results, "" if nothing is."""
    try:
        return "" if agree(fused(), expected, dtype) else "differs from mask first"
    except Exception as error:
        if machine.device_lost():
            raise
        return f"fails: {machine.first_line(error)}"


def _microseconds(run: OpRun, device: torch.device, seconds: float) -> float:
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
    arguments = inputs(shape, 0, torch.device("cuda"))
    for name in backends.fused_backends(shape.op, *arguments):
        call(partial(getattr(ops, shape.op), backend=name), arguments, shape.gradient)()
    torch.cuda.empty_cache()


def compiled(shapes: Iterable[Shape], pool: Executor) -> Iterator[Shape]:
    """The shapes again, some at a time, once the pool has compiled these; it rests while they are measured.

    What it can't compile is compiled, or fails, as it is measured.
    """
    shapes = iter(shapes)
    while ahead := list(islice(shapes, _AHEAD)):
        with suppress(BrokenProcessPool):
            wait([pool.submit(compile_fused, shape) for shape in ahead], timeout=_PATIENCE)
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
        times, taps = (round(fused, 2), round(first, 2)), prod(shape.weight[2:])
        yield Entry(shape.op, *shape.sizes, dtype, shape.gradient, *times, backend, taps)


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
        "command": "python -m bench.dispatch",
    }
    lines = ",\n  ".join(json.dumps(asdict(entry)) for entry in found)
    head = json.dumps(about, indent=1).rstrip("\n}")
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    scratch.write_text(f'{head},\n "entries": [\n  {lines}\n ]\n}}\n')
    scratch.replace(path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.dispatch", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, metavar="F", help="the file; default: the package's own table of this GPU")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after that many")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("a table can be measured on an NVIDIA GPU only: PyTorch sees none", file=sys.stderr)
        return 2
    gpu, device, began = torch.cuda.get_device_name(), torch.device("cuda"), time.monotonic()
    path = arguments.out or Path(dispatch.__file__).parent / "tables" / dispatch.file_name(gpu)
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
