"""Which part of a global batch a rank takes, and what its mean loss counts."""

from typing import NamedTuple

import torch.distributed as dist

from ..errors import InputError


class Share(NamedTuple):
    """A rank's part of a batch.

    Attributes:
        rows: its samples, one after another.
        weight: K n_r / n, what its mean loss counts: the mean over K ranks of weight x (mean over the rank's n_r
            samples) is the mean over all n samples.
    """

    rows: slice
    weight: float


def share(samples: int, rank: int | None = None, ranks: int | None = None, *, least: int = 1) -> Share:
    """The rank's part of a batch of so many samples: near-equal ones, larger ones first, such as 11, 11 and 10 of 32.

        rows, weight = hmf.distributed.share(len(x))
        loss = weight * F.cross_entropy(model(x[rows], mask), y[rows]) + model.regularizer(mask)

    Args:
        samples: n, of the global batch.
        rank, ranks: of so many ranks, which one; None: as torch.distributed has it, and in one process 0 of 1.
        least: how many samples a rank must have; 0 where a rank can do without, as in evaluation.

    Raises:
        InputError: a batch that is too small for so many ranks, or no such rank.
    """
    here = dist.is_available() and dist.is_initialized()
    ranks = (dist.get_world_size() if here else 1) if ranks is None else ranks
    rank = (dist.get_rank() if here else 0) if rank is None else rank
    if not 0 <= rank < ranks:
        raise InputError(f"there is no rank {rank} of {ranks}: ranks are numbered from 0")
    if samples < least * ranks:
        raise InputError(f"a batch of {samples} is too small for {ranks} ranks, each of which needs {least} or more")
    each, more = divmod(samples, ranks)
    first, count = rank * each + min(rank, more), each + (rank < more)
    return Share(slice(first, first + count), ranks * count / samples if samples else 0.0)
