"""How fused products are dealt to multiprocessors: wide tiles, reductions divided where one wave is not filled."""

import itertools

import pytest
import torch

from hypermask_fast.ops import estimates, tiling
from hypermask_fast.ops.estimates import A100, H200

SIZES = (1, 16, 33, 100, 784, 1000, 1024, 4096, 11008)
ROWS = (1, 16, 17, 64, 65, 128, 256, 1000, 4096, 8192)


def test_a_wide_tile_is_kept_and_its_reduction_divided():
    """256 rows of 4096 x 4096 are 32 tiles of (128, 256), and in 4 splits 128 programs for 132 multiprocessors."""
    assert tiling.product(256, 4096, 4096, True, 2, H200) == tiling.Tile(128, 256, 64, 8, 4)
    assert tiling.product(4096, 4096, 4096, True, 2, H200) == tiling.Tile(128, 256, 64, 8, 1)
    assert tiling.product(256, 4096, 4096, True, 2, A100)[:3] == (128, 128, 64)  # operands need registers too


def test_nine_tenths_of_a_wave_are_accepted():
    assert tiling.filling(128 * 119, 256, 1, H200) == (128, 256, 8)  # 119 of 132
    assert tiling.filling(128 * 118, 256, 1, H200) == (128, 128, 8)


@pytest.mark.parametrize("gpu", [H200, A100], ids=lambda gpu: gpu.name)
def test_every_split_has_work_and_narrow_tiles_move_more(gpu):
    for rows, outputs, reduced in itertools.product(ROWS, SIZES, SIZES):
        tile = tiling.product(rows, outputs, reduced, True, 2, gpu)
        assert tile.splits == 1 or tile.splits * 4 <= -(-reduced // tile.k)
        assert tile.n <= max(16, 1 << (rows - 1).bit_length())
    call = estimates.Call("masked_linear", 256, 4096, 4096, "bfloat16", 2, gradient=False)
    assert estimates.count(call, gpu).fused.l2 < 0.65 * 403e6  # what tiles of (64, 64) move


def test_kernels_launch_with_the_tiles_that_are_counted(triton):
    from hypermask_fast.kernels import host, settings

    gpu = host.Gpu(H200.capability, H200.multiprocessors)
    for rows, outputs, reduced in itertools.product(ROWS, SIZES, SIZES):
        for dtype, stored in ((torch.bfloat16, 2), (torch.bfloat16, 4), (torch.float32, 4)):
            half = dtype != torch.float32
            found = settings.masked_product(rows, outputs, reduced, dtype, stored, gpu)
            tile = tiling.product(rows, outputs, reduced, half, stored, H200)
            assert (found.block_m, found.block_n, found.block_k, found.warps, found.splits) == tile
            found = settings.weight_gradient(outputs, reduced, rows, dtype, gpu)
            assert (found.block_m, found.block_n) == tiling.weight_gradient(outputs, reduced, half, H200)[:2]
            found = settings.convolution(outputs, rows, reduced, 9, 1, dtype, stored, gpu)
            assert (found.block_m, found.block_n) == tiling.convolution(outputs, rows, reduced, 1, half, H200)[:2]
            found = settings.task_product(10, rows, outputs, reduced, True, dtype, stored, gpu)
            assert (found.block_m, found.block_n) == tiling.task_product(10, rows, outputs, True, half, H200)[:2]
            residues, m, n = tiling.chunk_product(outputs, reduced, rows, 8000)
            found = settings.chunk_product(rows, -(-outputs // residues), residues, reduced, dtype, gpu)
            assert (found.block_m, found.block_n) == (m, n)
