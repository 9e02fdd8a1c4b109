"""A batch whose samples belong to several tasks, for any inputs and outputs that a network has."""

from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map  # noqa: PLC2701

from ..errors import InputError
from .scope import tensors_of


def samples(inputs: tuple, kwargs: dict[str, Any]) -> int:
    """The number of samples: the first dimension of the first tensor among the inputs."""
    for leaf in tree_leaves((inputs, kwargs)):
        if isinstance(leaf, Tensor) and leaf.dim() > 0:
            return leaf.shape[0]
    raise InputError("one task per sample needs a tensor (batch, ...) among the network's inputs")


def rows(everything: tuple, chosen: Tensor, count: int) -> tuple:
    """The inputs with the chosen rows (int64) of every tensor that has `count` of them, other values as they are."""

    def pick(leaf: Any) -> Any:
        return leaf[chosen] if isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == count else leaf

    return tree_map(pick, everything)


def joined(parts: Sequence[Any], counts: Sequence[int], order: Tensor) -> Any:
    """The parts' outputs one after another, their rows then taken by `order`.

    Raises:
        InputError: a tensor without a row per sample among the outputs.
    """
    for part, count in zip(parts, counts, strict=True):
        for tensor in tensors_of(part):
            if tensor.dim() == 0 or tensor.shape[0] != count:
                raise InputError(
                    f"the network gives a tensor of {tuple(tensor.shape)} for {count} samples: without a row per "
                    "sample it needs one task per batch"
                )
    return _over([*parts], lambda tensors: torch.cat(tensors)[order])


def stacked(outputs: Sequence[Any]) -> Any:
    """Outputs of one structure with their tensors stacked, (tasks, ...)."""
    return _over([*outputs], torch.stack)


def spread(outputs: Any, places: Sequence[int], count: int) -> Any:
    """Stacked outputs at these places among `count`; between them NaN, or -1 of integers."""

    def put(tensors: list[Tensor]) -> Tensor:
        (rows,) = tensors
        empty = float("nan") if rows.is_floating_point() or rows.is_complex() else -1
        filled = rows.new_full((count, *rows.shape[1:]), empty)
        return filled.index_copy(0, torch.tensor(list(places), device=rows.device), rows)

    return _over([outputs], put)


def logits(output: Any, select: Callable[[Any], Tensor] | None) -> Tensor:
    """The logits in a network's output. Raises InputError where they are not to be found."""
    found = output if select is None else select(output)
    if isinstance(found, Tensor):
        return found
    found = found.get("logits") if isinstance(found, dict) else getattr(found, "logits", None)
    if select is None and isinstance(found, Tensor):
        return found
    raise InputError(
        f"the network returns {type(output).__name__}: say where its logits are, such as select=lambda y: y[0]"
    )


def _over(outputs: list, function: Callable[[list[Tensor]], Tensor]) -> Any:
    """`function` of the tensors at the same place of all outputs."""
    first = outputs[0]
    if isinstance(first, Tensor):
        return function(outputs)
    if isinstance(first, dict):
        values = {key: _over([output[key] for output in outputs], function) for key in first}
        return type(first)(**values) if is_dataclass(first) else type(first)(values)
    if isinstance(first, tuple) and hasattr(first, "_fields"):
        return type(first)(*(_over(list(values), function) for values in zip(*outputs, strict=True)))
    if isinstance(first, (tuple, list)):
        return type(first)(_over(list(values), function) for values in zip(*outputs, strict=True))
    if is_dataclass(first) and not isinstance(first, type):
        return type(first)(**{key: _over([getattr(o, key) for o in outputs], function) for key in vars(first)})
    if hasattr(first, "to_tuple") or not tensors_of(first):
        return first
    raise InputError(f"the network returns {type(first).__name__}: tensors, tuples, lists, dicts and dataclasses pass")
