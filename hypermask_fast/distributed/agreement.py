"""Whether all ranks mean the same, found out before anything that would leave them apart or waiting for each other."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import InputError
from ..model import HyperMask
from ..ranks import Ranks


def agree(facts: Mapping[str, Any], problem: str | None = None, group: Any = None) -> None:
    """Raises InputError on every rank where facts differ, or where any rank has a problem. All ranks call it.

    Args:
        facts: what must be the same on all ranks; the key says what it is, the value is compared by its repr.
        group: of these ranks; None for all processes.
        problem: why this rank can't go on.
    """
    ranks = Ranks.of(group)
    with ranks.together():
        if problem is not None:
            raise InputError(problem)
    ranks.check_same(facts, "a model")


def facts_of(models: Sequence[HyperMask]) -> dict[str, Any]:
    """What ranks that train the same models must agree about."""

    def of(what: Any) -> list[Any]:
        return [what(model) for model in models]

    return {
        "number of tasks": of(lambda m: m.num_tasks),
        "hypernetwork's configuration": of(lambda m: m.hypernetwork),
        "sparsity": of(lambda m: m.sparsity),
        "drifts' settings": of(lambda m: m.drift),
        "choice of what is masked": of(lambda m: m.layout),
        "names, shapes, dtypes or requires_grad of parameters": of(
            lambda m: [(name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in m.named_parameters()]
        ),
        "tasks removed, frozen or their classes": of(lambda m: (m.hypernet.removed, m.frozen, m.classes)),
        "task that is being trained": of(
            lambda m: None if m.anchor is None else (m.anchor.task, [t.shape for t in m.anchor.targets])
        ),
    }
