"""How long both paths of a masked layer take on a GPU that nobody has measured: their bytes, those that they move
through L2, and their operations, counted by the tiles that the kernels launch with."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from . import tiling

TANH_FLOAT32 = 4
LAUNCH = 2e-6  # seconds; W * m of all layers is one launch, so a layer must save more than that to go alone
CHUNK_FUSED_ROWS = 64  # up to here Triton's kernel for generated logits is fused; with more rows it makes W * m first
# What a fused kernel reaches of the rates of bytes and of operations.
SHARE_OF_BYTES, SHARE_OF_PRODUCT = 0.85, 0.7
_LIBRARY = 256  # a side of what the library's product reads once: two multiprocessors share a tile of (128, 256)
_CHUNK_TILE = 64  # chunks and positions of a tile of generated logits, where W * m is made


@dataclass(frozen=True)
class Gpu:
    """Rates that decide, per second.

    Attributes:
        name: a part of the device's name.
        bytes: that a copy moves, read plus written.
        l2: bytes that all multiprocessors together get from L2.
        float32, tf32, half: operations of a large matrix product by the vendor's library.
        tanh: hardware tanh, 16 per clock and multiprocessor; one in float32 takes `TANH_FLOAT32` of them.
        capability, multiprocessors: as in `tiling`.
    """

    name: str
    bytes: float
    float32: float
    tf32: float
    half: float
    tanh: float
    l2: float = 5.7e12
    capability: int = 90
    multiprocessors: int = 132


H200 = Gpu("H200", bytes=4.3e12, float32=5.0e13, tf32=3.5e14, half=7.0e14, tanh=3.7e12)
H100 = Gpu("H100", bytes=3.0e12, float32=5.0e13, tf32=3.5e14, half=7.0e14, tanh=3.7e12)
A100 = Gpu(
    "A100", bytes=1.7e12, float32=1.8e13, tf32=1.3e14, half=2.6e14, tanh=2.4e12,
    l2=4.0e12, capability=80, multiprocessors=108,
)  # fmt: skip
GPUS = (H200, H100, A100)


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
        convolution, generated: as in `paths.Layer`.
        tasks: masks of one weight; `rows` are each task's. grouped: whether they are found in a batch by task ids.
        chunk_size, width: of the hypernetwork that generates the logits.
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
    tasks: int = 1
    grouped: bool = False
    chunk_size: int = 0
    width: int = 0

    def __str__(self) -> str:
        backward = ", forward and backward" if self.gradient else ""
        tasks = f"{self.tasks} tasks, each " if self.tasks > 1 else ""
        return f"{tasks}{self.rows} rows of {self.reduced} -> {self.outputs} in {self.dtype}{backward}"


class Kernel(NamedTuple):
    """What one kernel moves and computes. fused: whether it reaches the shares above only."""

    bytes: float
    l2: float = 0
    operations: float = 0
    tanh: float = 0
    fused: bool = False

    def seconds(self, gpu: Gpu, rate: float) -> float:
        of_bytes, of_product = (SHARE_OF_BYTES, SHARE_OF_PRODUCT) if self.fused else (1.0, 1.0)
        products = self.operations / (of_product * rate)
        return max(self.bytes / (of_bytes * gpu.bytes), self.l2 / gpu.l2, products, self.tanh / gpu.tanh)


class Counted(NamedTuple):
    """One path: seconds without launches, and what its kernels read and write, in memory and through L2."""

    seconds: float
    bytes: float
    l2: float

    def __str__(self) -> str:
        return f"{self.seconds * 1e6:.3g} us ({self.bytes / 1e6:.3g} MB, {self.l2 / 1e6:.3g} MB through L2)"


class Paths(NamedTuple):
    """Both paths of a call; kept: mask first where W * m lies in memory already."""

    fused: Counted
    first: Counted
    kept: Counted


def count(call: Call, gpu: Gpu) -> Paths:
    """Of both paths, kernel by kernel: see docs/design/paths.md."""
    counting = _Counting(call, gpu)
    fused = counting.generated() if call.generated else counting.fused()
    return Paths(*(counting.total(kernels) for kernels in (fused, counting.first(), counting.products())))


def count_few_rows(call: Call, gpu: Gpu) -> Counted:
    """The forward pass by csrc/cuda's kernel for few rows, whose blocks take 32 outputs, or 16 in float32."""
    counting = _Counting(call, gpu)
    outputs = 32 if counting.half else 16
    x = counting.x_bytes * call.rows * call.reduced * math.ceil(call.outputs / outputs)
    return counting.total([Kernel(counting.stored + counting.io, counting.stored + x, counting.operations, 0, True)])


