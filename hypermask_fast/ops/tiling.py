"""How a fused product is dealt to a GPU's multiprocessors, in plain arithmetic: the kernels launch by it, and
`estimates` counts by it what they move."""

import math
from typing import NamedTuple, Protocol


class Multiprocessors(Protocol):
    """capability: compute capability as one number, 90 for Hopper; multiprocessors: how many there are."""

    @property
    def capability(self) -> int: ...

    @property
    def multiprocessors(self) -> int: ...


class Tile(NamedTuple):
    """m outputs by n rows of x in one program; the reduction goes by k and is divided among `splits` programs."""

    m: int
    n: int
    k: int
    warps: int = 4
    splits: int = 1


# Tiles of a product of half-precision operands, the largest first: m, n, warps.
_HALF = ((128, 256, 8), (128, 128, 8), (64, 128, 4), (64, 64, 4))
_WAVE = 0.9  # of the multiprocessors busy are as good as all
_L2_CLOCK = 25  # bytes that a multiprocessor gets from L2 in a clock while all read
_LAUNCH_CLOCKS = 3500  # of the launch that adds partial sums up, 2 us
_MOST_SPLITS = 8


def power_of_2(size: int, low: int, high: int) -> int:
    """The least power of 2 that is `size` or more, between low and high."""
    return max(low, min(high, 1 << (max(size, 1) - 1).bit_length()))


