"""Every op of the method in plain PyTorch: its definition, and the oracle of every test.

Short and readable before fast. All functions take float32 or float64 (and what PyTorch promotes to them), are
differentiable by autograd where a gradient is meant to flow, and never modify their arguments.

Symbols: a mask logits, m mask, W target weight, N generated entries, S segments (one per masked tensor), T tasks,
H width of the hypernetwork's last hidden layer. "Flat" means the space of N entries in the order of `MaskLayout`;
`offsets` are the S + 1 segment borders in it, so segment s is entries offsets[s] to offsets[s + 1].

Source of the method: HyperMask, arXiv 2310.00113.
"""

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from .stepping import factored_adam as factored_adam  # the ops that step Adam
from .stepping import hypernet_adam as hypernet_adam
from .task_rows import TaskRows, rows_of_tasks


def kept_rank(sparsity: float, size: int) -> int:
    """Rank from which entries are kept: ceil(p (n - 1) / 100), the linear-interpolated percentile's upper neighbour.

    An entry survives the p-th percentile of n magnitudes exactly when its rank (0 the smallest) is at least this.

    Args:
        sparsity: p in percent, 0 to 100.
        size: n, entries of the tensor.

    Raises:
        InputError: sparsity is not a number from 0 to 100.
    """
    number = isinstance(sparsity, Real) and not isinstance(sparsity, bool)
    if not number or not 0 <= sparsity <= 100:
        raise InputError(f"sparsity is a percentage from 0 to 100, not {sparsity!r}")
    return math.ceil(sparsity * max(size - 1, 0) / 100)


def mask_thresholds(logits: Tensor, offsets: Sequence[int], ranks: Tensor) -> Tensor:
    """thr[..., s] = the magnitude |a| of rank ranks[s] within segment s; 0 where the rank is 0 or the segment empty.

    Rank 0 keeps every entry, so no selection is made. NaN ranks above Inf. No gradient flows through a threshold.

    Args:
        logits: (..., N) float.
        offsets: S + 1 ascending segment borders, the last at most N.
        ranks: (S,) int64, see `kept_rank`.

    Returns:
        (..., S) thresholds on |a|, dtype of logits.
    """
    magnitude = logits.detach().abs()
    thresholds = magnitude.new_zeros(*logits.shape[:-1], len(offsets) - 1)
    compiling = torch.compiler.is_compiling()  # where ranks have no values yet: kthvalue needs them, a sort does not
    # Where a GPU has to be deterministic kthvalue is refused for the sake of its indices, which are not used here.
    sorting = logits.is_cuda and torch.are_deterministic_algorithms_enabled()
    each: Any = ranks if compiling else ranks.tolist()
    for s, rank in enumerate(each):
        segment = magnitude[..., offsets[s] : offsets[s + 1]]
        if segment.shape[-1] == 0:
            continue
        if compiling:
            ranked = segment.sort(dim=-1).values.index_select(-1, rank[None])[..., 0]
            thresholds[..., s] = torch.where(rank > 0, ranked, 0.0)
        elif rank > 0 and sorting:
            thresholds[..., s] = segment.sort(dim=-1).values[..., rank]
        elif rank > 0:
            thresholds[..., s] = segment.kthvalue(rank + 1, dim=-1).values
    return thresholds


def semi_binary_mask(logits: Tensor, threshold: Tensor) -> Tensor:
    """m = |tanh a| where |a| >= thr, else 0; dm/da = sign(a) (1 - tanh(a)^2) on kept entries.

    NaN logits are kept and give NaN masks, so that they show; a NaN threshold keeps everything.

    Args:
        logits: any shape, float.
        threshold: broadcasts against logits, from `mask_thresholds`.

    Returns:
        Mask of the shape of logits, values in [0, 1].
    """
    dropped = logits.detach().abs() < threshold
    return torch.where(dropped, 0.0, logits.tanh().abs())


def masked_weights(
    weights: Sequence[Tensor], logits: Tensor, thresholds: Tensor, offsets: Sequence[int]
) -> list[Tensor]:
    """W_s * m_s for the first len(weights) segments, all layers at once.

    Args:
        weights: tensors of any shape, weights[s].numel() == offsets[s + 1] - offsets[s].
        logits: (N,) flat logits of one task.
        thresholds: (S,).
        offsets: S + 1 segment borders, S >= len(weights).

    Returns:
        One masked tensor per weight, each of its weight's shape.
    """
    return [
        weight * semi_binary_mask(logits[offsets[s] : offsets[s + 1]].view(weight.shape), thresholds[s])
        for s, weight in enumerate(weights)
    ]


