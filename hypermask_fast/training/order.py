"""The order in which a task's training samples come: one shuffled pass over the data after another."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from ..data import Split, TensorSplit
from ..masking.layout import MaskLayout

_BLOCK = 1 << 20  # sample numbers that are laid out at once: 8 MB


def batch_rows(
    samples: int, batch_size: int, iterations: int, seed: int, task: int, start: int = 0
) -> Iterator[Tensor]:
    """Blocks of rows, one row of sample numbers per iteration, from iteration `start` to the last one.

    A batch may span two passes. The order depends on samples, seed and task alone, so a position in it is an
    iteration: blocks from `start` on are those of the whole order without its first `start` rows.

    Args:
        samples: of the task, 1 or more.
        batch_size: sample numbers per row.
        iterations: rows of the whole order, of which `start` are left out.
        seed, task: decide the order.

    Returns:
        (rows, batch_size) int64 blocks of about 8 MB, each drawn when it is asked for.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + task) % 2**63)
    passed, offset = divmod(start * batch_size, samples)
    for _ in range(passed):  # a generator has no way ahead but to draw
        torch.randperm(samples, generator=generator)
    rest = torch.empty(0, dtype=torch.int64)
    while start < iterations:
        rows = min(max(_BLOCK // batch_size, 1), iterations - start)
        needed = rows * batch_size + offset - len(rest)
        passes = [torch.randperm(samples, generator=generator) for _ in range(-(-needed // samples))]
        stream = torch.cat([rest, *passes])[offset:]
        yield stream[: rows * batch_size].view(rows, batch_size)
        rest, offset, start = stream[rows * batch_size :].clone(), 0, start + rows


def with_ranks(
    blocks: Iterable[Tensor],
    split: Split,
    start: int,
    layout: MaskLayout,
    ramp: Callable[[int], float] | None,
    sparsity: float,
    device: torch.device,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Blocks of rows where the split reads them, each with the kept ranks of its iterations on `device`.

    Args:
        blocks: of `batch_rows`, from iteration `start` on.
        ramp: an iteration's sparsity in percent; None where it is `sparsity` in all, for which one row of ranks serves.
    """
    reads_on = device if isinstance(split, TensorSplit) else "cpu"
    for rows in blocks:
        sparsities = [sparsity] if ramp is None else [ramp(i) for i in range(start, start + len(rows))]
        yield rows.to(reads_on), layout.ramp_ranks(sparsities, device)
        start += len(rows)
