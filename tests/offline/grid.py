"""Compile every tiled kernel with every setting that the heuristics can give, dtypes mixed as under autocast.

`python grid.py 90` prints as JSON what came out for compute capability 9.0, as `offline.py` does for single shapes.
The heuristics are asked over a grid of shapes. Of tiles that as many warps share and that differ in height, in the
step of the reduction, in stages or in a width of up to 64, those that need the most are compiled: the others need no
more shared memory and no more registers.
"""

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import product

import torch
from offline import MULTIPROCESSORS, compiling, module
from torch import Tensor, empty

from hypermask_fast.kernels import host, settings
from hypermask_fast.kernels.conv2d_shape import Conv2dShape
from hypermask_fast.kernels.tiles import Tiles
from hypermask_fast.ops.task_rows import TaskRows

SIZES = (1, 8, 16, 33, 64, 100, 256, 1000, 4096)  # of a layer
ROWS = (1, 16, 17, 33, 64, 65, 100, 128, 256, 1000, 4096, 65536)  # of x; pixels
TASKS = (1, 10, 40)
MIXES = (  # dtypes of the products and of what is stored
    (torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32),
)  # fmt: skip
OF_FLOAT16 = (torch.float16, torch.float32)  # more registers than bfloat16 where tanh is exact: products alone
WIDTH = 1000  # rows of halves begin on 16 bytes, and Triton does not know it by itself


def largest(found: Iterable[Tiles]) -> list[Tiles]:
    """Tiles that none of the others covers, their splits counted as 1 or 2."""
    tiles = {replace(t, splits=min(t.splits, 2)) for t in found}
    return sorted((t for t in tiles if not any(_covers(u, t) for u in tiles - {t})), key=str)


def _covers(u: Tiles, t: Tiles) -> bool:
    wide_as = u.block_n == t.block_n or t.block_n <= u.block_n <= 64
    alike = wide_as and (u.warps, u.splits) == (t.warps, t.splits)
    return alike and u.block_m >= t.block_m and u.block_k >= t.block_k and u.stages >= t.stages


Case = tuple[Callable[[Tiles], object], list[Tiles]]


def linear(dtype: torch.dtype, stored: torch.dtype, gpu: host.Gpu) -> Iterator[Case]:
    op = module("masked_linear")
    x, weight, threshold = empty(256, WIDTH, dtype=dtype), empty(WIDTH, WIDTH, dtype=stored), empty((), dtype=stored)
    yield (
        lambda tiles: op.launch_product(x, weight, weight, threshold, weight[0], tiles),
        largest(
            replace(settings.masked_product(rows, outputs, reduced, dtype, stored.itemsize, gpu), splits=1)
            for rows, outputs, reduced in product(ROWS, SIZES, SIZES)
        ),
    )
    yield (
        lambda tiles: op.launch_weight_gradient(x, x, weight, weight, threshold, tiles=tiles),
        largest(
            settings.weight_gradient(outputs, inputs, rows, dtype, gpu)
            for rows, outputs, inputs in product(ROWS, SIZES, SIZES)
        ),
    )


def tasks(dtype: torch.dtype, stored: torch.dtype, gpu: host.Gpu) -> Iterator[Case]:
    op = module("task_batched_linear")
    weight, logits = empty(WIDTH, WIDTH, dtype=stored), empty(10, WIDTH, WIDTH, dtype=stored)
    x, thresholds, table = empty(256, WIDTH, dtype=dtype), empty(10, dtype=stored), _table(256)
    for grouped in (False, True):
        y, order = empty(*(() if grouped else (10,)), 256, WIDTH, dtype=dtype), table if grouped else (None, None)

        def product_of(tiles: Tiles, y: Tensor = y, order: tuple = order, grouped: bool = grouped) -> None:
            op.launch_task_product(x, weight, logits, thresholds, weight[0], y, *order, tiles)
            if grouped:  # which needs the most registers: as for dx, too
                op.launch_task_product(y, weight.t(), logits.transpose(1, 2), thresholds, None, x, *order, tiles)

        def gradient_of(tiles: Tiles, y: Tensor = y, order: tuple = order) -> None:
            op.launch_task_weight_gradient(y, x, weight, logits, thresholds, *order, tiles=tiles)

        yield (
            product_of,
            largest(
                settings.task_product(tasks, rows, outputs, reduced, grouped, dtype, stored.itemsize, gpu)
                for tasks, rows, outputs, reduced in product(TASKS, ROWS, SIZES, SIZES)
            ),
        )
        shapes = product(SIZES, ROWS)
        yield gradient_of, largest(settings.task_weight_gradient(inputs, rows, dtype) for inputs, rows in shapes)