def masked_linear(x: Tensor, weight: Tensor, logits: Tensor, threshold: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x (W * m)^T + b.

    Args:
        x: (..., in); weight, logits: (out, in); threshold: one entry; bias: (out,), used as it is.

    Returns:
        (..., out).
    """
    return F.linear(x, weight * semi_binary_mask(logits, threshold), bias)


def masked_conv2d(
    x: Tensor,
    weight: Tensor,
    logits: Tensor,
    threshold: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Tensor:
    """y = conv2d(x, W * m) + b.

    Args:
        x: (batch, in, height, width); weight, logits: (out, in / groups, kh, kw); threshold: one entry;
            bias: (out,), used as it is.

    Returns:
        (batch, out, height', width').
    """
    return F.conv2d(x, weight * semi_binary_mask(logits, threshold), bias, stride, padding, dilation, groups)


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


def chunk_masked_linear(
    x: Tensor,
    weight: Tensor,
    hidden: Tensor,
    output_weight: Tensor,
    output_bias: Tensor,
    start: int,
    threshold: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """y = x (W * m(a))^T + b with a = chunk_logits(hidden, output_weight, output_bias, start, W.shape).

    Args:
        x: (..., in); weight: (out, in); hidden: (chunks, H); output_weight: (C, H); output_bias: (C,).
        start: offset of the weight in the hypernetwork's flat output; threshold: one entry, on |a|.
        bias: (out,), used as it is.

    Returns:
        (..., out).
    """
    logits = chunk_logits(hidden, output_weight, output_bias, start, weight.shape)
    return masked_linear(x, weight, logits, threshold, bias)


def chunk_masked_conv2d(
    x: Tensor,
    weight: Tensor,
    hidden: Tensor,
    output_weight: Tensor,
    output_bias: Tensor,
    start: int,
    threshold: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Tensor:
    """y = conv2d(x, W * m(a)) + b with a = chunk_logits(hidden, output_weight, output_bias, start, W.shape).

    Args:
        x: (batch, in, height, width); weight: (out, in / groups, kh, kw); the rest as in `chunk_masked_linear`.

    Returns:
        (batch, out, height', width').
    """
    logits = chunk_logits(hidden, output_weight, output_bias, start, weight.shape)
    return masked_conv2d(x, weight, logits, threshold, bias, stride, padding, dilation, groups)


def task_batched_linear(
    x: Tensor,
    weight: Tensor,
    logits: Tensor,
    thresholds: Tensor,
    task_ids: Tensor | TaskRows | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """y_b = x_b (W * m_t)^T + b_t with t = task_ids[b]; without task_ids every task over every row.

    Args:
        x: (B, in), or (T, B, in) without task_ids where each task has its own rows; weight: (out, in), shared.
        logits: (T, out, in); thresholds: (T,); task_ids: (B,) int64, any order, or `TaskRows`.
        bias: (out,) used as it is, or (T, out) with each task's mask already applied.

    Returns:
        (B, out); without task_ids (T, B, out).

    Raises:
        InputError: a task id is not one of 0 to T - 1 (in a compiled graph, which can't look at ids, its row is NaN).
    """
    masked = weight * semi_binary_mask(logits, thresholds[:, None, None])
    y = x @ masked.transpose(1, 2)
    if bias is not None:
        y = y + (bias if bias.dim() == 1 else bias[:, None])
    return y if task_ids is None else rows_of_tasks(y, task_ids)


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


def weight_drift(
    weights: Sequence[Tensor],
    previous: Tensor,
    offsets: Sequence[int],
    norm: int = 1,
    logits: Tensor | None = None,
    thresholds: Tensor | None = None,
) -> Tensor:
    """D = sum_s || (W_s - W_prev_s) * m_s ||_norm; without logits, m = 1.

    The mask is not detached: its gradient reaches the hypernetwork. The 2-norm's gradient at 0 is 0.

    Args:
        weights: S tensors; previous: (N,) flat weights as the task began; offsets: S + 1 borders.
        norm: 1 or 2.
        logits: (N,) and thresholds: (S,), both or neither.

    Returns:
        Scalar.
    """
    total = previous.new_zeros(())
    limits: Any = thresholds  # there where logits are
    for s, weight in enumerate(weights):
        segment = slice(offsets[s], offsets[s + 1])
        change = weight.flatten() - previous[segment]
        if logits is not None:
            change = change * semi_binary_mask(logits[segment], limits[s])
        total = total + torch.linalg.vector_norm(change, norm)
    return total


def masked_weights_drift(
    weights: Sequence[Tensor],
    logits: Tensor,
    thresholds: Tensor,
    offsets: Sequence[int],
    previous: Tensor,
    norm: int = 1,
) -> tuple[list[Tensor], Tensor]:
    """W_s * m_s and D = sum_s || (W_s - W_prev_s) * m_s ||_norm: what a training step needs of the mask, in one pass.

    Args:
        as those of `masked_weights`, here one weight per segment, and of `weight_drift`.

    Returns:
        What `masked_weights` and `weight_drift` return.
    """
    masked = masked_weights(weights, logits, thresholds, offsets)
    return masked, weight_drift(weights, previous, offsets, norm, logits, thresholds)


def mask_overlap(logits: Tensor, thresholds: Tensor, offsets: Sequence[int]) -> Tensor:
    """c[s, i, j] = the number of entries in segment s that the masks of tasks i and j both keep.

    Summed over s it is the overlap of whole masks; c[s, i, i] counts what task i keeps. What is kept is as in
    `semi_binary_mask`. No gradient flows through a count.

    Args:
        logits: (T, N) flat logits of T tasks; thresholds: (T, S) on |a|; offsets: S + 1 segment borders.

    Returns:
        (S, T, T) int64, symmetric in the tasks.
    """
    overlap = []
    for s in range(len(offsets) - 1):
        magnitude = logits.detach()[:, offsets[s] : offsets[s + 1]].abs()
        kept = (~(magnitude < thresholds[:, s, None])).double()  # whose products count exactly, up to 2^53
        overlap.append(kept @ kept.t())
    tasks = logits.shape[0]
    return torch.stack(overlap).long() if overlap else logits.new_empty(0, tasks, tasks, dtype=torch.int64)


def entropy_select(logits: Tensor) -> Tensor:
    """argmin over tasks of the softmax entropy -sum_c p log p; the lowest index among equals, NaN counts as Inf.

    Args:
        logits: (T, batch, classes) class logits of every task's masked network.

    Returns:
        (batch,) int64 task per sample.
    """
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    entropy = -torch.where(p == 0, 0.0, p * log_p).sum(-1)  # 0 log 0 = 0
    return entropy.nan_to_num(nan=math.inf).argmin(0)
