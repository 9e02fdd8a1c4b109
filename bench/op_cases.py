"""Every op at any size, one function an op: what `python -m bench`, `bench.paths` and bench/micro measure.

The floor of a call counts the entries of each array once, however small it is beside the others: W stands for a target
weight of n entries, N for those of a whole network, H for the width of the hypernetwork's last hidden layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import ceil, prod

import torch
from torch import Tensor

from hypermask_fast.ops import kept_rank, reference

from .op_case import BACKWARD, BOTH, FORWARD, Draw, OpCase, Work

Shapes = Sequence[tuple[int, ...]]
THRESHOLD = 0.5  # of logits that are uniform on (-2, 2): a quarter is dropped
BLOCK = 1 << 20  # entries handled at a time wherever a copy of the largest tensor would show in the peak memory
# Logits that an op generates by itself move across the threshold by rounding, and their entries with them.
GENERATED, GENERATED_HALF = 1e-2, 5e-2
# Sums over all N entries, which PyTorch in float32 adds up in an order that depends on the number of threads.
OF_SUMS = {"drift": 1e-4, "hidden_grad": 1e-4, "grad/hidden": 1e-4}


def _offsets(shapes: Shapes) -> tuple[int, ...]:
    return tuple(accumulate((prod(shape) for shape in shapes), initial=0))


# -- masks ------------------------------------------------------------------------------------------------------------


def mask_thresholds(sizes: Sequence[int], sparsity: float) -> OpCase:
    """Exact selection over segments of these sizes."""
    offsets = tuple(accumulate(sizes, initial=0))
    ranks = [kept_rank(sparsity, size) for size in sizes]

    def arguments(draw: Draw) -> tuple:
        return draw(offsets[-1], low=-3, high=3), offsets, torch.tensor(ranks, device=draw.device)

    segments = f" in {len(sizes)} segments" if len(sizes) > 1 else ""
    return OpCase(
        "mask_thresholds",
        f"{offsets[-1]} entries{segments}, p {sparsity:g}",
        arguments,
        {FORWARD: Work(offsets[-1])},
        results=("threshold",),
        tolerance=1e-6,
    )


def semi_binary_mask(size: int) -> OpCase:
    # Logits read, mask written; backward: gradient and logits read, gradient written.
    work = {FORWARD: Work(2 * size), BOTH: Work(5 * size)}
    return OpCase("semi_binary_mask", f"N {size}", lambda draw: (draw.leaf(size, reach=2), _threshold(draw)), work)


def _threshold(draw: Draw) -> Tensor:
    return draw.full(1, value=THRESHOLD)


def _network(draw: Draw, shapes: Shapes) -> tuple[list[Tensor], Tensor, Tensor, tuple[int, ...]]:
    """Weights, flat logits, thresholds and offsets of a whole network."""
    weights = [draw.leaf(*shape, reach=0.1) for shape in shapes]
    offsets = _offsets(shapes)
    return weights, draw.leaf(offsets[-1], reach=2), draw.full(len(shapes), value=THRESHOLD), offsets


def masked_weights(shapes: Shapes) -> OpCase:
    """W * m of a whole network."""
    size = sum(map(prod, shapes))
    # W and logits read, product written; backward: gradient, W and logits read, both gradients written.
    work = {FORWARD: Work(3 * size), BOTH: Work(8 * size)}
    sizes = f"N {size} in {len(shapes)} tensors"
    return OpCase("masked_weights", sizes, lambda draw: _network(draw, shapes), work, results=("masked",))


def _previous(draw: Draw, weights: list[Tensor]) -> Tensor:
    """Weights as the task began, a tenth of their range away."""
    old = torch.cat([weight.detach().flatten() for weight in weights]).float()
    return draw.rounded(old + draw(old.numel(), low=-0.01, high=0.01).float())


def mask_overlap(shapes: Shapes, tasks: int) -> OpCase:
    """Entries that the masks of every two tasks share, per tensor of a network."""
    size = sum(map(prod, shapes))

    def arguments(draw: Draw) -> tuple:
        return draw(tasks, size, low=-2, high=2), draw.full(tasks, len(shapes), value=THRESHOLD), _offsets(shapes)

    # Logits read, counts of 8 bytes written; an entry's bit is compared with those of all tasks behind.
    work = {FORWARD: Work(tasks * size + 2 * len(shapes) * tasks**2, size * tasks * (tasks + 1) / 64)}
    return OpCase("mask_overlap", f"N {size} in {len(shapes)} tensors, {tasks} tasks", arguments, work, tolerance=0.0)


def of_network(shapes: Shapes, tasks: int) -> list[OpCase]:
    """The ops over the masks of a network of tensors of these shapes."""
    sizes = [prod(shape) for shape in shapes]
    return [
        mask_thresholds(sizes, 30),
        semi_binary_mask(sum(sizes)),
        masked_weights(shapes),
        weight_drift(shapes),
        masked_weights_drift(shapes),
        mask_overlap(shapes, tasks),
    ]


def weight_drift(shapes: Shapes) -> OpCase:
    """D, 1-norm with the mask."""
    size = sum(map(prod, shapes))

    def arguments(draw: Draw) -> tuple:
        weights, logits, thresholds, offsets = _network(draw, shapes)
        return weights, _previous(draw, weights), offsets, 1, logits, thresholds

    # W, W_prev and logits read; backward: the same, both gradients written.
    work = {FORWARD: Work(3 * size), BOTH: Work(8 * size)}
    sizes = f"N {size} in {len(shapes)} tensors, 1-norm, masked"
    return OpCase("weight_drift", sizes, arguments, work, results=("drift",), loose=OF_SUMS)


def masked_weights_drift(shapes: Shapes) -> OpCase:
    """W * m and D in one pass."""
    size = sum(map(prod, shapes))

    def arguments(draw: Draw) -> tuple:
        weights, logits, thresholds, offsets = _network(draw, shapes)
        return weights, logits, thresholds, offsets, _previous(draw, weights), 1

    # W, W_prev and logits read, product written; backward: these and the gradient read, both gradients written.
    work = {FORWARD: Work(4 * size), BOTH: Work(10 * size)}
    sizes = f"N {size} in {len(shapes)} tensors, 1-norm"
    return OpCase("masked_weights_drift", sizes, arguments, work, results=("masked", "drift"), loose=OF_SUMS)


# -- layers -----------------------------------------------------------------------------------------------------------


def _linear_work(rows: int, inputs: int, outputs: int) -> dict[str, Work]:
    """Forward: W, logits and x read, y written. Backward: W, logits, x and dy read, dx and both gradients written;
    dx = dy W, and dW and dlogits from dy^T x."""
    n, product = inputs * outputs, 2.0 * rows * inputs * outputs
    forward = Work(2 * n + rows * (inputs + outputs), product)
    backward = Work(4 * n + rows * (2 * inputs + outputs), 2 * product)
    both = Work(forward.entries + backward.entries, 3 * product)
    return {FORWARD: forward, BACKWARD: backward, BOTH: both}


def masked_linear(rows: int, inputs: int, outputs: int) -> OpCase:
    """y = x (W * m)^T + b."""

    def arguments(draw: Draw) -> tuple:
        x, weight = draw.leaf(rows, inputs), draw.leaf(outputs, inputs, reach=(3 / inputs) ** 0.5)
        return x, weight, draw.leaf(outputs, inputs, reach=2), _threshold(draw), draw.leaf(outputs)

    sizes = f"{inputs} -> {outputs}, batch {rows}"
    return OpCase("masked_linear", sizes, arguments, _linear_work(rows, inputs, outputs))


def _generator(draw: Draw, size: int, chunk_size: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden vectors of every chunk and the output layer, which generate `size` logits or more."""
    hidden = draw.leaf(ceil(size / chunk_size), width)
    return hidden, draw.leaf(chunk_size, width, reach=0.3), draw.leaf(chunk_size, reach=0.3)


