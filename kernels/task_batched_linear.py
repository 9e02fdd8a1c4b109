"""task_batched_linear: a batch whose rows each carry a task, or every task over one batch, in one launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import arguments
from ..ops.registry import debug
from ..ops.task_rows import TaskRows
from . import host, settings
from .device import gradient_of_logits, mask_of, masked_tile, times8
from .host import cdiv, next_power_of_2
from .tiles import Tiles, launch_fitting


@triton.jit
def _tile_of_tasks(tile, offsets_ptr, tasks, BUCKETS: tl.constexpr, BLOCK: tl.constexpr):
    """Task of this tile of sorted rows, its first sorted row and the task's last: (task, first, end).

    Every task's rows fill whole tiles of their own, so the grid's upper bound is known without asking the device;
    tiles beyond the last come out empty. Bucket number `tasks` holds the rows whose id is no task's.
    """
    bucket = tl.arange(0, BUCKETS)
    begins = tl.load(offsets_ptr + bucket, mask=bucket <= tasks, other=0)
    ends = tl.load(offsets_ptr + bucket + 1, mask=bucket <= tasks, other=0)
    tiles = (ends - begins + BLOCK - 1) // BLOCK
    last_tiles = tl.cumsum(tiles, 0)
    task = tl.sum((last_tiles <= tile).to(tl.int32), 0)
    mine = bucket == task
    first = tl.sum(tl.where(mine, begins + (tile - (last_tiles - tiles)) * BLOCK, 0), 0)
    return task, first, tl.sum(tl.where(mine, ends, 0), 0)


@triton.jit(do_not_specialize=["rows", "tasks"])
def _task_product(
    x_ptr, w_ptr, a_ptr, thresholds_ptr, bias_ptr, y_ptr, order_ptr, offsets_ptr,
    rows, outputs, reduced, tasks, x_task, x_row, x_red, w_out, w_red, a_task, a_out, a_red,
    bias_task, bias_out, y_task, y_row, y_out,
    GROUPED: tl.constexpr, BUCKETS: tl.constexpr, HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr, APPROXIMATE: tl.constexpr, BY8: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y[row, out] = sum_red x[row, red] (W * m_task)[out, red] + bias[task, out] for a tile of one task's rows."""
    if GROUPED:
        task, first, end = _tile_of_tasks(tl.program_id(0), offsets_ptr, tasks, BUCKETS, BLOCK_N)
        place = first + tl.arange(0, BLOCK_N)
        ours = place < end
        row = tl.load(order_ptr + place, mask=ours, other=0)
        end_red = tl.where(first < end, reduced, 0)
    else:
        tiles = tl.cdiv(rows, BLOCK_N)
        task = tl.program_id(0) // tiles
        row = ((tl.program_id(0) % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
        ours = row < rows
        end_red = reduced
    outputs, reduced, x_row = times8(outputs, BY8 & 1), times8(reduced, BY8 & 2), times8(x_row, BY8 & 4)
    w_out, w_red = times8(w_out, BY8 & 8), times8(w_red, BY8 & 16)
    a_task, a_out, a_red = times8(a_task, BY8 & 32), times8(a_out, BY8 & 64), times8(a_red, BY8 & 128)
    known = task < tasks
    task_at = tl.minimum(task, tasks - 1).to(tl.int64)
    x_ptr += task_at * x_task
    a_ptr += task_at * a_task
    out = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    threshold = tl.load(thresholds_ptr + task_at).to(tl.float32)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, end_red, BLOCK_K):
        red = start + tl.arange(0, BLOCK_K)
        inside = (out < outputs)[:, None] & (red < reduced)[None, :]
        w = tl.load(w_ptr + out[:, None] * w_out + red[None, :] * w_red, mask=inside, other=0)
        a = tl.load(a_ptr + out[:, None] * a_out + red[None, :] * a_red, mask=inside, other=0)
        inside = (red < reduced)[:, None] & ours[None, :]
        x = tl.load(x_ptr + red[:, None] * x_red + row[None, :] * x_row, mask=inside, other=0)
        masked = masked_tile(w, a, threshold, APPROXIMATE).to(x.dtype)
        total = tl.dot(masked, x, total, input_precision=PRECISION)
    if HAS_BIAS:
        bias_at = bias_ptr + task_at * bias_task + out * bias_out
        total += tl.load(bias_at, mask=out < outputs, other=0).to(tl.float32)[:, None]
    total = tl.where(known, total, float("nan"))  # an id that is no task's must show
    y_at = y_ptr + task_at * y_task + row[None, :] * y_row + out[:, None] * y_out
    tl.store(y_at, total.to(y_ptr.dtype.element_ty), mask=(out < outputs)[:, None] & ours[None, :])


@triton.jit(do_not_specialize=["rows", "tasks"])
def _task_weight_gradient(
    dy_ptr, x_ptr, w_ptr, a_ptr, thresholds_ptr, dw_ptr, da_ptr, order_ptr, offsets_ptr,
    rows, outputs, inputs, tasks, dy_task, dy_row, dy_out, x_task, x_row, x_in, w_out, w_in, a_task, a_out, a_in,
    GROUPED: tl.constexpr, WANT_W: tl.constexpr, WANT_A: tl.constexpr, PRECISION: tl.constexpr, BY8: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Per task G_t = dy_t^T x_t in registers; dlogits_t = G_t W dm_t/da is written, dW = sum_t G_t m_t kept."""
    out = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    col = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    outputs, inputs = times8(outputs, BY8 & 1), times8(inputs, BY8 & 2)
    dy_row, x_row = times8(dy_row, BY8 & 4), times8(x_row, BY8 & 8)
    w_out, a_task, a_out = times8(w_out, BY8 & 16), times8(a_task, BY8 & 32), times8(a_out, BY8 & 64)
    inside = (out < outputs)[:, None] & (col < inputs)[None, :]
    entry = out[:, None] * inputs + col[None, :]
    dw = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for task in range(tasks):
        begin, end = 0, rows
        if GROUPED:
            begin, end = (
                tl.load(offsets_ptr + task).to(tl.int32),
                tl.load(offsets_ptr + task + 1).to(tl.int32),
            )
        gradient = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(begin, end, BLOCK_K):
            place = start + tl.arange(0, BLOCK_K)
            ours = place < end
            row = place.to(tl.int64)
            if GROUPED:
                row = tl.load(order_ptr + place, mask=ours, other=0)
            dy_at = dy_ptr + row[None, :] * dy_row + out[:, None] * dy_out
            dy = tl.load(dy_at, mask=(out < outputs)[:, None] & ours[None, :], other=0)
            x_at = x_ptr + row[:, None] * x_row + col[None, :] * x_in
            x = tl.load(x_at, mask=ours[:, None] & (col < inputs)[None, :], other=0)
            gradient = tl.dot(dy, x, gradient, input_precision=PRECISION)
        threshold = tl.load(thresholds_ptr + task).to(tl.float32)
        a = tl.load(a_ptr + out[:, None] * a_out + col[None, :] * a_in, mask=inside, other=0).to(tl.float32)
        if WANT_W:
            dw += gradient * mask_of(a, threshold, False)
        if WANT_A:
            w = tl.load(w_ptr + out[:, None] * w_out + col[None, :] * w_in, mask=inside, other=0).to(tl.float32)
            da = gradient_of_logits(gradient, w, a, threshold)
            tl.store(da_ptr + entry, da.to(da_ptr.dtype.element_ty), mask=inside)
            da_ptr += outputs.to(tl.int64) * inputs
        a_ptr += a_task
        dy_ptr += dy_task
        x_ptr += x_task
    if WANT_W:
        tl.store(dw_ptr + entry, dw.to(dw_ptr.dtype.element_ty), mask=inside)


def _strides3(x: Tensor) -> tuple[int, ...]:
    return x.stride() if x.dim() == 3 else (0, *x.stride())


def launch_task_product(
    x: Tensor, weight: Tensor, logits: Tensor, thresholds: Tensor, bias: Tensor | None, y: Tensor,
    order: Tensor | None = None, begins: Tensor | None = None, tiles: Tiles | None = None,
) -> Tensor:  # fmt: skip
    """Fill and return y: (B, out) for sorted rows (`TaskRows`), else (T, B, out). Weight (out, red), any strides."""
    if y.numel() == 0:
        return y
    (outputs, reduced), tasks, rows = weight.shape, len(logits), y.shape[-2]
    if tasks == 0:
        return y.fill_(float("nan"))  # no id is a task's
    grouped = order is not None
    per_task = cdiv(rows, tasks) if grouped else rows
    tiles = tiles or settings.task_product(
        tasks, per_task, outputs, reduced, grouped, x.dtype, host.stored_bytes(weight, logits), host.gpu(x.device)
    )
    bias_strides = (0, 0) if bias is None else (0, *bias.stride())[-2:]

    def launch(tiles: Tiles) -> None:
        row_tiles = cdiv(rows, tiles.block_n)
        grid = (row_tiles + tasks + 1 if grouped else row_tiles * tasks, cdiv(outputs, tiles.block_m))
        _task_product[grid](
            x, weight, logits, thresholds, bias, y, order, begins, rows, outputs, reduced, tasks,
            *_strides3(x), *weight.stride(), *logits.stride(), *bias_strides, *_strides3(y),
            GROUPED=grouped, BUCKETS=next_power_of_2(tasks + 1), HAS_BIAS=bias is not None,
            PRECISION=host.matmul_precision(x.dtype), APPROXIMATE=host.approximate_tanh(x.dtype),
            BY8=host.multiples_of_8(outputs, reduced, x.stride(-2), *weight.stride(), *logits.stride()),
            **tiles.launch(x.dtype),
        )  # fmt: skip

    launch_fitting("task_batched_linear", launch, tiles, x, weight, logits)
    return y


def launch_task_weight_gradient(
    grad: Tensor, x: Tensor, weight: Tensor, logits: Tensor, thresholds: Tensor, order: Tensor | None = None,
    begins: Tensor | None = None, want_weight: bool = True, want_logits: bool = True, tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dW (out, in) summed over the tasks and dlogits (T, out, in); an unwanted one comes back empty."""
    dw = weight.new_empty(weight.shape if want_weight else 0)
    da = logits.new_empty(logits.shape if want_logits else 0)
    if weight.numel() == 0 or not (want_weight or want_logits):
        return dw, da
    (outputs, inputs), rows = weight.shape, grad.shape[-2]
    tiles = tiles or settings.task_weight_gradient(inputs, rows, x.dtype)

    def launch(tiles: Tiles) -> None:
        _task_weight_gradient[cdiv(inputs, tiles.block_n), cdiv(outputs, tiles.block_m)](
            grad, x, weight, logits, thresholds, dw, da, order, begins, rows, outputs, inputs, len(logits),
            *_strides3(grad), *_strides3(x), *weight.stride(), *logits.stride(),
            GROUPED=order is not None, WANT_W=want_weight, WANT_A=want_logits,
            PRECISION=host.matmul_precision(x.dtype),
            BY8=host.multiples_of_8(
                outputs, inputs, grad.stride(-2), x.stride(-2), weight.stride(0), *logits.stride()[:2]
            ),
            **tiles.launch(x.dtype),
        )  # fmt: skip

    launch_fitting("task_batched_linear's gradient", launch, tiles, x, weight, logits)
    return dw, da


def _check(x, weight, logits, thresholds, rows: TaskRows | None, bias: Tensor | None) -> None:
    host.check_tensors(x=x, weight=weight, logits=logits, thresholds=thresholds, bias=bias)
    host.check_device(x=x, task_ids=rows)
    arguments.task_batched_linear(x, weight, logits, thresholds, rows, bias)


def _forward(x, weight, logits, thresholds, task_ids, order, begins, bias) -> Tensor:
    y = _forward_shapes(x, weight, logits, thresholds, task_ids, order, begins, bias)
    if task_ids is not None and debug():
        arguments.known_tasks(task_ids, len(logits))
    return launch_task_product(x, weight, logits, thresholds.contiguous(), bias, y, order, begins)


def _forward_shapes(x, weight, logits, thresholds, task_ids, order, begins, bias) -> Tensor:
    _check(x, weight, logits, thresholds, arguments.sorted_rows(task_ids, order, begins), bias)
    tasks = () if task_ids is not None else (logits.shape[0],)
    return x.new_empty((*tasks, x.shape[-2], weight.shape[0]))


def _backward(grad, x, weight, logits, thresholds, order, begins, needed) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, weight, logits, thresholds, arguments.sorted_rows(order, order, begins), None)
    host.check_tensors(x=x, grad=grad)
    tasks = () if order is not None else (len(logits),)
    arguments.gradient(grad, (*tasks, x.shape[-2], weight.shape[0]))
    want_x, want_weight, want_logits = needed
    thresholds, table = thresholds.contiguous(), (order, begins)
    dx = x.new_empty(0)
    if want_x:
        shared = order is None and x.dim() == 2  # every task reads the same rows: their gradients add up
        dx = grad.new_empty((*grad.shape[:-1], x.shape[-1]), dtype=torch.float32 if shared else x.dtype)
        launch_task_product(grad, weight.t(), logits.transpose(1, 2), thresholds, None, dx, *table)
        dx = dx.sum(0).to(x.dtype) if shared else dx
    gradients = launch_task_weight_gradient(grad, x, weight, logits, thresholds, *table, want_weight, want_logits)
    return dx, *gradients


def _backward_shapes(grad, x, weight, logits, thresholds, order, begins, needed):
    tensors = (x, weight, logits)
    return tuple(t.new_empty(t.shape if need else 0) for t, need in zip(tensors, needed, strict=True))


def _setup_context(ctx, inputs, output) -> None:
    *tensors, bias = inputs
    ctx.save_for_backward(*tensors)
    ctx.bias = None if bias is None else (bias.dim(), bias.dtype)


def _bias_gradient(grad: Tensor, task_ids: Tensor | None, tasks: int, dims: int, dtype: torch.dtype) -> Tensor:
    if dims == 1:
        total = host.rows_of(grad).sum(0, dtype=torch.float32)
    elif task_ids is None:
        total = grad.sum(1, dtype=torch.float32)
    else:  # a product with the membership table: unlike index_add, the same every time
        member = torch.arange(tasks, device=grad.device)[:, None] == task_ids
        total = member.to(grad.dtype) @ grad
    return total.to(dtype)


def _autograd(ctx, grad: Tensor):
    *needed, _, _, _, _, needs_bias = ctx.needs_input_grad
    x, weight, logits, thresholds, task_ids, order, begins = ctx.saved_tensors
    gradients = torch.ops.hypermask_triton.task_batched_linear_backward(
        grad, x, weight, logits, thresholds, order, begins, needed
    )
    bias = _bias_gradient(grad, task_ids, len(logits), *ctx.bias) if needs_bias else None
    return *host.none_if_unneeded(gradients, tuple(needed)), None, None, None, None, bias


host.register(
    "task_batched_linear(Tensor x, Tensor weight, Tensor logits, Tensor thresholds, Tensor? task_ids, "
    "Tensor? order, Tensor? begins, Tensor? bias) -> Tensor",
    _forward, _forward_shapes,
)  # fmt: skip
host.register(
    "task_batched_linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor logits, Tensor thresholds, "
    "Tensor? order, Tensor? begins, bool[3] needed) -> (Tensor, Tensor, Tensor)",
    _backward, _backward_shapes,
)  # fmt: skip
host.register_autograd("task_batched_linear", _setup_context, _autograd)


def task_batched_linear(
    x: Tensor,
    weight: Tensor,
    logits: Tensor,
    thresholds: Tensor,
    task_ids: Tensor | TaskRows | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """y_b = x_b (W * m_t)^T + b_t with t = task_ids[b]; without task_ids every task over every row.

    Rows are sorted by task on the device; nothing waits for it. Differentiable in x, weight, logits and bias; dtypes,
    precision and autocast as `masked_linear`.

    Args:
        x: (B, in), or (T, B, in) without task_ids where each task has its own rows; weight: (out, in), shared.
        logits: (T, out, in); thresholds: (T,), on |a|.
        task_ids: (B,) int64, any order, or `TaskRows`, sorted once for several layers. A row whose id is not one of
            0 to T - 1 gives NaN and no gradient to weight and logits; with HYPERMASK_DEBUG=1 it raises, at the price
            of a synchronisation.
        bias: (out,) used as it is, or (T, out) with each task's mask already applied.

    Returns:
        (B, out), without task_ids (T, B, out); dtype of the products.

    Raises:
        InputError: shapes that do not fit, other dtypes, mixed devices, CPU tensors outside the interpreter.
    """
    rows = (None, None, None)
    if task_ids is not None:  # judged before they are sorted
        arguments.task_batched_linear(x, weight, logits, thresholds, task_ids, bias)
        rows = TaskRows.of(task_ids, len(logits))
    return torch.ops.hypermask_triton.task_batched_linear(host.autocast(x), weight, logits, thresholds, *rows, bias)
