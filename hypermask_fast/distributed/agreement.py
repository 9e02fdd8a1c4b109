"""Whether all ranks mean the same, found out before anything that would leave them apart or waiting for each other."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from ..errors import InputError
from ..processes import check_initialized

_DIGEST = 16  # bytes of each fact's


def agree(facts: Mapping[str, Any], problem: str | None = None) -> None:
    """Raises InputError on every rank where facts differ, or where any rank has a problem. All ranks call it.

    Args:
        facts: what must be the same on all ranks; the key says what it is, the value is compared by its repr.
        problem: why this rank can't go on; it is this rank's line, and the others' says which rank it is.
    """
    check_initialized()
    digests = [hashlib.sha256(repr(value).encode()).digest()[:_DIGEST] for value in facts.values()]
    own = hashlib.sha256(repr(list(facts)).encode()).digest()[:_DIGEST] + b"".join(digests)
    on = "cpu" if "cpu:" in dist.get_backend_config() else "cuda"
    mine = torch.tensor([int(problem is not None), *own], dtype=torch.uint8, device=on)
    rows = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, mine)
    found = torch.stack(rows).cpu()
    if problem is not None:
        raise InputError(problem)
    if found[:, 0].any():
        raise InputError(f"{_ranks(found[:, 0].bool())} can't go on; the line there says why")
    for number, what in enumerate(["facts compared (another version of this package)", *facts]):
        of_fact = found[:, 1 + _DIGEST * number : 1 + _DIGEST * (number + 1)]
        other = (of_fact != of_fact[0]).any(1)
        if other.any():
            raise InputError(f"ranks disagree about the model: {_ranks(other)} and rank 0 differ in {what}")


def _ranks(which: torch.Tensor) -> str:
    numbers = [str(number) for number in which.nonzero().flatten().tolist()]
    return f"rank {numbers[0]}" if len(numbers) == 1 else f"ranks {', '.join(numbers)}"