def _with_generator(work: dict[str, Work], n: int, chunk_size: int, width: int) -> dict[str, Work]:
    """The work of a layer whose n logits are generated instead of read, and their gradient sent on to the layer that
    generates them: n H products forward, twice that backward."""
    layer, product = (width + 1) * chunk_size + width * ceil(n / chunk_size), 2.0 * n * width
    forward, both = work[FORWARD], work[BOTH]
    return {
        FORWARD: Work(forward.entries - n + layer, forward.operations + product),
        BOTH: Work(both.entries - 3 * n + 3 * layer, both.operations + 3 * product),
    }


def chunk_masked_linear(rows: int, inputs: int, outputs: int, chunk_size: int, width: int) -> OpCase:
    """`masked_linear` with logits that are generated from the chunked hypernetwork."""
    n = inputs * outputs

    def arguments(draw: Draw) -> tuple:
        x, weight = draw.leaf(rows, inputs), draw.leaf(outputs, inputs, reach=(3 / inputs) ** 0.5)
        return x, weight, *_generator(draw, n, chunk_size, width), 0, _threshold(draw), draw.leaf(outputs)

    return OpCase(
        "chunk_masked_linear",
        f"{inputs} -> {outputs}, batch {rows}, chunks of {chunk_size}, H {width}",
        arguments,
        _with_generator(_linear_work(rows, inputs, outputs), n, chunk_size, width),
        tolerance=GENERATED,
        half_tolerance=GENERATED_HALF,
    )


