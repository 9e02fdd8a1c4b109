"""Whether all ranks mean the same, found out before anything that would leave them apart or waiting for each other."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from ..errors import InputError
from ..model import HyperMask
from ..processes import check_initialized

_DIGEST = 16  # bytes of each fact's


def agree(facts: Mapping[str, Any], problem: str | None = None, group: Any = None) -> None:
    """Raises InputError on every rank where facts differ, or where any rank has a problem. All ranks call it.

    Args:
        facts: what must be the same on all ranks; the key says what it is, the value is compared by its repr.
        group: of these ranks; None for all processes.
        problem: why this rank can't go on; it is this rank's line, and the others' says which rank it is.
    """
    check_initialized()
    header = _gathered(bytes([problem is not None]) + _digest(list(facts)), group)
    if problem is not None:
        raise InputError(problem)
    if header[:, 0].any():
        raise InputError(f"{_ranks(header[:, 0].bool())} can't go on; the line there says why")
    _check(header[:, 1:], "what is compared, as versions of this package do")
    found = _gathered(b"".join(map(_digest, facts.values())), group)
    for what, of_fact in zip(facts, found.split(_DIGEST, 1), strict=True):
        _check(of_fact, what)


def _digest(value: Any) -> bytes:
    return hashlib.sha256(repr(value).encode()).digest()[:_DIGEST]


def _gathered(own: bytes, group: Any) -> torch.Tensor:
    """(ranks, bytes) uint8, of every rank."""
    on = "cpu" if "cpu:" in dist.get_backend_config(group) else "cuda"
    mine = torch.tensor(list(own), dtype=torch.uint8, device=on)
    rows = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(rows, mine, group=group)
    return torch.stack(rows).cpu()


def _check(digests: torch.Tensor, what: str) -> None:
    other = (digests != digests[0]).any(1)
    if other.any():
        raise InputError(f"ranks disagree about the model: {_ranks(other)} and rank 0 differ in {what}")


def _ranks(which: torch.Tensor) -> str:
    numbers = [str(number) for number in which.nonzero().flatten().tolist()]
    return f"rank {numbers[0]}" if len(numbers) == 1 else f"ranks {', '.join(numbers)}"


def facts_of(models: Sequence[HyperMask]) -> dict[str, Any]:
    """What ranks that train the same models must agree about."""

    def of(what: Any) -> list[Any]:
        return [what(model) for model in models]

    return {
        "the number of tasks": of(lambda m: m.num_tasks),
        "the hypernetwork's configuration": of(lambda m: m.hypernetwork),
        "sparsity": of(lambda m: m.sparsity),
        "the drifts' settings": of(lambda m: m.drift),
        "what is masked": of(lambda m: m.layout),
        "names, shapes, dtypes or requires_grad of parameters": of(
            lambda m: [(name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in m.named_parameters()]
        ),
        "tasks removed, frozen or their classes": of(lambda m: (m.hypernet.removed, m.frozen, m.classes)),
        "the task that is being trained": of(
            lambda m: None if m.anchor is None else (m.anchor.task, [t.shape for t in m.anchor.targets])
        ),
    }
