"""How an operator of the extension gets its gradient: a torch.autograd.Function around it.

torch.library's own registration would do the same, at a higher cost of every call, recorded or not. There is none in
C++: PyTorch's stable ABI has no way to make a node of the graph.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..signature import needs_gradient


class Recorded:
    """An operator of the extension with its gradient; see `native.operator` for the other arguments.

    Called with the operator's arguments, it gives what `finish` makes of the operator's results.
    """

    def __init__(
        self,
        operator: Any,
        backward: Callable[..., Any],
        setup: Callable[..., None],
        finish: Callable[[Any], Any] | None = None,
    ) -> None:
        lists = _Lists(operator._schema)  # noqa: SLF001  # no public way
        function = _function(operator, backward, setup, finish, lists if lists.there else None)
        self._plain = operator if finish is None else lambda *args: finish(operator(*args))
        self._recorded = lists.around(function.apply) if lists.there else function.apply

    def __call__(self, *args: Any) -> Any:
        return self._recorded(*args) if needs_gradient(args) else self._plain(*args)

    def of_kind(self, *args: Any) -> Callable[..., Any]:
        """What computes the same for all calls that are recorded, or not recorded, as this one is."""
        return self._recorded if needs_gradient(args) else self._plain


def _function(
    operator: Any,
    backward: Callable[..., Any],
    setup: Callable[..., None],
    finish: Callable[[Any], Any] | None,
    lists: "_Lists | None",
) -> type[torch.autograd.Function]:
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *flat: Any) -> Any:  # with a setup_context of its own a call takes three times as long
            args = flat if lists is None else lists.arguments(flat)
            results = operator(*args)
            ctx.set_materialize_grads(False)
            setup(ctx, args, results)
            if finish is not None:
                results = finish(results)
            return results if lists is None else lists.flat(results)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            for grad in grads:
                if grad is not None:
                    break
            else:
                return (None,) * len(ctx.needs_input_grad)
            if lists is None:
                return backward(ctx, *grads)
            of_list, *rest = backward(ctx, *lists.results(grads))
            return (*rest, *of_list)

    Function.__name__ = Function.__qualname__ = operator._schema.name.partition("::")[2]  # noqa: SLF001
    return Function


class _Lists:
    """An operator's lists of tensors, which a Function takes and returns one by one: the first argument, which goes
    behind the others, and maybe the first result, behind which there is one at most.

    Attributes:
        there: whether the operator has any.
    """

    def __init__(self, schema: Any) -> None:
        self.there = str(schema.arguments[0].type) == "List[Tensor]"
        self._others = len(schema.arguments) - 1
        self._returned = str(schema.returns[0].type) == "List[Tensor]"
        self._alone = len(schema.returns) == 1

    def around(self, apply: Callable[..., Any]) -> Callable[..., Any]:
        """`apply` of a Function, called with the operator's arguments; it gives what the operator does."""
        if not self._returned:
            return lambda tensors, *others: apply(*others, *tensors)
        if self._alone:
            return lambda tensors, *others: list(apply(*others, *tensors))

        def called(tensors: Sequence[Tensor], *others: Any) -> Any:
            *listed, last = apply(*others, *tensors)
            return listed, last

        return called

    def arguments(self, flat: Sequence[Any]) -> Sequence[Any]:
        return ([*flat[self._others :]], *flat[: self._others])

    def flat(self, results: Any) -> Any:
        if not self._returned:
            return results
        return tuple(results) if self._alone else (*results[0], results[1])

    def results(self, flat: Sequence[Tensor | None]) -> Sequence[Any]:
        """Gradients as the operator returns results, a list where that is one, from a Function's, one by one."""
        if not self._returned:
            return flat
        return ([*flat],) if self._alone else ([*flat[:-1]], flat[-1])
