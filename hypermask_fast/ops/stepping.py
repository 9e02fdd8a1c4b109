"""The ops that step Adam: their definitions, which `reference` names, and Adam's step on a gradient that there is.

Moments in bfloat16 are widened, stepped in float32, and rounded by `rounding`.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .rounding import draws, rounded

_BLOCK = 2**20  # entries that are rounded at once: their random numbers take 8 bytes each


@torch.no_grad()
def hypernet_adam(
    hidden: Tensor,
    grad_logits: Tensor,
    targets: Tensor,
    drift_weight: Tensor,
    weight: Tensor,
    bias: Tensor,
    weight_m: Tensor,
    weight_v: Tensor,
    bias_m: Tensor,
    bias_v: Tensor,
    step: Tensor,
    lr: Tensor,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    maximize: bool = False,
    first_row: int = 0,
) -> tuple[Tensor, Tensor]:
    """Backward of the dense output layer a_j = W h_j + b for tasks 0..t, then its Adam step.

    R = sum_{j<t} ||a_j - target_j||^2, g_j = dLoss/dR * 2 (a_j - target_j) for j < t, g_t = grad_logits;
    dW = sum_j g_j h_j^T, db = sum_j g_j, hidden_grad_j = W^T g_j with the weight before the step.
    It modifies its arguments: weight, bias and their moments m and v become those after the step.

    Args:
        hidden: (t + 1, H), the last row the current task's; grad_logits: (N,); targets: (t, N), t = 0 allowed.
        drift_weight: dLoss/dR, one entry.
        weight, weight_m, weight_v: (N, H); bias, bias_m, bias_v: (N,). weight_m and weight_v are of weight's dtype, or
            both bfloat16 beside a float32 weight: then they are `adam`'s rounded moments.
        step: one entry, the number of this step, counted from 1; lr: one entry.
        beta1, beta2, eps, weight_decay, maximize: as in torch.optim.Adam; decoupled: the decay is AdamW's.
        first_row: of a sharded layer, how many rows of the whole are before weight's; it decides what is drawn.

    Returns:
        hidden_grad (t + 1, H) and R, a scalar.
    """
    residual = F.linear(hidden[:-1], weight, bias) - targets
    factors = torch.cat([2 * drift_weight * residual, grad_logits[None]])
    hidden_grad = factors @ weight
    settings = step, lr, beta1, beta2, eps, weight_decay, decoupled, maximize
    adam(weight, weight_m, weight_v, factors.t() @ hidden, *settings, first_row)
    adam(bias, bias_m, bias_v, factors.sum(0), *settings)
    return hidden_grad, residual.square().sum()


@torch.no_grad()
def factored_adam(
    factors: Tensor,
    scales: Tensor,
    hidden: Tensor,
    weight: Tensor,
    weight_m: Tensor,
    weight_v: Tensor,
    step: Tensor,
    lr: Tensor,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    maximize: bool = False,
    first_row: int = 0,
) -> None:
    """Adam's step on the gradient dW = sum_j s_j f_j h_j^T, which is never made.

    It modifies its arguments: weight and its moments m and v become those after the step.

    Args:
        factors: (K, N); scales: (K,); hidden: (K, H); K = 0 is a gradient of 0.
        weight, weight_m, weight_v: (N, H), as in `hypernet_adam`.
        step: one entry, the number of this step, counted from 1; lr: one entry.
        beta1, beta2, eps, weight_decay, maximize: as in torch.optim.Adam; decoupled: the decay is AdamW's.
        first_row: of a sharded layer, how many rows of the whole are before weight's.
    """
    grad = (scales[:, None] * factors).t() @ hidden
    adam(weight, weight_m, weight_v, grad, step, lr, beta1, beta2, eps, weight_decay, decoupled, maximize, first_row)


@torch.no_grad()
def adam(
    parameter: Tensor,
    m: Tensor,
    v: Tensor,
    grad: Tensor,
    step: Tensor,
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    maximize: bool,
    first_row: int = 0,
) -> None:
    """Adam's step; parameter (N, ...), m and v become those after it.

    m and v of bfloat16, beside a float32 parameter (N, H): the step is that of the moments before they are rounded.
    """
    settings = step, lr, beta1, beta2, eps, weight_decay, decoupled, maximize
    if m.dtype != torch.bfloat16 or parameter.dtype == torch.bfloat16:
        _adam(parameter, m, v, grad, *settings)
        return
    width = parameter.shape[1]
    rows = max(1, _BLOCK // width)
    for begin in range(0, len(parameter), rows):
        block = slice(begin, begin + rows)
        wide_m, wide_v = m[block].float(), v[block].float()
        _adam(parameter[block], wide_m, wide_v, grad[block], *settings)
        first = (first_row + begin) * width
        entries = torch.arange(first, first + wide_m.numel(), device=parameter.device).view_as(wide_m)
        of_m, of_v = draws(entries, step)
        m[block], v[block] = rounded(wide_m, of_m), rounded(wide_v, of_v, positive=True)


def _adam(
    parameter: Tensor,
    m: Tensor,
    v: Tensor,
    grad: Tensor,
    step: Tensor,
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    maximize: bool,
) -> None:
    if maximize:
        grad = -grad
    if decoupled:
        parameter.mul_(1 - lr * weight_decay)
    elif weight_decay:
        grad = grad + weight_decay * parameter
    bias1, bias2 = 1 - beta1 ** step.double(), 1 - beta2 ** step.double()
    m.lerp_(grad, 1 - beta1)
    v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    parameter.sub_(lr / bias1 * m / ((v / bias2).sqrt() + eps))