def estimate(call: Call, gpu: Gpu) -> tuple[float, float]:
    """Seconds of the fused path and of mask first, without launches.

    With n = outputs * reduced entries, M rows, b bytes per weight, io the bytes of x and y, a kernel takes

        max(bytes / B, bytes through L2 / L, operations / F, tanh / T)

    for B, L, F, T the GPU's rates. A product by tiles of m outputs and n rows reads through L2 each stored entry of the
    weight ceil(M / n) times and each of x ceil(outputs / m) times; where its reduction is divided into s splits,
    partial sums of 4 s M outputs bytes are written and read besides. Tiles are those of `tiling`, the library's
    (256, 256). Forward:

        fused:      bytes 2 n b + io at .85 B, operations 2 M n at .7 F, tanh n ceil(M / tile's n) max(1, l)
        mask first: bytes 3 n b, tanh n; then bytes n b + io, operations 2 M n

    where l stands for L1: a tile's weights and logits come entry by entry, taps * b bytes apart, so that 32 of each
    take ceil(taps b / 4) lines of 128 bytes. A multiprocessor hands out a line per clock and 16 tanh, hence an entry's
    loads take as long as l = ceil(taps b / 4) tanh: 5 in half precision for 3x3, at which few rows go at .69 of an
    H200's bytes; with a single tap they hide behind the tanh.

    and with gradients, for dx and dW as products of the same size each, besides:

        fused:      dx as forward; dW and dlogits: 4 n b + io, n tanh; 2 n b to gather the layers' dlogits
        mask first: dx as forward's product; d(W * m) the same; dW and dlogits from it: 5 n b, n tanh

    With T tasks the logits, their masks and rows are there T times, and W once. Where logits are generated, neither
    path has them in memory, and the fused one reads for each residue's tile the layer's rows through L2 instead; the
    forward pass alone is counted, for backward passes make W * m in any case.
    """
    paths = count(call, gpu)
    return paths.fused.seconds, paths.first.seconds


@functools.lru_cache(maxsize=1024)
def in_one_kernel(call: Call, gpu: Gpu) -> bool:
    """Whether an op that generates its logits should do so within its product; else it makes W * m in one launch, and
    the library multiplies."""
    paths = count(call, gpu)
    few = not call.convolution and call.rows <= CHUNK_FUSED_ROWS
    return few and paths.fused.seconds < paths.first.seconds + LAUNCH