def _table(rows: int) -> tuple[Tensor, Tensor]:
    """`order` and `begins` of rows sorted by task."""
    return TaskRows.of(torch.zeros(rows, dtype=torch.int64), 10)[1:]


def convolutions(dtype: torch.dtype, stored: torch.dtype, gpu: host.Gpu) -> Iterator[Case]:
    """Tiles of one tap, also for the input's gradient, and of several."""
    op, shape, threshold = module("masked_conv2d"), Conv2dShape((3, 3), (1, 1), (1, 1), (1, 1), 1), empty(())
    for channels, transposed in ((64, False), (64, True), (8, False)):
        x = empty(8, channels, 14, 14, dtype=dtype).contiguous(memory_format=torch.channels_last)
        weight = empty(channels, channels, 3, 3, dtype=stored)
        widths = [size for size in SIZES if settings.by_tap(size) == settings.by_tap(channels)]

        def convolution(tiles: Tiles, x: Tensor = x, weight: Tensor = weight, transposed: bool = transposed) -> None:
            bias = None if transposed else weight[:, 0, 0, 0]
            op.launch_convolution(x, weight, weight, threshold, bias, x, shape, transposed, tiles)

        def gradient_of(tiles: Tiles, x: Tensor = x, weight: Tensor = weight) -> None:
            op.launch_weight_gradient(x, x, weight, weight, threshold, shape, tiles=tiles)

        yield (
            convolution,
            largest(
                settings.convolution(outputs, pixels, inputs, 9, 1, dtype, stored.itemsize, gpu)
                for outputs, pixels, inputs in product(SIZES, ROWS, widths)
            ),
        )
        if not transposed:
            shapes = product(SIZES, widths, ROWS)
            yield gradient_of, largest(settings.convolution_gradient(o, i, n, 9, 1, dtype, gpu) for o, i, n in shapes)


def chunks(dtype: torch.dtype, stored: torch.dtype, gpu: host.Gpu) -> Iterator[Case]:
    """By shapes alone: these launches choose for themselves."""
    fused, made = module("chunk_masked_linear"), module("chunk_weights")
    threshold, weight = empty((), dtype=stored), empty(1024, 1024, dtype=stored)

    def launch(width: int) -> None:
        layer = empty(128, width, dtype=stored), empty(8192, width, dtype=stored), empty(8192, dtype=stored)
        x = empty(64, 1024, dtype=dtype)
        assert fused.launch_fused(x, weight, *layer, 0, threshold, weight[0]) is not None
        if width == 64:
            made.launch_masked_weight(weight, *layer, 0, threshold, dtype)
            made.launch_gradients(empty(1024, 1024, dtype=dtype), weight, *layer, 0, threshold, (True,) * 4)

    yield launch, [64, 100]


def compile_grid(capability: int) -> dict[str, list[dict]]:
    """What each kernel compiles to, per group and mix of dtypes ("tasks bfloat16 float32")."""
    torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = "tf32"  # needs the most
    gpu, found = host.Gpu(capability, MULTIPROCESSORS[capability]), {}
    cases = [
        *product(MIXES, (linear, tasks, convolutions)),
        *product(MIXES[:2], (chunks,)),  # with one dtype alone `offline.py` has them
        *product((OF_FLOAT16,), (linear, tasks)),
    ]
    for (dtype, stored), group in cases:
        with compiling(capability) as compiled:
            for launch, settings_of in group(dtype, stored, gpu):
                for tiles in settings_of:
                    before = len(compiled)
                    launch(tiles)
                    for kernel in compiled[before:]:
                        kernel["tiles"] = str(tiles)
        names = (str(d).removeprefix("torch.") for d in (dtype, stored))
        found[" ".join([group.__name__, *names])] = compiled
    return found


if __name__ == "__main__":
    print(json.dumps(compile_grid(int(sys.argv[1]))))
