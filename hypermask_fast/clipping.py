"""Clipping of gradients, factored and sharded ones too."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .processes import whole
from .wrapping import is_dtensor


def clip_grad_norm_(
    parameters: nn.Module | Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """torch.nn.utils.clip_grad_norm_, which also takes a model. A factored gradient's 2-norm comes from its factors.

    |G^T H|^2 = trace((G G^T) (H H^T)), summed in float64; another norm makes the gradient dense.

    Of DTensors the norm is that of the whole; all ranks call this.

    Returns:
        The norm before clipping, a scalar.
    """
    given = parameters.parameters() if isinstance(parameters, nn.Module) else parameters
    tensors = [given] if isinstance(given, Tensor) else list(given)
    with_grad = [tensor for tensor in tensors if tensor.grad is not None]
    sharded = [tensor for tensor in with_grad if is_dtensor(tensor)]
    if not sharded:
        return nn.utils.clip_grad_norm_(tensors, max_norm, norm_type, error_if_nonfinite, foreach)
    others = [tensor for tensor in with_grad if not is_dtensor(tensor)]
    grads: list[Any] = [tensor.grad for tensor in sharded]
    norms = [whole(torch.linalg.vector_norm(grad, norm_type)) for grad in grads]
    norms.append(nn.utils.get_total_norm([p.grad for p in others if p.grad is not None], norm_type, foreach=foreach))
    total = nn.utils.get_total_norm([norm.to(norms[0]) for norm in norms], norm_type, error_if_nonfinite)
    for some in (others, *([tensor] for tensor in sharded)):
        nn.utils.clip_grads_with_norm_(some, max_norm, total, foreach)
    return total