class _Counting:
    def __init__(self, call: Call, gpu: Gpu) -> None:
        self.call, self.gpu = call, gpu
        self.backward = call.gradient and not call.generated
        self.entries, self.b = call.outputs * call.reduced, call.weight_bytes
        self.half = call.dtype != "float32"
        self.x_bytes = 2 if self.half else 4
        self.rows = call.tasks * call.rows
        self.io = self.x_bytes * self.rows * (call.reduced + call.outputs)
        self.operations = 2.0 * self.rows * self.entries
        self.per_tanh = 1 if self.half else TANH_FLOAT32
        self.stored = (1 + call.tasks) * self.entries * self.b  # the weight and its logits

    def total(self, kernels: Sequence[Kernel]) -> Counted:
        call, gpu = self.call, self.gpu
        rate = gpu.half if self.half else gpu.tf32 if call.tf32 else gpu.float32
        seconds = sum(kernel.seconds(gpu, rate) for kernel in kernels)
        return Counted(seconds, sum(kernel.bytes for kernel in kernels), sum(kernel.l2 for kernel in kernels))

    def fused(self) -> list[Kernel]:
        call, masks = self.call, self.call.tasks * self.entries * self.per_tanh
        kernels = [self._fused_product(call.outputs, call.reduced)]
        if self.backward:
            kernels.append(self._fused_product(call.reduced, call.outputs))
            moved, m, n = 2 * self.stored + self.io, *self._gradient_tile()
            l2 = 2 * self.stored + self._operands(call.outputs, call.reduced, m, n)
            kernels.append(Kernel(moved, l2, self.operations, masks, True))
            kernels.append(Kernel(2 * call.tasks * self.entries * self.b))
        return kernels

    def _fused_product(self, outputs: int, reduced: int) -> Kernel:
        """Of every task's rows with its masked weight, forward or, with outputs and reduced exchanged, for dx."""
        call = self.call
        m, n, splits = self._tile(outputs, reduced)
        tiles = math.ceil(call.rows / n)
        l2 = 2 * call.tasks * self.entries * self.b * tiles
        l2 += self.x_bytes * self.rows * (reduced * math.ceil(outputs / m) + outputs)
        if splits > 1:
            l2 += 8 * splits * self.rows * outputs
        per_load = math.ceil(call.taps * self.b / 4)
        tanh = call.tasks * self.entries * tiles * max(self.per_tanh, per_load)
        return Kernel(self.stored + self.io, l2, self.operations, tanh, True)

    def _tile(self, outputs: int, reduced: int) -> tuple[int, int, int]:
        """m, n and splits of the fused product."""
        call, gpu, half = self.call, self.gpu, self.half
        if call.convolution:
            return *tiling.convolution(outputs, call.rows, reduced // call.taps, 1, half, gpu)[:2], 1
        if call.tasks > 1 or call.grouped:
            return *tiling.task_product(call.tasks, call.rows, outputs, call.grouped, half, gpu)[:2], 1
        tile = tiling.product(call.rows, outputs, reduced, half, self.b, gpu)
        return tile.m, tile.n, tile.splits

    def _gradient_tile(self) -> tuple[int, int]:
        call = self.call
        if call.convolution:
            channels = call.reduced // call.taps
            return tiling.convolution_gradient(call.outputs, max(channels, 16), self.half)
        return tiling.weight_gradient(call.outputs, call.reduced, self.half, self.gpu)[:2]

    def _operands(self, outputs: int, reduced: int, m: int, n: int) -> float:
        """What the sum over rows of dy^T x reads through L2: x once per m outputs, dy once per n columns."""
        x, dy = reduced * math.ceil(outputs / m), outputs * math.ceil(reduced / n)
        return self.x_bytes * self.rows * (x + dy)

    def first(self) -> list[Kernel]:
        call, masks = self.call, self.call.tasks * self.entries * self.per_tanh
        made, layer = call.tasks * self.entries * self.b, self._layer()
        read = self.entries * self.b if call.generated else self.stored
        work = layer if call.generated else Kernel(0)
        kernels = [Kernel(read + made + work.bytes, work.l2, work.operations, masks), *self.products()]
        if self.backward:
            moved = 3 * self.entries * self.b + 2 * made
            kernels.append(Kernel(moved + work.bytes, work.l2, work.operations, masks))
        return kernels

    def _layer(self) -> Kernel:
        """Generating all logits once, in tiles of chunks and positions."""
        call = self.call
        if not call.generated:
            return Kernel(0)
        chunks, line = math.ceil(self.entries / call.chunk_size), call.width * self.b
        positions, vectors = call.chunk_size * line, chunks * line
        l2 = positions * math.ceil(chunks / _CHUNK_TILE) + vectors * math.ceil(call.chunk_size / _CHUNK_TILE)
        return Kernel(positions + vectors, l2, 2.0 * call.width * self.entries)

    def products(self) -> list[Kernel]:
        """The library's, with W * m in memory: forward, and with gradients dx and d(W * m)."""
        call = self.call
        weights = call.tasks * self.entries * self.b
        over_rows = weights * math.ceil(call.rows / _LIBRARY)
        forward, back = (
            over_rows + self.x_bytes * self.rows * columns * math.ceil(side / _LIBRARY)
            for columns, side in ((call.reduced, call.outputs), (call.outputs, call.reduced))
        )
        sums = weights + self._operands(call.outputs, call.reduced, _LIBRARY, _LIBRARY)
        through_l2 = (forward, back, sums) if self.backward else (forward,)
        return [Kernel(weights + self.io, l2, self.operations) for l2 in through_l2]

    def generated(self) -> list[Kernel]:
        """The kernel that makes the logits of its tiles, or what the op does where it can't: W * m first."""
        call = self.call
        if call.convolution or call.rows > CHUNK_FUSED_ROWS:
            return self.first()
        residues, m, n = tiling.chunk_product(call.outputs, call.reduced, call.rows, call.chunk_size)
        if call.outputs < 16 * residues:
            return self.first()
        tiles, line = residues * math.ceil(math.ceil(call.outputs / residues) / m), call.width * self.b
        l2 = self.entries * self.b + tiles * call.reduced * (line + self.x_bytes * n)
        made = 2.0 * call.width * tiles * m * call.reduced
        moved = self.entries * self.b + self._layer().bytes + self.io
        return [Kernel(moved, l2, self.operations + made, self.entries * self.per_tanh, True)]
