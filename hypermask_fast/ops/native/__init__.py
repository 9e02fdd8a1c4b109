"""The C++ extension (csrc/): its operators by family in the files beside, named as those of csrc.

The extension registers schemas and kernels for CPU and CUDA in the namespace hypermask_native. Each family's file gives
its operators what torch.compile, autograd and opcheck need, and calls them with the reference's arguments.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, library

from ...errors import InputError
from .. import arguments, registry
from ..once import differentiable_once
from ..registry import Offer
from . import extension, gradient

PROBLEM = extension.load()


def _cuda_problem() -> str:
    if PROBLEM:
        return PROBLEM
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key  # pyright: ignore[reportPrivateUsage]  # no public way
    if not has_kernel("hypermask_native::mask_thresholds", "CUDA"):
        return extension.recorded("cuda") or "the extension was built without CUDA"
    return "" if torch.cuda.is_available() else "no CUDA device"


registry.declare("cpu", lambda: PROBLEM)
registry.declare("cuda", _cuda_problem)


def offers(
    function: Callable[..., Any],
    condition: Callable[..., str] = registry.serves,
    form: Callable[..., str] = registry.serves,
) -> dict[str, Offer]:
    """`Offer(function, condition, form)` on both of the extension's backends."""
    return dict.fromkeys(registry.NATIVE, Offer(function, condition, form))


def operator(
    name: str,
    shapes: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup: Callable[..., None] | None = None,
    finish: Callable[[Any], Any] | None = None,
    *,
    twice: bool = False,
) -> Callable[..., Any]:
    """hypermask_native::name as a function of the schema's arguments, with its shape function and its gradient.

    Args:
        shapes: makes empty results.
        backward: (ctx, gradient of each result) -> a gradient for each argument; for a list of tensors it is a list.
        setup: (ctx, arguments, the operator's results) keeps what `backward` needs.
        finish: makes what is returned of the operator's results, as many as these; `backward` is given its gradients.
        twice: whether `backward` is made of PyTorch's own operations, so that it can be differentiated again.
    """
    if PROBLEM:
        return _not_there
    library.register_fake(f"hypermask_native::{name}", without_values(name, shapes))
    called = getattr(torch.ops.hypermask_native, name).default
    if backward is None or setup is None:
        return called
    return gradient.Recorded(called, backward if twice else differentiable_once(name, backward), setup, finish)


class Served:
    """An op that is one operator: the arguments made ready for it, and the operator.

    Args:
        operator: of `operator`.
        ready: the op's arguments -> the operator's. What it does depends on the kind of the call alone (see
            `ops.signature`); where there is nothing to do it returns the very tensors that it was given.
    """

    def __init__(self, operator: Callable[..., Any], ready: Callable[..., Sequence[Any]]) -> None:
        self._operator, self._ready = operator, ready

    def __call__(self, *values: Any) -> Any:
        return self._operator(*self._ready(*values))

    def of_kind(self, *values: Any) -> Callable[..., Any]:
        """The same for calls of the kind of this one: what does nothing to such arguments is left out."""
        ready, args = self._ready, self._ready(*values)
        of_kind = getattr(self._operator, "of_kind", None)
        operator = self._operator if of_kind is None else of_kind(*args)
        return operator if _same(args, values) else lambda *values: operator(*ready(*values))


def _same(args: Sequence[Any], values: Sequence[Any]) -> bool:
    """Whether these are the same tensors and numbers, in lists also where the lists are others."""
    return len(args) == len(values) and all(
        a is b or (isinstance(a, list) and isinstance(b, list | tuple) and _same(a, b))
        for a, b in zip(args, values, strict=True)
    )


def _not_there(*args: Any) -> Any:
    raise InputError(PROBLEM)


def without_values(name: str, shapes: Callable[..., Any]) -> Callable[..., Any]:
    """A shape function that refuses meta tensors beside others: one suffices for it to be called."""

    @functools.wraps(shapes)
    def checked(*args: Any) -> Any:
        devices = {tensor.device.type for tensor in arguments.tensors(args)}
        if "meta" in devices and len(devices) > 1:
            raise RuntimeError(f"{name}: all tensors must be on one device, not on {' and '.join(sorted(devices))}")
        return shapes(*args)

    return checked


def contiguous(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.contiguous() for t in tensors]


def constant(tensor: Tensor) -> Tensor:
    """Contiguous, and no part of a graph."""
    return (tensor.detach() if tensor.requires_grad else tensor).contiguous()
