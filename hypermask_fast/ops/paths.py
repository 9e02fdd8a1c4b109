"""Which path a masked layer takes: one fused kernel, or W * m first and then the product of cuBLAS or cuDNN.

A fused kernel reads the weight and the logits as its tiles load and writes nothing but the result; where a weight is
used often (many rows), making W * m once and multiplying with the vendor's library is faster. The choice is made from
the shape alone: by the table measured on this kind of GPU (`tables/GPU.json`, made by `python -m bench.paths`),
and by `estimate` where there is none; the chunk forms, whose kernels make W * m once by themselves where rows are
many, are then always fused. On the CPU it is always "mask first".

The table also says which backend's fused kernel was the faster; without it that of `FUSED_BACKENDS` order which serves.
"""

import functools
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

FUSED, MASK_FIRST = "fused", "mask first"
FUSED_BACKENDS = ("cuda", "triton")  # those with layers in one kernel
MAX_ROWS = 16  # of x that the CUDA kernels for few rows take
_UNMEASURED = f"; cuda before triton, unmeasured: up to {MAX_ROWS} rows W's bytes decide, and its kernel is for that"
LAUNCH = 2e-6  # seconds; W * m of all layers is one launch, so a layer must save more than that to go alone
_FAR = 3.0  # a measured shape further away than this, in powers of 2 summed over its sizes, says nothing


class Choice(NamedTuple):
    """path: "fused" or "mask first"; why: one line that says so with its reason; order: of backends, if fused."""

    path: str
    why: str
    order: tuple[str, ...] = FUSED_BACKENDS


@dataclass(frozen=True)
class Gpu:
    """Rates that decide, per second.

    Attributes:
        name: a part of the device's name.
        bytes: that a copy moves, read plus written.
        float32, tf32, half: operations of a large matrix product by the vendor's library.
        tanh: hardware tanh, 16 per clock and multiprocessor; one in float32 takes `TANH_FLOAT32` of them.
    """

    name: str
    bytes: float
    float32: float
    tf32: float
    half: float
    tanh: float


H200 = Gpu("H200", bytes=4.3e12, float32=5.0e13, tf32=3.5e14, half=7.0e14, tanh=3.7e12)
H100 = Gpu("H100", bytes=3.0e12, float32=5.0e13, tf32=3.5e14, half=7.0e14, tanh=3.7e12)
A100 = Gpu("A100", bytes=1.7e12, float32=1.8e13, tf32=1.3e14, half=2.6e14, tanh=2.4e12)
GPUS = (H200, H100, A100)
TANH_FLOAT32 = 4
# What a fused kernel reaches of the rates above, and how many rows share one masked tile.
SHARE_OF_BYTES, SHARE_OF_PRODUCT, ROWS_PER_TILE = 0.85, 0.7, 128


@dataclass(frozen=True)
class Call:
    """One call of a masked layer as the choice sees it: W is (outputs, reduced), x has `rows` rows.

    For a convolution rows are the output's pixels over the batch, and reduced is inputs / groups * kh * kw. `rows` is
    rounded up to a power of 2, so that a compiled graph is not made again for every batch size.

    Attributes:
        gradient: whether a backward pass follows.
        dtype: what the product is done in; weight_bytes: of one stored weight or logit.
        taps: kh * kw of a convolution, over which a contiguous weight's neighbours along the reduction are apart.
        tf32: whether a float32 product's operands are rounded to TF32.
        convolution, generated: as in `Layer`.
    """

    op: str
    rows: int
    outputs: int
    reduced: int
    dtype: str
    weight_bytes: int
    gradient: bool
    taps: int = 1
    tf32: bool = False
    convolution: bool = False
    generated: bool = False

    def __str__(self) -> str:
        backward = ", forward and backward" if self.gradient else ""
        return f"{self.rows} rows of {self.reduced} -> {self.outputs} in {self.dtype}{backward}"


@dataclass(frozen=True)
class Layer:
    """How the arguments of a masked layer's op, x and weight first, show the size of its product.

    Attributes:
        stride_at: the position of a convolution's stride among the arguments; None for a linear layer.
        generated: whether the op generates its logits, so that none lie in memory.
    """

    stride_at: int | None = None
    generated: bool = False

    def choose(self, op: str, values: Sequence[Any]) -> Choice:
        """The path of one call with these arguments, all of them by position."""
        x, weight = values[:2]
        if not on_gpu(x):
            return _masks_first(x.device.type)
        gradient = torch.is_grad_enabled() and any(v.requires_grad for v in values if isinstance(v, Tensor))
        rows = _power_of_2(self._rows(x, weight, values))
        sizes = weight.shape[0], weight.shape[1:].numel(), weight.shape[2:].numel()
        if torch.compiler.is_compiling():  # where they may be symbols, which `decide` can't be given
            sizes = tuple(map(_power_of_2, sizes))
        outputs, reduced, taps = sizes
        device = x.device.index or 0
        kind = taps, self.stride_at is not None, self.generated
        return decide(op, rows, outputs, reduced, _product_dtype(x), weight.element_size(), gradient, device, *kind)

    def _rows(self, x: Tensor, weight: Tensor, values: Sequence[Any]) -> int:
        """Rows of the product; a convolution's pixels are counted as if its padding kept their number."""
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
    cpu = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    cuda = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
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
    taps: int = 1, convolution: bool = False, generated: bool = False,
) -> Choice:  # fmt: skip
    """`choose` from plain numbers; torch.compile takes its answer as a constant."""
    folder = os.environ.get("HYPERMASK_TABLES", "")
    tf32 = dtype == "float32" and allows_tf32(convolution)
    sizes = op, rows, outputs, reduced, dtype, weight_bytes, gradient, taps
    return _decide(*sizes, tf32, convolution, generated, device, folder)


