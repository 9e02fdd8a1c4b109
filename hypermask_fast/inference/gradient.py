"""The task by the gradient of the entropy, as in SupSup: one pass under all masks at once, whatever their number."""

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils._pytree import tree_map  # noqa: PLC2701

from ..masking import mixed
from ..masking.masks import TaskMask
from ..masking.superposition import Superposition
from ..masking.task_batch import TaskMasks
from .features import TaskModel

_kept: WeakKeyDictionary[TaskMasks, tuple[Tensor, ...]] = WeakKeyDictionary()


def scores(
    model: TaskModel,
    inputs: tuple,
    kwargs: dict[str, Any],
    masks: Sequence[TaskMask],
    select: Callable[[Any], Tensor] | None = None,
    halving: bool = False,
) -> Tensor:
    """(T,) -dH / d alpha_t at alpha = 1 / T: which task's mask, given more weight, lowers the entropy most.

    H is the mean entropy of the batch's outputs under the weights sum_t alpha_t W * m_t, so that the batch is taken
    to be of one task. For single samples give batches of one.

    Args:
        masks: of T tasks.
        halving: the worse half of the tasks is left out, again and again, until one is left: log2 T passes in place
            of one. A task that was left out before the last two has -inf.

    Source: Wortsman et al. 2020 (SupSup), one-shot and binary.
    """
    found = torch.full((len(masks),), -torch.inf, device=masks[0].logits.device)
    left = list(range(len(masks)))
    while True:
        found.fill_(-torch.inf)
        those = masks if len(left) == len(masks) else [masks[i] for i in left]
        found[left] = _one_shot(model, inputs, kwargs, those, select).to(found.dtype)
        if not halving or len(left) <= 2:
            return found
        left = sorted(found.topk((len(left) + 1) // 2).indices.tolist())


def _one_shot(
    model: TaskModel,
    inputs: tuple,
    kwargs: dict[str, Any],
    masks: Sequence[TaskMask],
    select: Callable[[Any], Tensor] | None,
) -> Tensor:
    masked = [s for s, segment in enumerate(masks[0].layout.segments) if segment.selected]
    with torch.no_grad():
        each = [mask.effective for mask in masks]
        weights = list(_superposed(masks, each, masked))
    with torch.inference_mode(False), torch.enable_grad():
        inputs, kwargs, weights = tree_map(_recordable, (inputs, kwargs, weights))
        leaves = [weights[s].detach().requires_grad_() for s in masked]
        for s, leaf in zip(masked, leaves, strict=True):
            weights[s] = leaf
        with model.pass_under(Superposition(weights, [int(mask.task) for mask in masks])):
            logits = mixed.logits(model.net(*inputs, **kwargs), select)
            log_p = logits.log_softmax(-1)
            entropy = -(log_p.exp() * log_p).sum(-1).mean()
        grads = torch.autograd.grad(entropy, leaves, allow_unused=True)
    with torch.no_grad():
        found = torch.zeros(len(masks), device=entropy.device)
        for s, grad in zip(masked, grads, strict=True):
            if grad is not None:
                flat = grad.flatten()
                found -= torch.stack([torch.dot(made[s].flatten(), flat) for made in each])
        return found


def _recordable(leaf: Any) -> Any:
    """A copy of what was made in inference mode, which autograd refuses to record; anything else as it is."""
    return leaf.clone() if isinstance(leaf, Tensor) and leaf.is_inference() else leaf


def _superposed(masks: Sequence[TaskMask], each: list[tuple[Tensor, ...]], masked: list[int]) -> tuple[Tensor, ...]:
    """One tensor per segment: the mean of all tasks' W * m, kept as long as masks are that were made together."""
    if isinstance(masks, TaskMasks) and masks in _kept:
        return _kept[masks]
    weights = list(each[0])
    for s in masked:
        weights[s] = each[0][s] / len(masks)
        for made in each[1:]:
            weights[s].add_(made[s], alpha=1 / len(masks))
    if isinstance(masks, TaskMasks):
        _kept[masks] = tuple(weights)
    return tuple(weights)
