"""Which path a masked layer takes: one fused kernel, or W * m first and then the product of cuBLAS or cuDNN.

A fused kernel reads the weight and the logits as its tiles load and writes nothing but the result; where a weight is
used often (many rows), making W * m once and multiplying with the vendor's library is faster. The choice is made from
the shape alone: by the table measured on this kind of GPU (`tables/GPU.json`, made by `python -m bench.paths`),
and by counting (`estimates`) where there is none: then layers of many rows mask first whatever was counted, and the
chunk forms, whose kernels make W * m once by themselves where rows are many, are always fused. On the CPU it is always
"mask first".

The table also says which backend's fused kernel was the faster; without it that of `FUSED_BACKENDS` order which serves.
"""

import functools
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .estimates import GPUS, H100, LAUNCH, Call, Gpu, count, count_few_rows, in_one_kernel

T = TypeVar("T")

FUSED, MASK_FIRST = "fused", "mask first"
FUSED_BACKENDS = ("cuda", "triton")  # those with layers in one kernel
MAX_ROWS = 64  # of x that the CUDA kernel for few rows takes in half precision
FEWEST_ROWS = 16  # the same in float32, and where logits are generated
_UNMEASURED = "; cuda before triton, unmeasured: with so few rows W's bytes decide, and its kernel is for that"
FEW_ROWS = 64  # above, cuBLAS and cuDNN are known and a fused kernel nobody has timed isn't
_FAR = 3.0  # a measured shape further away than this, in powers of 2 summed over its sizes, says nothing


class Choice(NamedTuple):
    """path: "fused" or "mask first"; why: one line that says so with its reason; order: of backends, if fused."""

    path: str
    why: str
    order: tuple[str, ...] = FUSED_BACKENDS


