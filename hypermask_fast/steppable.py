"""What an optimiser has to know of a model and its Parameters before it steps them."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InputError
from .model import HyperMask
from .ops import native
from .ops.native import trunk as operators
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


def count(steps: Sequence[Tensor]) -> None:
    """One more in each of these counters, in one call."""
    if not native.PROBLEM and all(step.is_cpu and step.dtype is torch.float32 for step in steps):
        operators.count_steps([*steps])
    elif steps:
        torch._foreach_add_([*steps], 1)  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]


def plain_step(optimizer: torch.optim.Adam) -> None:
    """torch.optim.Adam's step without the profiler's frame and the hooks around it, which are around ours already."""
    calls = [_fused_call(optimizer, group) for group in optimizer.param_groups]
    if all(call is not None for call in calls):
        for call in calls:
            _run(*call)
        return
    for group in optimizer.param_groups:
        if group["fused"] and not fusible(group["params"]):
            group["fused"] = False
    step = torch.optim.Adam.step
    if getattr(step, "hooked", False):
        step = step.__wrapped__  # pyright: ignore[reportFunctionMemberAccess]
    step(optimizer)


def _fused_call(optimizer: torch.optim.Adam, group: dict[str, Any]) -> tuple | None:
    """The lists that torch.optim.Adam makes for its fused step of a group on the CPU, and the group; None where it has
    more to do than that, as in the first step. Looking that up takes it longer than small networks' arithmetic."""
    if not group["fused"] or group["amsgrad"] or not all(type(beta) is float for beta in group["betas"]):
        return None
    lists: tuple[list[Tensor], ...] = ([], [], [], [], [])
    states, dtype = optimizer.state, None
    for p in group["params"]:
        grad = p.grad
        if grad is None:
            continue
        state = states.get(p)
        if not state or not p.is_cpu or type(grad) is not Tensor or grad.layout is not torch.strided:
            return None
        if dtype is None:
            dtype = p.dtype
        if p.dtype is not dtype or not p.is_contiguous() or not grad.is_contiguous():
            return None
        for found, tensor in zip(
            lists, (p, grad, state["exp_avg"], state["exp_avg_sq"], state["step"]), strict=True
        ):
            found.append(tensor)
    return *lists, group


def _run(
    parameters: list[Tensor],
    grads: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    steps: list[Tensor],
    group: dict[str, Any],
) -> None:
    if not parameters:
        return
    count(steps)
    name = "_fused_adamw_" if group["decoupled_weight_decay"] else "_fused_adam_"
    beta1, beta2 = group["betas"]
    settings = {name: group[name] for name in ("lr", "weight_decay", "eps", "amsgrad", "maximize")}
    getattr(torch, name)(parameters, grads, first, second, [], steps, beta1=beta1, beta2=beta2, **settings)