def gpu_name(device: int) -> str:
    return torch.cuda.get_device_name(device)


@functools.lru_cache(maxsize=4096)
def _decide(*key) -> Choice:
    *fields, device, folder = key
    call, name = Call(*fields), gpu_name(device)
    if call.outputs * call.reduced * call.rows == 0:
        return Choice(MASK_FIRST, "mask first: the layer is empty")
    table = tables(Path(folder) if folder else Path(__file__).parents[1] / "tables").get(name)
    entry = table.nearest(call) if table else None
    by, order = "", FUSED_BACKENDS
    if entry is not None:
        fused, first = entry.fused_us * 1e-6, entry.mask_first_us * 1e-6
        source = f"by the table of {name}, measured at {entry.rows} x {entry.reduced} -> {entry.outputs}"
        if entry.backend:
            by = f" by {entry.backend}"
            order = (entry.backend, *(other for other in FUSED_BACKENDS if other != entry.backend))
    else:
        about_order = _UNMEASURED if not call.convolution and call.rows <= MAX_ROWS else ""
        if call.generated:
            why = "no logits in memory; with many rows the op itself makes W * m once"
            return Choice(FUSED, f"fused: {call}: {why}{about_order}")
        fused, first = estimate(call, gpu_of(name))
        source = f"estimated for {gpu_of(name).name}" + ("" if table else f": no table of {name}") + about_order
    path = FUSED if fused + LAUNCH < first else MASK_FIRST
    times = f"fused {fused * 1e6:.3g} us{by}, mask first {first * 1e6:.3g} us"
    return Choice(path, f"{path}: {call}: {times}, {source}", order)


def gpu_of(name: str) -> Gpu:
    """The rates of this GPU, or of an H100 for one that is not listed."""
    return next((gpu for gpu in GPUS if gpu.name in name), H100)


def estimate(call: Call, gpu: Gpu) -> tuple[float, float]:
    """Seconds of the fused path and of mask first, without launches.

    With n = outputs * reduced entries, M rows, b bytes per weight, io the bytes of x and y, a kernel takes

        max(bytes / B, operations / F, tanh / T)

    for B, F, T the GPU's rates of bytes, of products and of tanh. Forward:

        fused:      bytes 2 n b + io at .85 B, operations 2 M n at .7 F, tanh n ceil(M / 128) max(1, l)
        mask first: bytes 3 n b, tanh n; then bytes n b + io, operations 2 M n

    where l stands for L1: a tile's weights and logits come entry by entry, taps * b bytes apart, so that 32 of each
    take ceil(taps b / 4) lines of 128 bytes. A multiprocessor hands out a line per clock and 16 tanh, hence an entry's
    loads take as long as l = ceil(taps b / 4) tanh: 5 in half precision for 3x3, at which few rows go at .69 of an
    H200's bytes; with a single tap they hide behind the tanh.

    and with gradients, for dx and dW as products of the same size each, besides:

        fused:      dx as forward; dW and dlogits: 4 n b + io, n tanh; 2 n b to gather the layers' dlogits
        mask first: dx as forward's product; d(W * m) the same; dW and dlogits from it: 5 n b, n tanh

    """
    entries, b = call.outputs * call.reduced, call.weight_bytes
    x_bytes = 4 if call.dtype == "float32" else 2
    io, operations = x_bytes * call.rows * (call.reduced + call.outputs), 2.0 * call.rows * entries
    rate = gpu.half if call.dtype != "float32" else gpu.tf32 if call.tf32 else gpu.float32
    per_tanh = TANH_FLOAT32 if call.dtype == "float32" else 1

    per_load = math.ceil(call.taps * b / 4)

    def kernel(moved: float, operations: float, tanh: float, fused: bool) -> float:
        of_bytes, of_product = (SHARE_OF_BYTES, SHARE_OF_PRODUCT) if fused else (1.0, 1.0)
        return max(moved / (of_bytes * gpu.bytes), operations / (of_product * rate), tanh / gpu.tanh)

    masks, tiles = entries * per_tanh, math.ceil(call.rows / ROWS_PER_TILE)
    of_tiles = entries * tiles * max(per_tanh, per_load)
    fused = kernel(2 * entries * b + io, operations, of_tiles, True)
    first = kernel(3 * entries * b, 0, masks, False) + kernel(entries * b + io, operations, 0, False)
    if call.gradient:
        fused += kernel(2 * entries * b + io, operations, of_tiles, True)
        fused += kernel(4 * entries * b + io, operations, masks, True) + kernel(2 * entries * b, 0, 0, False)
        first += 2 * kernel(entries * b + io, operations, 0, False) + kernel(5 * entries * b, 0, masks, False)
    return fused, first


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
