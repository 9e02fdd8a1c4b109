"""Layers of the target network under masks."""

from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from ..op_case import BACKWARD, BOTH, FORWARD, Draw, OpCase, Work
from .common import THRESHOLD, threshold_of

# Logits that an op generates by itself move across the threshold by rounding, and their entries with them.
GENERATED, GENERATED_HALF = 1e-2, 5e-2


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
        return x, weight, draw.leaf(outputs, inputs, reach=2), threshold_of(draw), draw.leaf(outputs)

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
        return x, weight, *_generator(draw, n, chunk_size, width), 0, threshold_of(draw), draw.leaf(outputs)

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
        return x, weight, logits, threshold_of(draw), draw.leaf(layer.outputs), *layer.geometry

    return OpCase("masked_conv2d", str(layer), arguments, layer.work(), tf32=True)


def chunk_masked_conv2d(layer: Convolution, chunk_size: int, width: int, channels_last: bool = False) -> OpCase:
    """`masked_conv2d` with logits that are generated from the chunked hypernetwork."""

    def arguments(draw: Draw) -> tuple:
        x, weight = layer.draw(draw, channels_last)
        generator = _generator(draw, layer.weights, chunk_size, width)
        return x, weight, *generator, 0, threshold_of(draw), draw.leaf(layer.outputs), *layer.geometry

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
