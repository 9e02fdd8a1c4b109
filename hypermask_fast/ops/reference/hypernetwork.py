"""The hypernetwork's output layer: its logits, how far they have drifted, and the parts of its gradient. The ops that
also step it are in `ops.stepping`."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import InputError


def hypernet_logits(hidden: Tensor, weight: Tensor, bias: Tensor, size: int) -> Tensor:
    """The hypernetwork's output: a_t = first N entries of the concatenation over chunks c of h_tc W^T + b.

    A dense output layer is the case of one chunk of N entries; otherwise the last chunk is truncated.

    Args:
        hidden: (T, chunks, H) last hidden layer; weight: (chunk_size, H); bias: (chunk_size,).
        size: N, with (chunks - 1) * chunk_size < N <= chunks * chunk_size.

    Returns:
        (T, N).
    """
    return F.linear(hidden, weight, bias).flatten(1)[:, :size]


def chunk_logits(
    hidden: Tensor, output_weight: Tensor, output_bias: Tensor, start: int, shape: Sequence[int]
) -> Tensor:
    """One tensor's logits from a chunked hypernetwork: entries start to start + numel of its output, shaped.

    Entry f of the output is hidden[f // C] . output_weight[f % C] + output_bias[f % C]; a tensor may begin and end
    anywhere in a chunk.

    Args:
        hidden: (chunks, H) last hidden layer of one task; output_weight: (C, H); output_bias: (C,).
        start: the tensor's offset in the flat output; shape: the tensor's shape.

    Returns:
        Logits of the given shape.

    Raises:
        InputError: the chunks end before the tensor does.
    """
    size = math.prod(shape)
    generated = hidden.shape[0] * output_weight.shape[0]
    if start < 0 or start + size > generated:
        raise InputError(f"entries {start} to {start + size} lie outside the {generated} that the chunks generate")
    return hypernet_logits(hidden[None], output_weight, output_bias, generated)[0, start : start + size].view(shape)


def output_drift(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """sum_t || hypernet_logits_t - targets_t ||^2, over raw logits, a sum over entries.

    Args:
        hidden: (T, chunks, H); weight: (chunk_size, H); bias: (chunk_size,).
        targets: (T, N), without gradient. T = 0 gives 0.

    Returns:
        Scalar.
    """
    return (hypernet_logits(hidden, weight, bias, targets.shape[1]) - targets).square().sum()


def chunked_output_drift(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    old_hidden: Tensor,
    old_weight: Tensor,
    old_bias: Tensor,
    size: int,
) -> Tensor:
    """sum_t || hypernet_logits_t - the same with the old hidden vectors and layer ||^2, which get no gradient.

    Args:
        hidden, old_hidden: (T, chunks, H); weight, old_weight: (chunk_size, H); bias, old_bias: (chunk_size,).
        size: N, as in `hypernet_logits`.

    Returns:
        Scalar.
    """
    with torch.no_grad():
        targets = hypernet_logits(old_hidden, old_weight, old_bias, size)
    return output_drift(hidden, weight, bias, targets)


@torch.no_grad()
def output_residuals(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The dense output layer a_j = W h_j + b for tasks 0..t in one read of W: what its gradient is made of.

    r_j = a_j - target_j for j < t, r_t = a_t; R = sum_{j<t} ||r_j||^2. Without gradient: the factors of the layer's
    gradient are 2 dLoss/dR r_j for j < t, and dLoss/da_t.

    Args:
        hidden: (t + 1, H), the last row the current task's; weight: (N, H); bias: (N,).
        targets: (t, N), t = 0 allowed.

    Returns:
        r (t + 1, N) and R, a scalar.
    """
    size = weight.shape[0]
    # Apart from each other, each as it is made elsewhere: where nothing has changed, r is to be exactly 0.
    earlier = hypernet_logits(hidden[:-1, None], weight, bias, size) - targets
    current = hypernet_logits(hidden[-1:, None], weight, bias, size)
    return torch.cat([earlier, current]), earlier.square().sum()


@torch.no_grad()
def hidden_gradient(factors: Tensor, scales: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Backward of the dense output layer but for its weight: g_j = s_j f_j, hidden_grad_j = W^T g_j, db = sum_j g_j.

    Args:
        factors: (K, N); scales: (K,); weight: (N, H).

    Returns:
        hidden_grad (K, H) and bias_grad (N,).
    """
    scaled = scales[:, None] * factors
    return scaled @ weight, scaled.sum(0)