@dataclass(frozen=True)
class Convolution:
    """A layer of `net`, padded to keep its image; `side`: of the image; `kernel`: of the window."""

    net: str
    inputs: int
    outputs: int
    side: int
    kernel: int
    stride: int = 1
    batch: int = 32

    @property
    def name(self) -> str:
        """As in resnet50-3x3-128-128-56-stride2: window, channels, side."""
        sizes = f"{self.kernel}x{self.kernel}-{self.inputs}-{self.outputs}-{self.side}"
        return f"{self.net}-{sizes}" + (f"-stride{self.stride}" if self.stride > 1 else "")

    @property
    def weights(self) -> int:
        return self.outputs * self.inputs * self.kernel**2

    @property
    def is_first(self) -> bool:
        """Its input is an image, whose gradient nobody asks for."""
        return self.inputs == 3

    @property
    def geometry(self) -> tuple[int, int, int, int]:
        """Stride, padding, dilation and groups."""
        return self.stride, self.kernel // 2, 1, 1

    def work(self) -> dict[str, Work]:
        """Forward: x, W and logits read, y written. Backward: x, dy, W and logits read, both gradients written and dx;
        as many operations for dx, and for dW, as forward."""
        side = (self.side + 2 * (self.kernel // 2) - self.kernel) // self.stride + 1
        x, y = self.batch * self.inputs * self.side**2, self.batch * self.outputs * side**2
        product = 2.0 * y * self.inputs * self.kernel**2
        forward = Work(x + y + 2 * self.weights, product)
        backward = x + y + 4 * self.weights + (0 if self.is_first else x)
        return {
            FORWARD: forward,
            BOTH: Work(forward.entries + backward, product * (2 if self.is_first else 3)),
        }

    def draw(self, draw: Draw, channels_last: bool) -> tuple[Tensor, Tensor]:
        """x and W."""
        x = draw.leaf(self.batch, self.inputs, self.side, self.side, channels_last=channels_last)
        fan_in = self.inputs * self.kernel**2
        weight = draw.leaf(self.outputs, self.inputs, self.kernel, self.kernel, reach=(3 / fan_in) ** 0.5)
        return x.detach() if self.is_first else x, weight

    def __str__(self) -> str:
        sizes = f"{self.side} x {self.side}, {self.kernel} x {self.kernel}, stride {self.stride}, batch {self.batch}"
        return f"{self.inputs} -> {self.outputs}, {sizes}"


def masked_conv2d(layer: Convolution, channels_last: bool = False) -> OpCase:
    """y = conv2d(x, W * m) + b."""

    def arguments(draw: Draw) -> tuple:
        x, weight = layer.draw(draw, channels_last)
        logits = draw.leaf(*weight.shape, reach=2)
        return x, weight, logits, _threshold(draw), draw.leaf(layer.outputs), *layer.geometry

    return OpCase("masked_conv2d", str(layer), arguments, layer.work(), tf32=True)


def chunk_masked_conv2d(layer: Convolution, chunk_size: int, width: int, channels_last: bool = False) -> OpCase:
    """`masked_conv2d` with logits that are generated from the chunked hypernetwork."""

    def arguments(draw: Draw) -> tuple:
        x, weight = layer.draw(draw, channels_last)
        generator = _generator(draw, layer.weights, chunk_size, width)
        return x, weight, *generator, 0, _threshold(draw), draw.leaf(layer.outputs), *layer.geometry

    return OpCase(
        "chunk_masked_conv2d",
        f"{layer}, chunks of {chunk_size}, H {width}",
        arguments,
        _with_generator(layer.work(), layer.weights, chunk_size, width),
        tolerance=GENERATED,
        half_tolerance=GENERATED_HALF,
        tf32=True,
    )


def task_batched_linear(tasks: int, rows: int, inputs: int, outputs: int) -> OpCase:
    """Each row of x under its own task's mask, tasks in no order."""
    n, product = inputs * outputs, 2.0 * rows * inputs * outputs

    def arguments(draw: Draw) -> tuple:
        x, weight = draw.leaf(rows, inputs), draw.leaf(outputs, inputs, reach=(3 / inputs) ** 0.5)
        logits, thresholds = draw.leaf(tasks, outputs, inputs, reach=2), draw.full(tasks, value=THRESHOLD)
        ids = torch.randint(tasks, (rows,), generator=torch.Generator().manual_seed(3)).to(draw.device)
        return x, weight, logits, thresholds, ids, draw.leaf(outputs)

    # Forward: W, all logits and x read, y written; backward: these and dy read, dx, dW and all dlogits written.
    forward = Work((tasks + 1) * n + rows * (inputs + outputs), product)
    backward = 2 * (tasks + 1) * n + rows * (2 * inputs + outputs)
    work = {FORWARD: forward, BOTH: Work(forward.entries + backward, 3 * product)}
    sizes = f"{inputs} -> {outputs}, {rows} rows of {tasks} tasks"
    return OpCase("task_batched_linear", sizes, arguments, work)


# -- the hypernetwork's output layer ----------------------------------------------------------------------------------


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


# -- inference --------------------------------------------------------------------------------------------------------


def entropy_select(tasks: int, rows: int, classes: int) -> OpCase:
    """Each row's task of lowest entropy."""
    return OpCase(
        "entropy_select",
        f"{tasks} tasks, batch {rows}, {classes} classes",
        lambda draw: (draw(tasks, rows, classes, low=-4, high=4),),
        {FORWARD: Work(tasks * rows * classes)},
        results=("task",),
    )
