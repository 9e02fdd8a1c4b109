"""The heuristics that choose launch settings, from sizes, dtypes and facts of the GPU alone.

`dtype` is that of the products, `stored` the bytes of an entry of W or of the logits as they lie in memory, the larger
of the two (`host.stored_bytes`): under autocast products are in half precision and both are stored in float32, so that
tiles of the same sides need twice the shared memory. They are asked before each launch and remember their answers.
"""

import functools

import torch

from .host import Gpu, cdiv, next_power_of_2
from .tiles import Tiles

_remembered = functools.lru_cache(maxsize=1024)


def _clip(size: int, low: int, high: int) -> int:
    return max(low, min(high, next_power_of_2(max(size, 1))))


def _splits(programs: int, steps: int, gpu: Gpu) -> int:
    """Enough programs for two per multiprocessor, each with at least four steps of the reduction."""
    wanted = 2 * gpu.multiprocessors // max(programs, 1)
    return max(1, min(wanted, steps // 4, 32))


# Tiles of a product of half-precision operands, the largest first: block_m, block_n, warps. Per step of the reduction
# a tile of 128 x 256 needs 16 clocks of Hopper's tensor cores (2048 multiply-adds per clock and multiprocessor) and
# (128 + 256) * 2 bytes of its operands, 48 a clock, where L2 gives about 64; 64 x 128 needs 96 a clock.
_HALF_TILES = ((128, 256, 8), (128, 128, 8), (64, 128, 4), (64, 64, 4))


def _filling(
    outputs: int, rows: int, copies: int, gpu: Gpu, widest: int = 256, tallest: int = 128
) -> tuple[int, int, int]:
    """The largest of _HALF_TILES of which every multiprocessor gets one, over `copies` products (outputs, rows);
    the last where none does. block_n is no wider than `widest` or than the rows need, block_m at most `tallest`."""
    if gpu.capability < 90:
        widest = min(widest, 128)  # without wgmma the operands need registers too
    widest = _clip(rows, 16, widest)
    large = widest >= 128 and outputs > 64
    fitting = [(m, min(n, widest), w) for m, n, w in _HALF_TILES if m == 64 or (large and m <= tallest)]
    for tile in fitting:
        if copies * cdiv(outputs, tile[0]) * cdiv(rows, tile[1]) >= gpu.multiprocessors:
            return tile
    return fitting[-1]


def _float32_step(block_n: int, gpu: Gpu) -> int:
    """block_k of a product in float32. Before Hopper 32 is too much for a tile of more than 16 rows: for compute
    capability 8.0 ptxas then spills one or two registers, in one kernel or another by the version of Triton, to fit one
    more program on a multiprocessor."""
    return 16 if block_n > 16 and gpu.capability < 90 else 32


def _half_step(stored: int) -> int:
    """block_k of a product in half precision: as many bytes of W and logits in a step whatever they are stored in.
    With entries of 4 bytes and steps of 64 a tile of 128 x 256 would need 240 KB of shared memory, of 227."""
    return 64 if stored <= 2 else 32


@_remembered
def masked_product(rows: int, outputs: int, reduced: int, dtype: torch.dtype, stored: int, gpu: Gpu) -> Tiles:
    """(W * m) x^T, an (outputs, rows) product: block_m over outputs, block_n over rows of x.

    Up to 64 rows bytes count: W and the logits are read once, by at least two programs per multiprocessor with
    three steps of 16 KB in flight each (4.3 TB/s times 0.8 us of latency is 26 KB per multiprocessor). At 4096 x 4096
    in bfloat16 these are 67 MB, 16 us; the mask's 127 k entries per multiprocessor take 8 k clocks of tanh (16 a
    clock) beside them; x goes through L2 once per 64 outputs, 33 MB at 64 rows.

    Many rows: the mask is made once per block_n rows. A tile's step makes block_m tanh while the tensor cores take
    block_m * block_n / 2048 clocks: at block_n = 128 tanh alone fills that time, at 256 half of it. From about 700
    rows on W * m made once (100 MB, 23 us at 4096 x 4096) and cuBLAS are faster: the choice is the dispatch's.
    """
    if dtype == torch.float32:
        block_n = _clip(rows, 16, 64)
        block_m, block_k, warps = 64, _float32_step(block_n, gpu), 8 if block_n == 64 else 4
    else:
        block_m, block_n, warps = _filling(outputs, rows, 1, gpu) if rows > 64 else (64, _clip(rows, 16, 64), 4)
        block_k = _half_step(stored)
    block_k = _clip(reduced, 16, block_k)
    programs = cdiv(outputs, block_m) * cdiv(rows, block_n)
    if rows > 64 and (dtype == torch.float32 or programs >= gpu.multiprocessors):
        return Tiles(block_m, block_n, block_k, warps, stages=2 if dtype == torch.float32 else 3)
    stages = 4 if rows <= 64 else 3
    splits = _splits(programs, cdiv(reduced, block_k), gpu)
    return Tiles(block_m, block_n, block_k, warps, stages, splits)


@_remembered
def weight_gradient(outputs: int, inputs: int, rows: int, dtype: torch.dtype, gpu: Gpu) -> Tiles:
    """G = dy^T x, an (outputs, inputs) product reduced over rows; its epilogue reads W and a and writes dW and da once,
    4 * 2 bytes an entry: 31 us at 4096 x 4096 in bfloat16, where 8192 rows take the tensor cores 370 us."""
    if dtype == torch.float32:
        return Tiles(64, _clip(inputs, 16, 64), _clip(rows, 16, 32), warps=8)
    block_m, block_n, warps = _filling(outputs, inputs, 1, gpu)
    return Tiles(block_m, block_n, _clip(rows, 16, 64), warps)


def by_tap(channels: int) -> bool:
    """Whether a convolution's group has channels enough for tiles of a single tap: then pixels are located once per
    tile and channels_last is read 16 bytes at a time. Else a tile holds several taps, located entry by entry."""
    return channels >= 16


def convolution_columns(channels: int, taps: int, block: int) -> int:
    """How many blocks cover the channels and taps that a convolution reduces over."""
    return taps * cdiv(channels, block) if by_tap(channels) else cdiv(channels * taps, block)


@_remembered
def convolution(
    channels: int, pixels: int, in_channels: int, taps: int, groups: int, dtype: torch.dtype, stored: int, gpu: Gpu
) -> Tiles:
    """Implicit GEMM: block_m over output channels of one group, block_n over pixels.

    A step of 64 x 128 x 64 takes 256 clocks of Hopper's tensor cores, its mask 256 clocks of tanh, and the 128 pixels
    some 30 instructions each where a tile is of one tap; entry by entry the 8192 of x would take 960 clocks. Their
    addresses stay in registers, so that tiles of 128 pixels spill up to 96 bytes there: no more than 64, then.
    """
    reduced = in_channels if by_tap(in_channels) else in_channels * taps
    if dtype == torch.float32:
        return Tiles(_clip(channels, 16, 64), _clip(pixels, 16, 64), _clip(reduced, 16, 32), warps=8)
    m, n, warps = _filling(channels, pixels, groups, gpu, widest=128 if by_tap(in_channels) else 64)
    step = _half_step(stored) if by_tap(in_channels) else 32
    return Tiles(_clip(channels, 16, m), n, _clip(reduced, 16, step), warps)


@_remembered
def convolution_gradient(
    channels: int, in_channels: int, pixels: int, taps: int, groups: int, dtype: torch.dtype, gpu: Gpu
) -> Tiles:
    """G over (channels, in * kh * kw) of a group, reduced over all pixels: few tiles, so the reduction is split."""
    reduced = in_channels if by_tap(in_channels) else in_channels * taps
    block_m, block_n = _clip(channels, 16, 64), _clip(reduced, 16, 32 if dtype == torch.float32 else 64)
    block_k = _clip(pixels, 16, 32)
    programs = cdiv(channels, block_m) * convolution_columns(in_channels, taps, block_n) * groups
    splits = _splits(programs, cdiv(pixels, block_k), gpu)
    stages = 2 if dtype == torch.float32 else 3
    return Tiles(block_m, block_n, block_k, 4 if splits > 1 else 8, stages, splits)


@_remembered
def chunk_tiles(chunks: int, chunk_size: int, width: int, dtype: torch.dtype, gpu: Gpu) -> Tiles:
    """A tile of (chunk, position) whose logits are a product over `width`; block_k is the step over it. For compute
    capability 10.0 and Triton 3.7 ptxas would spill six registers with steps of 32 in float32."""
    step = 16 if dtype == torch.float32 and gpu.capability >= 100 else 32
    return Tiles(_clip(chunks, 16, 64), _clip(chunk_size, 16, 64), _clip(width, 16, step), warps=8, stages=2)


@_remembered
def chunk_product(rows: int, outputs: int, residues: int, reduced: int, dtype: torch.dtype, gpu: Gpu) -> Tiles:
    """As `masked_product` for few rows: `outputs` rows of the weight share their positions, for each of `residues`."""
    block_m, block_n = _clip(outputs, 16, 64), _clip(rows, 16, 64)
    block_k = _clip(reduced, 16, 32 if dtype == torch.float32 else 64)
    programs = cdiv(outputs, block_m) * residues * cdiv(rows, block_n)
    splits = _splits(programs, cdiv(reduced, block_k), gpu)
    return Tiles(block_m, block_n, block_k, warps=8, stages=2, splits=splits)


def width_block(width: int) -> int:
    """Step over the hypernetwork's width inside a product's own loop: one step where registers allow, short ones
    for a width like 100, of which longer ones would pad more and, in float32, spill."""
    return _clip(width, 16, 16 if width % 8 else 64)


@_remembered
def task_product(
    tasks: int, rows: int, outputs: int, reduced: int, grouped: bool, dtype: torch.dtype, stored: int, gpu: Gpu
) -> Tiles:
    """As `masked_product` with `rows` the rows that a task may expect: every task fills tiles of its own.

    10 tasks over 1000 rows of 1024 x 1000: 20 GFLOP, 27 us; each entry's tanh is made once per 256 rows, 11 us;
    operands 330 MB through L2, 55 us (64 x 64 tiles: 980 MB). 26 rows a task: 20 MB of logits, read once.

    grouped: rows sorted by task are found through a table, and their addresses stay in registers: tiles of 128 outputs
    spill for them (sm_90: 344 bytes at 256 rows, 208 at 128), those of 64 x 128 do not; before Hopper, with operands
    in registers, in steps of 32 by more warps.
    """
    if dtype == torch.float32:
        block_n = _clip(rows, 16, 64)
        return Tiles(64, block_n, _clip(reduced, 16, _float32_step(block_n, gpu)), warps=8 if block_n == 64 else 4)
    block_m, block_n, warps = _filling(outputs, rows, tasks, gpu, *((128, 64) if grouped else ()))
    step = _half_step(stored)
    if grouped and gpu.capability < 90:
        step, warps = 32, 8 if block_n > 64 else 4
    return Tiles(block_m, block_n, _clip(reduced, 16, step), warps)


@_remembered
def task_weight_gradient(inputs: int, rows: int, dtype: torch.dtype) -> Tiles:
    """As `weight_gradient`, narrower: dW's sum over the tasks stays in registers beside each task's G."""
    return Tiles(64, _clip(inputs, 16, 32 if dtype == torch.float32 else 64), _clip(rows, 16, 32), warps=8)