@dataclass(frozen=True)
class Layer:
    """How the arguments of a masked layer's op, x and weight first, show the size of its product.

    Attributes:
        stride_at: the position of a convolution's stride among the arguments; None for a linear layer.
        generated: whether the op generates its logits, so that none lie in memory.
        of_tasks: whether the third argument holds the logits of many tasks and the fifth the tasks of x's rows.
    """

    stride_at: int | None = None
    generated: bool = False
    of_tasks: bool = False

    def choose(self, op: str, values: Sequence[Any]) -> Choice:
        """The path of one call with these arguments, all of them by position."""
        x, weight = values[:2]
        if not on_gpu(x):
            return _masks_first(x.device.type)
        gradient = torch.is_grad_enabled() and any(v.requires_grad for v in values if isinstance(v, Tensor))
        tasks, grouped = (len(values[2]), values[4] is not None) if self.of_tasks else (1, False)
        rows = _power_of_2(self._rows(x, weight, values, tasks))
        sizes = weight.shape[0], weight.shape[1:].numel(), weight.shape[2:].numel(), tasks
        chunk = tuple(values[3].shape) if self.generated else (0, 0)
        if torch.compiler.is_compiling():  # where they may be symbols, which `decide` can't be given
            sizes, chunk = tuple(map(_power_of_2, sizes)), tuple(map(_power_of_2, chunk))
        outputs, reduced, taps, tasks = sizes
        device = x.device.index or 0
        kind = taps, self.stride_at is not None, self.generated, tasks, grouped, *chunk
        return decide(op, rows, outputs, reduced, _product_dtype(x), weight.element_size(), gradient, device, *kind)

    def _rows(self, x: Tensor, weight: Tensor, values: Sequence[Any], tasks: int) -> int:
        """Rows of the product; a convolution's pixels are counted as if its padding kept their number, and of a batch
        of many tasks each has its share."""
        if self.of_tasks:
            return x.shape[-2] if values[4] is None else -(-x.shape[0] // max(tasks, 1))
        if self.stride_at is None:
            return x.numel() // max(weight.shape[-1], 1)
        stride = values[self.stride_at]
        down, across = (stride, stride) if isinstance(stride, int) else stride
        return x.shape[0] * -(-x.shape[-2] // down) * -(-x.shape[-1] // across)


@functools.cache
def _masks_first(device: str) -> Choice:
    return Choice(MASK_FIRST, f"mask first: on {device} W * m is made once and the product is the library's")


def _power_of_2(size: int) -> int:
    """The next one, found by comparisons: a compiled graph is guarded by these and serves all sizes between."""
    found = 1
    while found < size:
        found *= 2
    return found if size else 0


def on_gpu(x: Tensor) -> bool:
    return x.device.type == "cuda"


def allows_tf32(convolution: bool) -> bool:
    """Whether PyTorch's settings let float32 products, or convolutions, round their operands to TF32.

    Every way to set it (fp32_precision, allow_tf32, set_float32_matmul_precision) shows in fp32_precision; allow_tf32
    may raise once fp32_precision has been set.
    """
    cudnn: Any = torch.backends.cudnn  # which PyTorch puts another object in place of
    setting = cudnn.conv if convolution else torch.backends.cuda.matmul
    return setting.fp32_precision == "tf32"


def surroundings(layer: Layer | None) -> tuple | None:
    """What who serves a call depends on besides the call itself: autocast, and for a masked layer on a GPU what
    `decide` looks up. None where there is nothing of the kind."""
    enabled = torch.is_autocast_enabled
    cpu = torch.get_autocast_dtype("cpu") if enabled("cpu") else None
    cuda = torch.get_autocast_dtype("cuda") if enabled("cuda") else None
    if layer is not None and torch.cuda.is_initialized():
        return cpu, cuda, os.environ.get("HYPERMASK_TABLES"), allows_tf32(False), allows_tf32(True)
    return None if cpu is cuda is None else (cpu, cuda)


def _product_dtype(x: Tensor) -> str:
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    return str(dtype).removeprefix("torch.")


def constant_in_graphs(function: Callable[..., T]) -> Callable[..., T]:
    """torch.compiler.assume_constant_result, whose call would import the compiler with every import of ours."""
    vars(function)["_dynamo_marked_constant"] = True
    return function


@constant_in_graphs
def decide(
    op: str, rows: int, outputs: int, reduced: int, dtype: str, weight_bytes: int, gradient: bool, device: int,
    taps: int = 1, convolution: bool = False, generated: bool = False, tasks: int = 1, grouped: bool = False,
    chunk_size: int = 0, width: int = 0,
) -> Choice:  # fmt: skip
    """`choose` from plain numbers; torch.compile takes its answer as a constant."""
    folder = os.environ.get("HYPERMASK_TABLES", "")
    tf32 = dtype == "float32" and allows_tf32(convolution)
    sizes = op, rows, outputs, reduced, dtype, weight_bytes, gradient, taps
    kind = convolution, generated, tasks, grouped, chunk_size, width
    return _decide(*sizes, tf32, *kind, device, folder)


def gpu_name(device: int) -> str:
    return torch.cuda.get_device_name(device)


@functools.lru_cache(maxsize=4096)
def _decide(*key) -> Choice:
    *fields, device, folder = key
    call, name = Call(*fields), gpu_name(device)
    if call.outputs * call.reduced * call.rows * call.tasks == 0:
        return Choice(MASK_FIRST, "mask first: the layer is empty")
    table = tables(Path(folder) if folder else Path(__file__).parents[1] / "tables").get(name)
    entry = table.nearest(call) if table else None
    if entry is not None:
        return _measured(call, entry, name)
    return _counted(call, gpu_of(name), f"no table of {name}" if table is None else "")


def _measured(call: Call, entry: "Entry", name: str) -> Choice:
    by, order = "", FUSED_BACKENDS
    if entry.backend:
        by = f" by {entry.backend}"
        order = (entry.backend, *(other for other in FUSED_BACKENDS if other != entry.backend))
    path = FUSED if entry.fused_us * 1e-6 + LAUNCH < entry.mask_first_us * 1e-6 else MASK_FIRST
    times = f"fused {entry.fused_us:.3g} us{by}, mask first {entry.mask_first_us:.3g} us"
    source = f"by the table of {name}, measured at {entry.rows} x {entry.reduced} -> {entry.outputs}"
    return Choice(path, f"{path}: {call}: {times}, {source}", order)


def _counted(call: Call, gpu: Gpu, missing: str) -> Choice:
    """The choice of a call that no table tells of."""
    why = f"estimated for {gpu.name}" + (f": {missing}" if missing else "")
    if call.generated:
        return _generated(call, gpu, why)
    fused, first, _ = count(call, gpu)
    path = FUSED if fused.seconds + LAUNCH < first.seconds + _launches(call) else MASK_FIRST
    if call.grouped:
        path = FUSED
        why += "; mask first would wait for the device to learn which rows a task has"
    elif call.tasks == 1 and call.rows > FEW_ROWS and path == FUSED:
        path = MASK_FIRST
        why += f"; unmeasured, so mask first above {FEW_ROWS} rows"
    order = FUSED_BACKENDS
    if not call.convolution and call.tasks == 1 and call.rows <= few_rows(call.dtype):
        forward, few = count(replace(call, gradient=False), gpu).fused, count_few_rows(call, gpu)
        if few.seconds > forward.seconds:
            order = FUSED_BACKENDS[::-1]
            why += f"; triton before cuda, whose kernel for few rows reads x more often: forward {few}"
        else:
            why += _UNMEASURED
    return Choice(path, f"{path}: {call}: fused {fused}, mask first {first}, {why}", order)


def few_rows(dtype: str) -> int:
    """Rows of x up to which masked_linear has a CUDA kernel for few rows."""
    return FEWEST_ROWS if dtype == "float32" else MAX_ROWS


def _generated(call: Call, gpu: Gpu, why: str) -> Choice:
    """Of an op that has no logits in memory and decides by itself, by the same count: always fused."""
    fused, first, kept = count(call, gpu)
    inside = in_one_kernel(call, gpu)
    times = f"in one kernel {fused}" if inside else f"the op makes W * m once, then the library multiplies: {first}"
    other = f"W * m first {first}" if inside else f"in one kernel {fused}"
    order = FUSED_BACKENDS if inside and call.rows <= FEWEST_ROWS else FUSED_BACKENDS[::-1]
    text = f"fused: {call}: no logits in memory; {times}, {other}; W * m kept from call to call {kept}; {why}"
    return Choice(FUSED, text + (_UNMEASURED if order == FUSED_BACKENDS else ""), order)


def _launches(call: Call) -> float:
    """Seconds that mask first takes for its launches, two a task beyond the first."""
    return 2 * LAUNCH * (call.tasks - 1)


def gpu_of(name: str) -> Gpu:
    """The rates of this GPU, or of an H100 for one that is not listed."""
    return next((gpu for gpu in GPUS if gpu.name in name), H100)


# -- measured tables --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """Microseconds of both paths for one shape; the other fields are `Call`'s.

    Attributes:
        backend: whose fused kernel took `fused_us`, the fastest there is; "" for a table that doesn't say.
    """

    op: str
    rows: int
    outputs: int
    reduced: int
    dtype: str
    gradient: bool
    fused_us: float
    mask_first_us: float
    backend: str = ""
    taps: int = 1

    def __post_init__(self) -> None:
        sizes = (self.rows, self.outputs, self.reduced, self.taps)
        times = (self.fused_us, self.mask_first_us)
        if not all(isinstance(size, int) and size > 0 for size in sizes):
            raise ValueError(f"rows, outputs, reduced and taps must be positive integers, not {sizes}")
        if not all(isinstance(time, float | int) and 0 < time < math.inf for time in times):
            raise ValueError(f"times must be positive microseconds, not {times}")
        if self.backend not in ("", *FUSED_BACKENDS):
            raise ValueError(f"backend must be one of {', '.join(FUSED_BACKENDS)}, not {self.backend!r}")

    def distance(self, call: Call) -> float:
        """How many doublings lie between the shapes."""
        pairs = ((self.rows, call.rows), (self.outputs, call.outputs), (self.reduced, call.reduced))
        return sum(abs(math.log2(a / b)) for a, b in pairs)


@dataclass(frozen=True)
class Table:
    """What was measured on one kind of GPU."""

    gpu: str
    entries: tuple[Entry, ...]

    def nearest(self, call: Call) -> Entry | None:
        """The measured shape nearest to the call's, of the same op, dtype and direction; None if all are far.

        A convolution of one tap is another kind than one of several, whose weights are read apart.
        """

        def kind(of: Call | Entry) -> tuple[str, str, bool, bool]:
            return of.op, of.dtype, of.gradient, of.taps > 1

        same = [entry for entry in self.entries if kind(entry) == kind(call)]
        best = min(same, key=lambda entry: entry.distance(call), default=None)
        return best if best is not None and best.distance(call) <= _FAR else None


def file_name(gpu: str) -> str:
    """The table's file for a device name: "NVIDIA H200" -> nvidia-h200.json."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json"


@functools.cache
def tables(folder: Path) -> dict[str, Table]:
    """GPU name -> its table, of every file in the folder (HYPERMASK_TABLES names another than the package's own).

    A file that can't be read is warned of and left out.
    """
    found = {}
    for file in sorted(folder.glob("*.json")):
        try:
            data = json.loads(file.read_text())
            found[data["gpu"]] = Table(data["gpu"], tuple(Entry(**entry) for entry in data["entries"]))
        except (OSError, ValueError, TypeError, KeyError) as error:
            problem = " ".join(f"{type(error).__name__}: {error}".split())
            warnings.warn(f"{file} is no table of measured paths and is ignored ({problem})", stacklevel=2)
    return found
