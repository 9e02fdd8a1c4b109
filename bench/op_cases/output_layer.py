"""The hypernetwork's output layer: logits, drift and Adam steps."""

from math import ceil

import torch
from torch import Tensor

from hypermask_fast.ops import reference

from ..op_case import BOTH, FORWARD, Draw, OpCase, Work
from .common import BLOCK, OF_SUMS


def hypernet_logits(tasks: int, size: int, width: int, chunk_size: int | None = None) -> OpCase:
    """N logits of each task, from a dense layer or in chunks."""
    rows, chunks = (chunk_size, ceil(size / chunk_size)) if chunk_size else (size, 1)

    def arguments(draw: Draw) -> tuple:
        return draw.leaf(tasks, chunks, width), draw.leaf(rows, width, reach=0.3), draw.leaf(rows, reach=0.3), size

    # Layer and hidden vectors read, logits written; backward: the same read with their gradient, all gradients written.
    layer, product = rows * (width + 1) + tasks * chunks * width, 2.0 * tasks * size * width
    work = {
        FORWARD: Work(layer + tasks * size, product),
        BOTH: Work(3 * layer + 2 * tasks * size, 3 * product),
    }
    sizes = f"{rows} x {width}, {tasks} task{'s' if tasks > 1 else ''}"
    sizes += f", {chunks} chunks" if chunk_size else ""
    return OpCase("hypernet_logits", sizes, arguments, work, loose=OF_SUMS)


def output_drift(tasks: int, size: int, width: int) -> OpCase:
    """R over `tasks` earlier tasks, with the dense layer's gradient."""

    def arguments(draw: Draw) -> tuple:
        layer = draw.leaf(size, width, reach=0.1), draw.leaf(size, reach=0.1)
        return draw.leaf(tasks, 1, width), *layer, draw(tasks, size)

    # Layer and targets read; backward: the same, the layer's gradient written.
    layer, targets, product = size * (width + 1), tasks * size, 2.0 * size * width * tasks
    work = {FORWARD: Work(layer + targets, product), BOTH: Work(3 * layer + 2 * targets, 3 * product)}
    return OpCase(
        "output_drift", f"{size} x {width}, {tasks} tasks", arguments, work, results=("drift",), loose=OF_SUMS
    )


def chunked_output_drift(tasks: int, size: int, width: int, chunk_size: int) -> OpCase:
    """R over `tasks` earlier tasks against the chunked layer as it stood."""
    chunks = ceil(size / chunk_size)

    def arguments(draw: Draw) -> tuple:
        new = draw.leaf(tasks, chunks, width), draw.leaf(chunk_size, width, reach=0.3), draw.leaf(chunk_size, reach=0.3)
        changes = [draw(*tensor.shape, low=-0.05, high=0.05) for tensor in new]
        old = [draw.rounded(t.detach().float() + change.float()) for t, change in zip(new, changes, strict=True)]
        return *new, *old, size

    # Both layers and hidden vectors read; backward: the gradients written. Products of H x H over the rows of both:
    # three of hidden vectors and three of layers, and two of each backward.
    rows = tasks * chunks + chunk_size
    both = rows * width + chunk_size
    work = {FORWARD: Work(2 * both, 6.0 * rows * width**2), BOTH: Work(3 * both, 10.0 * rows * width**2)}
    sizes = f"N {size}, {chunk_size} x {width}, {tasks} tasks, {chunks} chunks"
    return OpCase("chunked_output_drift", sizes, arguments, work, results=("drift",), tolerance=1e-4)


def hypernet_adam(tasks: int, size: int, width: int) -> OpCase:
    """Backward of the dense output layer for `tasks` tasks and its Adam step."""

    def arguments(draw: Draw) -> tuple:
        hidden, grad, targets = draw(tasks, width), draw(size, low=-1e-3, high=1e-3), draw(tasks - 1, size)
        layer = [draw(size, width, low=-0.1, high=0.1), draw(size, low=-0.1, high=0.1)]
        moments = []
        for tensor in layer:
            moments += [draw(*tensor.shape, low=-1e-3, high=1e-3), draw(*tensor.shape, low=0, high=1e-6)]
        drift_weight, step, lr = (draw.full(value=value) for value in (1e-3, 100.0, 1e-3))
        return hidden, grad, targets, drift_weight, *layer, *moments, step, lr, 0.9, 0.999, 1e-8

    return OpCase(
        "hypernet_adam",
        f"{size} x {width}, {tasks} task{'s' if tasks > 1 else ''}",
        arguments,
        {FORWARD: Work(6 * size * (width + 1) + tasks * size, 6.0 * size * width * tasks)},
        results=("hidden_grad", "drift"),
        changed=("weight", "bias", "weight_m", "weight_v", "bias_m", "bias_v"),
        loose=OF_SUMS,
        oracle=_adam_in_float64,
    )


