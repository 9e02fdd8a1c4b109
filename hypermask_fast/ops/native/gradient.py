"""How an operator of the extension gets its gradient: a torch.autograd.Function around it.

torch.library's own registration would do the same, at a higher cost of every call, recorded or not.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def recorded(operator: Any, backward: Callable[..., Any], setup: Callable[..., None]) -> Callable[..., Any]:
    """`operator`, an overload of the extension's, with its gradient; see `native.operator` for the other two."""
    kinds = [str(argument.type) for argument in operator._schema.arguments]  # noqa: SLF001  # no public way
    shape = _Shape(kinds[0] == "List[Tensor]", len(kinds) - 1, [str(r.type) for r in operator._schema.returns])  # noqa: SLF001

    class Recorded(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *flat: Any) -> Any:  # with a setup_context of its own a call takes three times as long
            args = shape.arguments(flat)
            results = operator(*args)
            ctx.set_materialize_grads(False)
            setup(ctx, args, results)
            return shape.flat_results(results)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            for grad in grads:
                if grad is not None:
                    break
            else:
                return (None,) * len(ctx.needs_input_grad)
            return shape.flat_gradients(backward(ctx, *shape.gradients(grads)))

    Recorded.__name__ = Recorded.__qualname__ = operator._schema.name.partition("::")[2]  # noqa: SLF001

    def call(*args: Any) -> Any:
        if not torch.is_grad_enabled() or not _needs_gradient(args):
            return operator(*args)
        return shape.results(Recorded.apply(*shape.flat(args)))

    return call


def _needs_gradient(args: Sequence[Any]) -> bool:
    for arg in args:
        if isinstance(arg, Tensor):
            if arg.requires_grad:
                return True
        elif isinstance(arg, list) and any(isinstance(t, Tensor) and t.requires_grad for t in arg):
            return True
    return False


class _Shape:
    """Where an operator has a list of tensors: a Function takes and returns tensors one by one.

    Args:
        listed: whether the first argument is a list of tensors, which goes behind the others.
        others: how many these are; returns: types of the results.
    """

    def __init__(self, listed: bool, others: int, returns: list[str]) -> None:
        self._listed, self._others, self._returns = listed, others, returns

    def flat(self, args: Sequence[Any]) -> Sequence[Any]:
        return (*args[1:], *args[0]) if self._listed else args

    def arguments(self, flat: Sequence[Any]) -> Sequence[Any]:
        return ([*flat[self._others :]], *flat[: self._others]) if self._listed else flat

    def flat_gradients(self, grads: Any) -> Any:
        if not self._listed:
            return grads
        of_list, *rest = grads
        return (*rest, *of_list)

    def flat_results(self, results: Any) -> Any:
        if self._returns == ["List[Tensor]"]:
            return tuple(results)
        if self._returns[0] == "List[Tensor]":
            return (*results[0], *results[1:])
        return results

    def results(self, flat: Any) -> Any:
        """As the operator returns them. A list is followed by one tensor at most."""
        if self._returns == ["List[Tensor]"]:
            return list(flat)
        if self._returns[0] == "List[Tensor]":
            return list(flat[:-1]), flat[-1]
        return flat

    def gradients(self, grads: Sequence[Tensor | None]) -> Sequence[Any]:
        """One argument per result."""
        if self._returns[0] != "List[Tensor]":
            return grads
        return ([*grads],) if len(self._returns) == 1 else ([*grads[:-1]], grads[-1])
