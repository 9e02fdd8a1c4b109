"""Gradients that are computed once only: to differentiate them again is refused, never silently zero."""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError

_REFERENCE = (
    "compute what is to be differentiated twice with backend='reference' (or inside `with "
    "hypermask_fast.use_backend('reference'):`)"
)


def differentiable_once(name: str, backward: Callable, instead: str = _REFERENCE) -> Callable:
    """`backward` of an op or layer whose gradients have no derivative of their own.

    Where autograd records the backward pass (`create_graph=True`), what it returns depends on everything that the op
    was given and that needs a gradient; to differentiate it raises InputError.

    name, instead: of the message, what has no second derivative and what to do instead.
    """

    @functools.wraps(backward)
    def recorded(ctx: Any, *grads: Any) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        read = _Read(ctx)
        origins = [t for t in _tensors((*grads, *read.saved_tensors)) if t.requires_grad]
        with torch.no_grad():
            results = backward(read, *grads)
        if not origins:
            return results
        message = f"{name} has no second derivative here: {instead}"
        several = isinstance(results, tuple)
        marked = _marked(message, [*results] if several else [results], origins)
        return tuple(marked) if several else marked[0]

    return recorded


class _Read:
    """A ctx whose saved tensors have been read: a checkpoint gives them no second time."""

    def __init__(self, ctx: Any) -> None:
        self._ctx, self.saved_tensors = ctx, ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def _marked(message: str, results: list, origins: list[Tensor]) -> list:
    """The same results, in a graph that has `origins` below it."""
    flat = [*_tensors(results)]
    new = iter(_Once.apply(message, len(flat), *flat, *origins))

    def exchanged(value: Any) -> Any:
        if isinstance(value, Tensor):
            return next(new)
        return [exchanged(v) for v in value] if isinstance(value, (list, tuple)) else value

    return [exchanged(value) for value in results]


class _Once(torch.autograd.Function):
    """Passes the first `count` tensors on; its gradient is refused."""

    @staticmethod
    def forward(message: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.message = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        raise InputError(ctx.message)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """All tensors among values and lists of them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
