"""What an optimiser has to know of a model and its Parameters before it steps them."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InputError
from .model import HyperMask
from .ops import native
from .ops.native import adam as operators
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


def check_dense(module: nn.Module, groups: Iterable[dict[str, Any]]) -> None:
    """Raises InputError where Adam is to train an embedding whose gradients are sparse. Replicas' become dense."""
    if hypermask_in(module, "Adam").reducer is not None:
        return
    trained = {id(p) for group in groups for p in group["params"] if p.requires_grad}
    for name, part in module.named_modules():
        if isinstance(part, (nn.Embedding, nn.EmbeddingBag)) and part.sparse and id(part.weight) in trained:
            raise InputError(
                f"{name} has sparse gradients, which Adam can't take: make it with sparse=False, or leave its weight "
                "out of params and give it to torch.optim.SparseAdam"
            )


def steps_on_factors(weight: Tensor, state: dict[str, Any]) -> bool:
    """Whether the kernels can step this layer where it lies. In bfloat16 torch.optim.Adam rounds elsewhere."""
    like = local(weight)
    moments = [local(state[name]) for name in ("exp_avg", "exp_avg_sq") if name in state]
    if like.dtype not in (torch.float32, torch.float64) or not like.is_contiguous():
        return False
    dtype = moments[0].dtype if moments else like.dtype
    if dtype != like.dtype and (dtype, like.dtype) != (torch.bfloat16, torch.float32):
        return False
    for t in moments:
        if t.dtype != dtype or not t.is_contiguous() or t.device != like.device or t.shape != like.shape:
            return False
    return True


def hooks_of(parameter: Tensor) -> Any:
    """The hooks on its gradient; false where there are none."""
    return parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None)  # noqa: SLF001


def fusible(parameters: Iterable[Tensor]) -> bool:
    """Whether PyTorch's fused Adam can step them: real numbers, and the same entry at the same place of all arrays."""
    for p in parameters:
        if p.grad is not None and not p.is_floating_point():
            return False
        other = p.dim() == 4 and p.is_contiguous(memory_format=torch.channels_last)
        if not (p.is_contiguous() or other) or (p.grad is not None and p.grad.stride() != p.stride()):
            return False
    return True


class LayerNumbers:
    """What the output layer's kernels are given besides tensors. The learning rate is kept beside the weight."""

    def __init__(self) -> None:
        self._lr: tuple[tuple, Tensor] | None = None

    def of(self, group: dict[str, Any], step: Tensor, weight: Tensor, first_row: int) -> tuple[Any, ...]:
        """From `step` on, the arguments of `ops.factored_adam`; first_row: rows that other processes have before it."""
        beta1, beta2 = group["betas"]
        decay, decoupled = float(group["weight_decay"]), bool(group["decoupled_weight_decay"])
        step = step if step.device == weight.device else step.to(weight.device)
        numbers = beta1, beta2, group["eps"], decay, decoupled, group["maximize"]
        return step, self._lr_beside(group, weight), *numbers, first_row

    def _lr_beside(self, group: dict[str, Any], weight: Tensor) -> Tensor:
        """The learning rate as a tensor like weight. A number is copied when it changes: to a GPU that is a wait."""
        lr = group["lr"]
        if isinstance(lr, Tensor):
            return lr.to(weight)
        key = lr, weight.dtype, weight.device
        if self._lr is None or self._lr[0] != key:
            self._lr = key, weight.new_tensor(lr)
        return self._lr[1]


def count(steps: Sequence[Tensor]) -> None:
    """One more in each of these counters, in one call."""
    if not native.PROBLEM and all(step.is_cpu and step.dtype is torch.float32 for step in steps):
        operators.count_steps([*steps])
    elif steps:
        torch._foreach_add_([*steps], 1)  # pyright: ignore


def plain_step(optimizer: torch.optim.Adam) -> None:
    """torch.optim.Adam's step without the profiler's frame and the hooks around it, which are around ours already."""
    found = [_fused_call(optimizer, group) for group in optimizer.param_groups]
    calls = [call for call in found if call is not None]
    if len(calls) == len(found):
        for call in calls:
            operators.fused_adam(*call)
        return
    for group in optimizer.param_groups:
        check_moments(optimizer, group["params"])
        if group["fused"] and not fusible(group["params"]):
            group["fused"] = False
    step = torch.optim.Adam.step
    if getattr(step, "hooked", False):
        step = step.__wrapped__  # pyright: ignore[reportFunctionMemberAccess]
    step(optimizer)


def check_moments(optimizer: torch.optim.Adam, parameters: Iterable[Tensor]) -> None:
    """Raises InputError where a parameter that is to be stepped has changed since its moments were made: PyTorch's
    fused Adam does not look at shapes before it writes."""
    for p in parameters:
        if p.grad is None:
            continue
        state = optimizer.state.get(p, {})
        for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            moment = state.get(name)
            if moment is not None and (moment.shape != p.shape or moment.dtype != p.dtype):
                raise InputError(
                    f"a parameter is {_described(p)}, and its {name} is {_described(moment)}: it has changed since "
                    "(.to(dtype), another shape), make a new optimizer"
                )


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of {tuple(tensor.shape)}"


def _fused_call(optimizer: torch.optim.Adam, group: dict[str, Any]) -> tuple | None:
    """What the extension needs to make torch.optim.Adam's fused step of a group; None where that has more to do, as in
    the first step. Small networks' arithmetic is done before PyTorch has looked all that up."""
    lr = group["lr"]
    if native.PROBLEM or not group["fused"] or group["amsgrad"] or (isinstance(lr, Tensor) and not lr.is_cpu):
        return None
    lists: tuple[list[Tensor], ...] = ([], [], [], [], [])
    for p in group["params"]:
        grad = p.grad
        if grad is None:
            continue
        state = optimizer.state.get(p)
        if not state or not p.is_cpu or p.dtype is not torch.float32:
            return None
        if type(grad) is not Tensor or grad.layout is not torch.strided:
            return None
        first, second, step = state["exp_avg"], state["exp_avg_sq"], state["step"]
        if not (p.is_contiguous() and grad.is_contiguous() and first.is_contiguous() and second.is_contiguous()):
            return None
        if not step.is_cpu or step.dtype is not torch.float32:
            return None
        for found, each in zip(lists, (p, grad, first, second, step), strict=True):
            found.append(each)
    numbers = float(lr), *map(float, group["betas"]), float(group["eps"]), float(group["weight_decay"])
    return *lists, *numbers, bool(group["decoupled_weight_decay"]), bool(group["maximize"])