def output_residuals(tasks: int, size: int, width: int) -> OpCase:
    """Logits of one task and residuals of the others, in one read of the dense layer."""

    def arguments(draw: Draw) -> tuple:
        layer = draw(size, width, low=-0.1, high=0.1), draw(size, low=-0.1, high=0.1)
        return draw(tasks, width), *layer, draw(tasks - 1, size)

    # Layer and targets read, residuals written.
    work = {FORWARD: Work(size * (width + 1) + (2 * tasks - 1) * size, 2.0 * size * width * tasks)}
    return OpCase(
        "output_residuals", _sizes(tasks, size, width), arguments, work, ("residuals", "drift"), loose=OF_SUMS
    )


def hidden_gradient(tasks: int, size: int, width: int) -> OpCase:
    """The hidden vectors' gradient by factors that were kept."""

    def arguments(draw: Draw) -> tuple:
        return draw(tasks, size), draw(tasks), draw(size, width, low=-0.1, high=0.1)

    # Layer and factors read, the bias's gradient written.
    work = {FORWARD: Work(size * (width + 1) + tasks * size, 2.0 * size * width * tasks)}
    results, loose = ("hidden_grad", "bias_grad"), OF_SUMS
    return OpCase("hidden_gradient", _sizes(tasks, size, width), arguments, work, results, loose=loose)


def factored_adam(tasks: int, size: int, width: int) -> OpCase:
    """The dense layer's Adam step by factors that were kept."""

    def arguments(draw: Draw) -> tuple:
        factors = draw(tasks, size, low=-1e-3, high=1e-3), draw(tasks), draw(tasks, width)
        layer = draw(size, width, low=-0.1, high=0.1)
        moments = draw(size, width, low=-1e-3, high=1e-3), draw(size, width, low=0, high=1e-6)
        step, lr = draw.full(value=100.0), draw.full(value=1e-3)
        return *factors, layer, *moments, step, lr, 0.9, 0.999, 1e-8

    return OpCase(
        "factored_adam",
        _sizes(tasks, size, width),
        arguments,
        {FORWARD: Work(6 * size * width + tasks * size, 2.0 * size * width * tasks)},
        results=(),
        changed=("weight", "weight_m", "weight_v"),
        loose=OF_SUMS,
        oracle=_factored_adam_in_float64,
    )


def _sizes(tasks: int, size: int, width: int) -> str:
    return f"{size} x {width}, {tasks} task{'s' if tasks > 1 else ''}"


def _factored_adam_in_float64(
    factors: Tensor, scales: Tensor, hidden: Tensor, weight: Tensor, weight_m: Tensor, weight_v: Tensor, *rest
) -> None:
    """The reference, some rows at a time."""
    rows = max(1, BLOCK // hidden.shape[1])
    for start in range(0, len(weight), rows):
        part = slice(start, start + rows)
        double = [tensor[part].double() for tensor in (weight, weight_m, weight_v)]
        reference.factored_adam(factors[:, part].double(), scales.double(), hidden.double(), *double, *rest)
        for tensor, value in zip((weight, weight_m, weight_v), double, strict=True):
            tensor[part].copy_(value)


def _adam_in_float64(
    hidden: Tensor, grad: Tensor, targets: Tensor, drift_weight: Tensor, *rest: Tensor
) -> tuple[Tensor, Tensor]:
    """The reference, some rows at a time: all of them in float64 would need several times the layer's memory."""
    layer, (step, lr, *settings) = rest[:6], rest[6:]
    hidden_grad = torch.zeros_like(hidden, dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    rows = max(1, BLOCK // hidden.shape[1])
    for start in range(0, len(grad), rows):
        part = slice(start, start + rows)
        double = [tensor[part].double() for tensor in layer]
        rows_grad, drift = reference.hypernet_adam(
            hidden.double(), grad[part].double(), targets[:, part].double(), drift_weight.double(), *double, step, lr,
            *settings,
        )  # fmt: skip
        hidden_grad += rows_grad
        total += drift
        for tensor, value in zip(layer, double, strict=True):
            tensor[part].copy_(value)
    return hidden_grad, total
