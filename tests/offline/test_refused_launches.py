"""Launches that a GPU refuses for want of shared memory or registers, by a stand-in for such a GPU."""

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from support import memory
from support.arguments import TRITON_ARGUMENTS, threshold
from support.comparing import DEVICE, randn

from hypermask_fast.ops.task_rows import TaskRows
from hypermask_fast.ops.triton import operator

triton = pytest.importorskip("triton")
TILED = (
    "masked_linear", "masked_linear_backward", "masked_conv2d", "masked_conv2d_backward", "chunk_masked_linear",
    "chunk_masked_linear_backward", "task_batched_linear", "task_batched_linear_backward",
)  # fmt: skip


class SmallGpu:
    """Refuses launches that `fits` says no to, and counts them."""

    def __init__(self) -> None:
        self.fits: Callable[[dict], bool] = lambda settings: True
        self.refused = 0

    def judge(self, settings: dict) -> None:
        if not self.fits(settings):
            self.refused += 1
            raise triton.OutOfResources(300_000, 232_448, "shared memory")


@pytest.fixture
def small_gpu(monkeypatch) -> Iterator[SmallGpu]:
    from triton.runtime.interpreter import GridExecutor
    from triton.runtime.jit import JITFunction

    from hypermask_fast.kernels import host, tiles

    gpu = SmallGpu()
    owner, method = (GridExecutor, "__call__") if host.INTERPRETED else (JITFunction, "run")
    run = getattr(owner, method)

    def launch(self, *args, **settings):
        gpu.judge(settings)
        return run(self, *args, **settings)

    monkeypatch.setattr(owner, method, launch)
    monkeypatch.setattr(tiles, "_instead", {})
    with memory.poisoned():  # what is not written shows
        yield gpu


@pytest.mark.parametrize("name", TILED)
def test_what_is_refused_runs_with_smaller_settings_and_says_so_once(small_gpu, name):
    op, arguments = operator(name), TRITON_ARGUMENTS[name]()
    expected = op(*arguments)
    small_gpu.fits = lambda settings: settings.get("num_stages", 1) == 1
    with pytest.warns(UserWarning, match=r"needs more shared memory \(300000\) than this GPU has \(232448\)"):
        found = op(*arguments)
    assert small_gpu.refused > 0
    torch.testing.assert_close(found, expected)
    small_gpu.refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(op(*arguments), expected)
    assert small_gpu.refused == 0


LARGER = {
    "masked_linear": lambda: (randn(40, 50), randn(70, 50), randn(70, 50), threshold(), randn(70)),
    "masked_linear_backward": lambda: (
        randn(40, 70), randn(40, 50), randn(70, 50), randn(70, 50), threshold(), [True] * 3,
    ),
    "masked_conv2d": lambda: (
        randn(2, 18, 4, 4), randn(20, 18, 3, 3), randn(20, 18, 3, 3), threshold(), None, (1, 1), (1, 1), (1, 1), 1,
    ),
    "masked_conv2d_backward": lambda: (
        randn(2, 20, 4, 4), randn(2, 18, 4, 4), randn(20, 18, 3, 3), randn(20, 18, 3, 3), threshold(),
        (1, 1), (1, 1), (1, 1), 1, [False, True, True],
    ),
    "task_batched_linear": lambda: (
        randn(40, 50), randn(70, 50), randn(2, 70, 50), threshold().expand(2),
        *TaskRows.of(torch.arange(40, device=DEVICE) % 2, 2), None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LARGER)
def test_smaller_tiles_cover_all_of_the_result(small_gpu, name):
    op, arguments = operator(name), LARGER[name]()
    expected = op(*arguments)
    small_gpu.fits = lambda settings: sum(settings.get(f"BLOCK_{side}", 0) for side in "MNK") <= 48
    with pytest.warns(UserWarning, match="from now on it runs with Tiles"):
        found = op(*arguments)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)  # sums in another order


def test_where_nothing_fits_the_refusal_is_the_callers(small_gpu):
    small_gpu.fits = lambda settings: False
    with pytest.raises(triton.OutOfResources):
        operator("masked_linear")(*TRITON_ARGUMENTS["masked_linear"]())


def test_smaller_tiles_end_with_the_smallest():
    from hypermask_fast.kernels.tiles import Tiles

    tiles, found = Tiles(128, 256, 64, warps=8, stages=3), []
    while tiles := tiles.smaller():
        found.append(tiles)
    assert found[0] == Tiles(128, 256, 32, 8, 3) and found[-1] == Tiles(16, 16, 16, 8, 1)
    assert all((t.warps, t.splits) == (8, 1) for t in found)
