"""What an optimiser has to know of a model and its Parameters before it steps them."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InputError
from .model import HyperMask
from .processes import local


def hypermask_in(module: Any, taker: str) -> HyperMask:
    if isinstance(module, HyperMask):
        return module
    if not isinstance(module, nn.Module):
        raise InputError(
            f"{taker} takes the HyperMask model itself, all of whose Parameters it trains, not {type(module).__name__}"
        )
    found = [m for m in module.modules() if isinstance(m, HyperMask)]
    if len(found) != 1:
        raise InputError(
            f"{taker} takes a module with one HyperMask model in it; {type(module).__name__} has {len(found)}"
        )
    return found[0]


def steps_on_factors(weight: Tensor, state: dict[str, Any]) -> bool:
    """Whether the kernels can step this layer where it lies. In bfloat16 torch.optim.Adam rounds elsewhere."""
    like, *moments = (local(weight), *(local(state[name]) for name in ("exp_avg", "exp_avg_sq") if name in state))
    dtypes = {t.dtype for t in moments} or {like.dtype}
    halves = like.dtype == torch.float32 and dtypes == {torch.bfloat16}
    return (
        like.dtype in (torch.float32, torch.float64)
        and (halves or dtypes == {like.dtype})
        and all(t.is_contiguous() and t.device == like.device and t.shape == like.shape for t in (like, *moments))
    )


def hooks_of(parameter: Tensor) -> Any:
    """The hooks on its gradient; false where there are none."""
    return parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None)  # noqa: SLF001


def fusible(parameters: Iterable[Tensor]) -> bool:
    """Whether PyTorch's fused Adam, which walks through memory, meets the same entry in all of a parameter's arrays."""
    for p in parameters:
        other = p.dim() == 4 and p.is_contiguous(memory_format=torch.channels_last)
        if not (p.is_contiguous() or other) or (p.grad is not None and p.grad.stride() != p.stride()):
            return False
    return True


def plain_step(optimizer: torch.optim.Adam) -> None:
    """torch.optim.Adam's step without the profiler's frame and the hooks around it, which are around ours already."""
    step = torch.optim.Adam.step
    if getattr(step, "hooked", False):
        step = step.__wrapped__  # pyright: ignore[reportFunctionMemberAccess]
    step(optimizer)