def splits_of(programs: int, steps: int, gpu: Multiprocessors) -> int:
    """Enough programs for two per multiprocessor, each with at least four steps of the reduction."""
    wanted = 2 * gpu.multiprocessors // max(programs, 1)
    return max(1, min(wanted, steps // 4, 32))


def _fitting(outputs: int, rows: int, gpu: Multiprocessors, widest: int, tallest: int) -> list[tuple[int, int, int]]:
    """Those of _HALF whose n is no wider than `widest` or than the rows need, and whose m is at most `tallest`."""
    if gpu.capability < 90:
        widest = min(widest, 128)  # without wgmma the operands need registers too
    widest = power_of_2(rows, 16, widest)
    large = widest >= 128 and outputs > 64
    return [(m, min(n, widest), w) for m, n, w in _HALF if m == 64 or (large and m <= tallest)]


def filling(
    outputs: int, rows: int, copies: int, gpu: Multiprocessors, widest: int = 256, tallest: int = 128
) -> tuple[int, int, int]:
    """m, n and warps of the largest tiles, in half precision, that give work to nearly all multiprocessors, over
    `copies` products (outputs, rows) whose reduction is not divided; of the smallest ones where none do."""
    fitting = _fitting(outputs, rows, gpu, widest, tallest)
    for m, n, warps in fitting:
        if copies * _tiles(outputs, rows, m, n) >= _WAVE * gpu.multiprocessors:
            return m, n, warps
    return fitting[-1]


def _tiles(outputs: int, rows: int, m: int, n: int) -> int:
    return math.ceil(outputs / m) * math.ceil(rows / n)


def half_step(stored: int) -> int:
    """k of a product in half precision: as many bytes of W and logits in a step whatever they are stored in.
    With entries of 4 bytes and steps of 64 a tile of 128 x 256 would need 240 KB of shared memory, of 227."""
    return 64 if stored <= 2 else 32


def float32_step(n: int, gpu: Multiprocessors) -> int:
    """k of a product in float32. Before Hopper 32 is too much for a tile of more than 16 rows: for compute capability
    8.0 ptxas then spills one or two registers, in one kernel or another by the version of Triton, to fit one more
    program on a multiprocessor."""
    return 16 if n > 16 and gpu.capability < 90 else 32


def product(rows: int, outputs: int, reduced: int, half: bool, stored: int, gpu: Multiprocessors) -> Tile:
    """(W * m) x^T, an (outputs, rows) product, with W and logits of `stored` bytes an entry.

    Up to 64 rows bytes count: W and the logits are read once, by at least two programs per multiprocessor. Above that,
    in half precision, what counts is what goes through L2: a program's step of k entries reads (2 stored m + 2 n) k
    bytes, so that wide tiles move the least. Where these are too few to give every multiprocessor one, the reduction is
    divided among several programs, as far as `_clocks` says that it pays.
    """
    if rows <= 64 or not half:
        n = power_of_2(rows, 16, 64)
        k = half_step(stored) if half else float32_step(n, gpu)
        k = power_of_2(reduced, 16, k)
        warps = 8 if n == 64 and not half else 4
        if rows > 64:
            return Tile(64, n, k, warps)
        return Tile(64, n, k, warps, splits_of(_tiles(outputs, rows, 64, n), math.ceil(reduced / k), gpu))
    k = power_of_2(reduced, 16, half_step(stored))
    steps = math.ceil(reduced / k)
    candidates = [
        Tile(m, n, k, warps, splits)
        for m, n, warps in _fitting(outputs, rows, gpu, 256, 128)
        for splits in range(1, max(1, min(steps // 4, _MOST_SPLITS)) + 1)
    ]
    return min(candidates, key=lambda tile: _clocks(tile, rows, outputs, steps, stored, gpu))


def _clocks(tile: Tile, rows: int, outputs: int, steps: int, stored: int, gpu: Multiprocessors) -> float:
    """About how long a product in half precision takes: rounds of programs, each the longest of its bytes through L2,
    its tensor cores' work and its tanh (16 a clock); and the partial sums, written and read in float32."""
    programs = _tiles(outputs, rows, tile.m, tile.n) * tile.splits
    tensor = 2048 if gpu.capability >= 90 else 1024  # multiply-adds of a clock
    entry = max(2 * (stored * tile.m + tile.n) / _L2_CLOCK, tile.m * tile.n / tensor, tile.m / 16)
    waves = math.ceil(programs / gpu.multiprocessors)
    total = waves * math.ceil(steps / tile.splits) * tile.k * entry
    if tile.splits == 1:
        return total
    return total + 8 * tile.splits * rows * outputs / (_L2_CLOCK * gpu.multiprocessors) + _LAUNCH_CLOCKS


def by_tap(channels: int) -> bool:
    """Whether a convolution's group has channels enough for tiles of a single tap: then pixels are located once per
    tile and channels_last is read 16 bytes at a time. Else a tile holds several taps, located entry by entry."""
    return channels >= 16


def convolution(
    channels: int, pixels: int, in_channels: int, groups: int, half: bool, gpu: Multiprocessors
) -> tuple[int, int, int]:
    """m over output channels of one group, n over pixels, and warps. Tiles of several taps keep the addresses of their
    pixels in registers: with 128 pixels they spill up to 96 bytes."""
    if not half:
        return power_of_2(channels, 16, 64), power_of_2(pixels, 16, 64), 8
    m, n, warps = filling(channels, pixels, groups, gpu, widest=128 if by_tap(in_channels) else 64)
    return power_of_2(channels, 16, m), n, warps


def task_product(
    tasks: int, rows: int, outputs: int, grouped: bool, half: bool, gpu: Multiprocessors
) -> tuple[int, int, int]:
    """m, n and warps where each task has `rows` rows. grouped: rows are found through a table, whose addresses stay in
    registers: tiles of 128 outputs spill for them (sm_90: 344 bytes at 256 rows, 208 at 128), those of 64 x 128 do
    not."""
    if not half:
        n = power_of_2(rows, 16, 64)
        return 64, n, 8 if n == 64 else 4
    return filling(outputs, rows, tasks, gpu, *((128, 64) if grouped else ()))


def weight_gradient(outputs: int, inputs: int, half: bool, gpu: Multiprocessors) -> tuple[int, int, int]:
    """m over outputs, n over inputs, and warps, of G = dy^T x."""
    return filling(outputs, inputs, 1, gpu) if half else (64, power_of_2(inputs, 16, 64), 8)


def convolution_gradient(channels: int, reduced: int, half: bool) -> tuple[int, int]:
    """m over output channels, n over what a group reduces over."""
    return power_of_2(channels, 16, 64), power_of_2(reduced, 16, 64 if half else 32)


def chunk_product(outputs: int, reduced: int, rows: int, chunk_size: int) -> tuple[int, int, int]:
    """Residues, m and n of a product whose logits are generated: rows of W chunk_size / gcd(chunk_size, reduced)
    apart, of one residue, begin at the same position of their chunks, and m of them make a tile."""
    residues = chunk_size // math.gcd(chunk_size, reduced)
    return residues, power_of_2(math.ceil(outputs / residues), 16, 64), power_of_2(rows, 16, 64)
