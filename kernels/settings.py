"""The heuristics that choose launch settings, from sizes, dtypes and facts of the GPU alone.

`dtype` is that of the products, `stored` the bytes of an entry of W or of the logits as they lie in memory, the larger
of the two (`host.stored_bytes`): under autocast products are in half precision and both are stored in float32, so that
tiles of the same sides need twice the shared memory. They are asked before each launch and remember their answers.
"""

import functools

import torch

from ..ops import tiling
from ..ops.tiling import by_tap, float32_step, half_step, splits_of
from ..ops.tiling import power_of_2 as _clip
from .host import Gpu, cdiv
from .tiles import Tiles

_remembered = functools.lru_cache(maxsize=1024)


@_remembered
def masked_product(rows: int, outputs: int, reduced: int, dtype: torch.dtype, stored: int, gpu: Gpu) -> Tiles:
    """(W * m) x^T, an (outputs, rows) product: block_m over outputs, block_n over rows of x; see `tiling.product`.

    Up to 64 rows programs have three steps of 16 KB in flight each (4.3 TB/s times 0.8 us of latency is 26 KB per
    multiprocessor). At 4096 x 4096 in bfloat16 W and the logits are 67 MB, 16 us; the mask's 127 k entries per
    multiprocessor take 8 k clocks of tanh (16 a clock) beside them; x goes through L2 once per 64 outputs, 33 MB at
    64 rows.

    256 rows: tiles of (128, 256) in 4 splits are 128 programs. 168 MB go through L2, of them 34 MB of partial sums,
    where 64 x 64 tiles move 403 MB.
    """
    tile = tiling.product(rows, outputs, reduced, dtype != torch.float32, stored, gpu)
    stages = 4 if rows <= 64 else 2 if dtype == torch.float32 else 3
    return Tiles(tile.m, tile.n, tile.k, tile.warps, stages, tile.splits)


@_remembered
def weight_gradient(outputs: int, inputs: int, rows: int, dtype: torch.dtype, gpu: Gpu) -> Tiles:
    """G = dy^T x, an (outputs, inputs) product reduced over rows; its epilogue reads W and a and writes dW and da once,
    4 * 2 bytes an entry: 31 us at 4096 x 4096 in bfloat16, where 8192 rows take the tensor cores 370 us."""
    half = dtype != torch.float32
    block_m, block_n, warps = tiling.weight_gradient(outputs, inputs, half, gpu)
    return Tiles(block_m, block_n, _clip(rows, 16, 64 if half else 32), warps)


def convolution_columns(channels: int, taps: int, block: int) -> int:
    """How many blocks cover the channels and taps that a convolution reduces over."""
    return taps * cdiv(channels, block) if by_tap(channels) else cdiv(channels * taps, block)


@_remembered
def convolution(
    channels: int, pixels: int, in_channels: int, taps: int, groups: int, dtype: torch.dtype, stored: int, gpu: Gpu
) -> Tiles:
    """Implicit GEMM: block_m over output channels of one group, block_n over pixels.

    A step of 64 x 128 x 64 takes 256 clocks of Hopper's tensor cores, its mask 256 clocks of tanh, and the 128 pixels
    some 30 instructions each where a tile is of one tap; entry by entry the 8192 of x would take 960 clocks.
    """
    half, one_tap = dtype != torch.float32, by_tap(in_channels)
    block_m, block_n, warps = tiling.convolution(channels, pixels, in_channels, groups, half, gpu)
    step = half_step(stored) if half and one_tap else 32
    return Tiles(block_m, block_n, _clip(in_channels if one_tap else in_channels * taps, 16, step), warps)


@_remembered
def convolution_gradient(
    channels: int, in_channels: int, pixels: int, taps: int, groups: int, dtype: torch.dtype, gpu: Gpu
) -> Tiles:
    """G over (channels, in * kh * kw) of a group, reduced over all pixels: few tiles, so the reduction is split."""
    reduced = in_channels if by_tap(in_channels) else in_channels * taps
    block_m, block_n = tiling.convolution_gradient(channels, reduced, dtype != torch.float32)
    block_k = _clip(pixels, 16, 32)
    programs = cdiv(channels, block_m) * convolution_columns(in_channels, taps, block_n) * groups
    splits = splits_of(programs, cdiv(pixels, block_k), gpu)
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
    splits = splits_of(programs, cdiv(reduced, block_k), gpu)
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

    grouped: rows sorted by task are found through a table. Before Hopper, with operands in registers too, this takes
    steps of 32 by more warps.
    """
    half = dtype != torch.float32
    block_m, block_n, warps = tiling.task_product(tasks, rows, outputs, grouped, half, gpu)
    if not half:
        return Tiles(block_m, block_n, _clip(reduced, 16, float32_step(block_n, gpu)), warps)
    step = half_step(stored)
    if grouped and gpu.capability < 90:
        step, warps = 32, 8 if block_n > 64 else 4
    return Tiles(block_m, block_n, _clip(reduced, 16, step), warps)


@_remembered
def task_weight_gradient(inputs: int, rows: int, dtype: torch.dtype) -> Tiles:
    """As `weight_gradient`, narrower: dW's sum over the tasks stays in registers beside each task's G."""
    return Tiles(64, _clip(inputs, 16, 32 if dtype == torch.float32 else 64), _clip(rows, 16, 32), warps=8)
