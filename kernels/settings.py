"""Launch settings and the heuristics that choose them. `tune` (tuning.py) can measure better ones on request."""

from dataclasses import dataclass

import torch
from triton import cdiv, next_power_of_2

from . import host


@dataclass(frozen=True, slots=True)
class Tiles:
    """One launch of a tiled product: the accumulator is (block_m, block_n), the reduction goes by block_k.

    splits > 1 divides the reduction among that many programs, whose partial sums a second launch adds in order.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int = 4
    stages: int = 3
    splits: int = 1

    def launch(self) -> dict[str, int]:
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }

    def launch_chunks(self) -> dict[str, int]:
        """The same where block_k steps over the hypernetwork's width."""
        settings = self.launch()
        settings["BLOCK_H"] = settings.pop("BLOCK_K")
        return settings


def _clip(size: int, low: int, high: int) -> int:
    return max(low, min(high, next_power_of_2(max(size, 1))))


def _splits(programs: int, steps: int, device: torch.device) -> int:
    """Enough programs for two per multiprocessor, each with at least four steps of the reduction."""
    wanted = 2 * host.multiprocessors(device.index) // max(programs, 1)
    return max(1, min(wanted, steps // 4, 32))


def masked_product(rows: int, outputs: int, reduced: int, dtype: torch.dtype, device: torch.device) -> Tiles:
    """(W * m) x^T, an (outputs, rows) product: block_m over outputs, block_n over rows of x.

    Few rows: bytes count, so long runs of W, many in flight, and a split reduction to fill the chip.
    Many rows: the mask is made once per block_n rows, so block_n is as wide as registers allow.
    """
    block_n = _clip(rows, 16, 64 if dtype == torch.float32 else 128)
    if dtype == torch.float32:
        block_m, block_k = 64, 32
    else:
        block_m, block_k = 64, 64
    block_k = _clip(reduced, 16, block_k)
    warps = 8 if dtype == torch.float32 and block_n == 64 else 4
    if rows > 64:
        return Tiles(block_m, block_n, block_k, warps)
    programs = cdiv(outputs, block_m) * cdiv(rows, block_n)
    return Tiles(block_m, block_n, block_k, warps, stages=4, splits=_splits(programs, cdiv(reduced, block_k), device))


def weight_gradient(outputs: int, inputs: int, rows: int, dtype: torch.dtype) -> Tiles:
    """G = dy^T x, an (outputs, inputs) product reduced over rows; the epilogue holds W and a beside G."""
    block_n = _clip(inputs, 16, 64 if dtype == torch.float32 else 128)
    return Tiles(64, block_n, _clip(rows, 16, 32), warps=8)


def convolution(channels: int, pixels: int, reduced: int, dtype: torch.dtype) -> Tiles:
    """Implicit GEMM: block_m over output channels of one group, block_n over pixels."""
    if dtype == torch.float32:
        return Tiles(_clip(channels, 16, 64), _clip(pixels, 16, 64), _clip(reduced, 16, 32))
    return Tiles(_clip(channels, 16, 64), _clip(pixels, 16, 128), _clip(reduced, 16, 32))


def convolution_gradient(
    channels: int, reduced: int, pixels: int, groups: int, dtype: torch.dtype, device: torch.device
) -> Tiles:
    """G over (channels, in * kh * kw) of a group, reduced over all pixels: few tiles, so the reduction is split."""
    block_m, block_n = _clip(channels, 16, 64), _clip(reduced, 16, 32 if dtype == torch.float32 else 64)
    block_k = _clip(pixels, 16, 32)
    programs = cdiv(channels, block_m) * cdiv(reduced, block_n) * groups
    splits = _splits(programs, cdiv(pixels, block_k), device)
    stages = 2 if dtype == torch.float32 else 3
    return Tiles(block_m, block_n, block_k, 4 if splits > 1 else 8, stages, splits)


def chunk_tiles(chunks: int, chunk_size: int, width: int) -> Tiles:
    """A tile of (chunk, position) whose logits are a product over `width`; block_k is the step over it."""
    return Tiles(_clip(chunks, 16, 64), _clip(chunk_size, 16, 64), _clip(width, 16, 32), warps=8, stages=2)


def chunk_product(rows: int, outputs: int, residues: int, reduced: int, dtype: torch.dtype, device) -> Tiles:
    """As `masked_product` for few rows: `outputs` rows of the weight share their positions, for each of `residues`."""
    block_m, block_n = _clip(outputs, 16, 64), _clip(rows, 16, 64)
    block_k = _clip(reduced, 16, 32 if dtype == torch.float32 else 64)
    programs = cdiv(outputs, block_m) * residues * cdiv(rows, block_n)
    warps = 8 if dtype == torch.float32 else 4
    splits = _splits(programs, cdiv(reduced, block_k), device)
    return Tiles(block_m, block_n, block_k, warps, stages=2, splits=splits)


def width_block(width: int) -> int:
    """Step over the hypernetwork's width inside a product's own loop: one step where registers allow."""
    return _clip(width, 16, 64)


def task_product(rows: int, outputs: int, reduced: int, dtype: torch.dtype) -> Tiles:
    """As `masked_product` with `rows` the rows that a task may expect: every task fills tiles of its own."""
    block_n = _clip(rows, 16, 64)
    block_k = _clip(reduced, 16, 32 if dtype == torch.float32 else 64)
    return Tiles(64, block_n, block_k, warps=8 if dtype == torch.float32 and block_n == 64 else 4)


def task_weight_gradient(outputs: int, inputs: int, rows: int, dtype: torch.dtype) -> Tiles:
    """As `weight_gradient`, narrower: dW's sum over the tasks stays in registers beside each task's G."""
    return Tiles(64, _clip(inputs, 16, 32 if dtype == torch.float32 else 64), _clip(rows, 16, 32), warps=8)
