"""Ops that only a GPU has kernels for: masks applied, or generated, inside the matrix product and the convolution.

Everything is in bfloat16, each contender replayed from a CUDA graph over several sets of inputs, so that neither
Python nor the L2 cache takes part; where a Python loop is what a peer is, and in the linear layer's backward pass by
itself, all contenders run eagerly.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from math import prod
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from hypermask_fast import ops
from hypermask_fast.ops import reference
from hypermask_fast.ops import registry as backends
from hypermask_fast.ops.native import few_rows as small_batch

from .case import OURS, Case, Unavailable
from .gpu_tasks import task_cases
from .op_run import OpRun, Results, gradients, sets, uniform

DTYPE = torch.bfloat16
Shape = tuple[int, ...]
# Peers: W * m made at every call and then cuBLAS or cuDNN, the same by torch.compile, and the layer without a mask.
MASK_FIRST, COMPILED, PLAIN = "W*m, plain layer", "torch.compile", "plain layer"
CUDA = "ours cuda"  # csrc/cuda's kernel for a few rows


def kernels() -> ModuleType:
    """The Triton kernels; imported only when a benchmark needs them."""
    try:
        return import_module("hypermask_fast.kernels")
    except ImportError as error:
        raise Unavailable(f"the Triton kernels are not there: {error}") from error


def native(op: str) -> Callable:
    """An op by the cuda backend, asked for by name."""
    if why := backends.problem("cuda"):
        raise Unavailable(f"the cuda backend is not there: {why}")
    return partial(getattr(ops, op), backend="cuda")


def compiled(function: Callable) -> Callable:
    """By torch.compile, for the shapes of one case alone: after eight recompilations it would run eagerly."""
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


def cases(quick: bool) -> list[Case]:
    size = 48 if quick else 4096
    few, many = ((1, 5), 20) if quick else ((1, 16, 64), 8192)
    found = [masked_linear(size, rows) for rows in few]
    found += [masked_linear(size, many), masked_linear(size, many, backward=True)]
    found += [chunk_masked_linear(size, rows, 100 if quick else 8000) for rows in few]
    shapes = _QUICK_CONVOLUTIONS if quick else _CONVOLUTIONS
    found += [masked_conv2d(shape, backward) for backward in (False, True) for shape in shapes]
    return found + task_cases(quick)


@dataclass
class _Layer:
    """One masked layer's inputs; float64 copies of the same bfloat16 numbers for the reference."""

    x: Tensor
    weight: Tensor
    logits: Tensor
    threshold: Tensor
    bias: Tensor

    @classmethod
    def of(
        cls, x_shape: tuple[int, ...], weight_shape: tuple[int, ...], seed: int, device: torch.device, contender: str
    ) -> "_Layer":
        def made(*shape: int, k: int, scale: float = 1.0) -> Tensor:
            values = uniform(*shape, low=-scale, high=scale, seed=10 * seed + k, device=device).to(DTYPE)
            return values.double() if contender == "reference" else values

        bound = (3 / prod(weight_shape[1:])) ** 0.5
        threshold = torch.full((1,), 0.5, dtype=DTYPE, device=device)
        return cls(
            made(*x_shape, k=0),
            made(*weight_shape, k=1, scale=bound),
            made(*weight_shape, k=2, scale=2.0),
            threshold.double() if contender == "reference" else threshold,
            made(weight_shape[0], k=4),
        )


# -- linear -----------------------------------------------------------------------------------------------------------


def masked_linear(size: int, rows: int, backward: bool = False) -> Case:
    """y = x (W * m)^T + b on a size x size weight, or all its gradients."""

    def build(contender: str, device: torch.device) -> OpRun:
        function = _linear(contender)
        count = 1 if backward else sets(2 * 2 * size * size, device)
        layers = [_Layer.of((rows, size), (size, size), seed, device, contender) for seed in range(count)]
        make = _backward_call if backward else _forward_call
        return OpRun([make(function, layer) for layer in layers], graph=not backward and contender != "reference")

    part = "backward" if backward else "forward"
    per_row = 4.0 * rows * size  # x and y, bfloat16
    if backward:  # dx = dy W, dW and da from dy^T x; W and logits read, both gradients written
        floor = (2.0 * 4 * size * size + 2.0 * 3 * rows * size, 4.0 * rows * size * size)
    else:
        floor = (2.0 * 2 * size * size + per_row, 2.0 * rows * size * size)
    return _bf16(f"masked_linear/{part}{rows}", f"{size} x {size}, batch {rows}", build, floor, rows=rows)


def _linear(contender: str) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    choices = {
        OURS: lambda: kernels().masked_linear,
        "ours dispatched": lambda: ops.masked_linear,
        CUDA: lambda: native("masked_linear"),
        "reference": lambda: reference.masked_linear,
        MASK_FIRST: lambda: reference.masked_linear,
        COMPILED: lambda: compiled(reference.masked_linear),
        PLAIN: lambda: lambda x, weight, logits, threshold, bias: F.linear(x, weight, bias),
    }
    return choices[contender]()


def _forward_call(function: Callable, layer: _Layer) -> Callable[[], Results]:
    def call() -> Results:
        with torch.no_grad():
            return {"y": function(layer.x, layer.weight, layer.logits, layer.threshold, layer.bias)}

    return call


def _backward_call(function: Callable, layer: _Layer) -> Callable[[], Results]:
    """The forward pass is run once; the gradients are what is timed."""
    leaves = {"x": layer.x, "weight": layer.weight, "logits": layer.logits, "bias": layer.bias}
    for leaf in leaves.values():
        leaf.requires_grad_()
    y = function(layer.x, layer.weight, layer.logits, layer.threshold, layer.bias)
    grad = uniform(*y.shape, seed=99, device=y.device).to(y)

    def call() -> Results:
        found = torch.autograd.grad(y, list(leaves.values()), grad, retain_graph=True, allow_unused=True)
        return {f"grad/{name}": g for name, g in zip(leaves, found, strict=True) if g is not None}

    return call


def chunk_masked_linear(size: int, rows: int, chunk_size: int, width: int = 100) -> Case:
    """The same with logits that are generated from the chunked hypernetwork."""
    chunks = -(-size * size // chunk_size)

    def build(contender: str, device: torch.device) -> OpRun:
        function = _chunk_linear(contender)
        calls = []
        parts = (((chunks, width), 1.0), ((chunk_size, width), 0.3), ((chunk_size,), 0.3))
        for seed in range(sets(2 * size * size, device)):
            layer = _Layer.of((rows, size), (size, size), seed, device, contender)
            hidden, output, shift = (
                uniform(*shape, low=-scale, high=scale, seed=10 * seed + k, device=device).to(DTYPE).to(layer.x)
                for k, (shape, scale) in enumerate(parts, 5)
            )
            calls.append(_chunk_call(function, layer, hidden, output, shift))
        return OpRun(calls, graph=contender != "reference")

    moved = 2.0 * (size * size + width * (chunks + chunk_size)) + 4.0 * rows * size
    work = 2.0 * rows * size * size + 2.0 * size * size * width
    shapes = f"{size} x {size}, batch {rows}, chunks of {chunk_size}, H {width}"
    # A logit in bfloat16 moves across the threshold by rounding, and the entry with it.
    return _bf16(f"chunk_masked_linear/forward{rows}", shapes, build, (moved, work), tolerance=5e-2, rows=rows)


def _chunk_call(function: Callable, layer: _Layer, hidden: Tensor, output: Tensor, shift: Tensor) -> Callable:
    def call() -> Results:
        with torch.no_grad():
            return {"y": function(layer.x, layer.weight, hidden, output, shift, 0, layer.threshold, layer.bias)}

    return call


def _chunk_linear(contender: str) -> Callable:
    choices = {
        OURS: lambda: kernels().chunk_masked_linear,
        "ours dispatched": lambda: ops.chunk_masked_linear,
        CUDA: lambda: native("chunk_masked_linear"),
        "reference": lambda: reference.chunk_masked_linear,
        MASK_FIRST: lambda: reference.chunk_masked_linear,
        COMPILED: lambda: compiled(reference.chunk_masked_linear),
        PLAIN: lambda: lambda x, weight, *rest: F.linear(x, weight, rest[-1]),
    }
    return choices[contender]()


# -- convolution ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Convolution:
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

    def __str__(self) -> str:
        sizes = f"{self.side} x {self.side}, {self.kernel} x {self.kernel}, stride {self.stride}, batch {self.batch}"
        return f"{self.inputs} -> {self.outputs}, {sizes}"


def resnet20(width: int = 32, side: int = 32) -> tuple[_Convolution, ...]:
    """Every shape there is in the presets' ResNet-20 on CIFAR's images, once."""
    shapes, inputs = [(3, 16, side, 3)], 16
    for outputs, stride in ((width, 1), (2 * width, 2), (4 * width, 2)):
        shapes += [(inputs, outputs, side, 3, stride), (outputs, outputs, side // stride, 3)]
        inputs, side = outputs, side // stride
    return tuple(_Convolution("resnet20", *shape) for shape in shapes)


def resnet50(side: int = 224) -> tuple[_Convolution, ...]:
    """Every shape there is in ResNet-50 on ImageNet's images, once; a stage's stride is in its first 3x3 layer."""
    shapes, inputs, side = [(3, 64, side, 7, 2)], 64, side // 4
    for width, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        outputs, below = 4 * width, side // stride
        shapes += [(inputs, width, side, 1), (width, width, side, 3, stride), (width, outputs, below, 1)]
        shapes += [(inputs, outputs, side, 1, stride)]  # the shortcut
        shapes += [(outputs, width, below, 1), (width, width, below, 3)]  # the stage's other blocks
        inputs, side = outputs, below
    return tuple(dict.fromkeys(_Convolution("resnet50", *shape) for shape in shapes))


_CONVOLUTIONS = (*resnet20(), *resnet50())
_QUICK_CONVOLUTIONS = tuple(
    _Convolution("tiny", *shape, batch=2) for shape in ((4, 8, 6, 3, 1), (4, 8, 5, 1, 1), (3, 8, 9, 7, 2))
)


def masked_conv2d(shape: _Convolution, backward: bool = False) -> Case:
    """One convolution, channels last: the forward pass, or forward and backward to all but an image."""
    out_side = (shape.side + 2 * (shape.kernel // 2) - shape.kernel) // shape.stride + 1
    x_size = shape.batch * shape.inputs * shape.side**2
    y_size = shape.batch * shape.outputs * out_side**2
    weights = shape.outputs * shape.inputs * shape.kernel**2
    image = shape.inputs == 3  # is data: nobody asks for its gradient

    def trained(layer: _Layer, contender: str) -> dict[str, Tensor]:
        leaves = {} if image else {"x": layer.x}
        leaves |= {"weight": layer.weight, "bias": layer.bias}
        return leaves if contender == PLAIN else leaves | {"logits": layer.logits}

    def build(contender: str, device: torch.device) -> OpRun:
        function = _convolution(contender)
        calls = []
        for seed in range(sets(2 * (x_size + y_size + 2 * weights), device)):
            layer = _Layer.of(
                (shape.batch, shape.inputs, shape.side, shape.side),
                (shape.outputs, shape.inputs, shape.kernel, shape.kernel),
                seed,
                device,
                contender,
            )
            layer.x = layer.x.contiguous(memory_format=torch.channels_last)
            forward = _convolution_call(function, layer, shape)
            if not backward:
                calls.append(forward)
                continue
            grad = uniform(shape.batch, shape.outputs, out_side, out_side, seed=99, device=device).to(DTYPE)
            grad = grad.to(layer.x.dtype).contiguous(memory_format=torch.channels_last)
            calls.append(_both(forward, trained(layer, contender), grad))
        return OpRun(calls, graph=contender != "reference")

    moved, work = x_size + y_size + 2 * weights, 2.0 * y_size * shape.inputs * shape.kernel**2
    if backward:  # x, dy, W and logits read, dW and dlogits written; dx, unless it is an image's
        moved += x_size + y_size + 4 * weights + (0 if image else x_size)
        work *= 2 if image else 3
    direction = "both" if backward else "forward"
    return _bf16(f"masked_conv2d/{direction}/{shape.name}", str(shape), build, (2.0 * moved, work))


def _convolution_call(function: Callable, layer: _Layer, shape: _Convolution) -> Callable[[], Results]:
    def call() -> Results:
        y = function(layer.x, layer.weight, layer.logits, layer.threshold, layer.bias, shape.stride, shape.kernel // 2)
        return {"y": y}

    return call


def _both(forward: Callable[[], Results], leaves: dict[str, Tensor], grad: Tensor) -> Callable[[], Results]:
    """Forward and backward in one call, so that a graph can hold both."""
    for leaf in leaves.values():
        leaf.requires_grad_()

    def call() -> Results:
        y = forward()["y"]
        return {"y": y} | gradients(y, leaves, grad)

    return call


def _convolution(contender: str) -> Callable:
    choices = {
        OURS: lambda: kernels().masked_conv2d,
        "ours dispatched": lambda: ops.masked_conv2d,
        "reference": lambda: reference.masked_conv2d,
        MASK_FIRST: lambda: reference.masked_conv2d,
        COMPILED: lambda: compiled(reference.masked_conv2d),
        PLAIN: lambda: lambda x, weight, logits, threshold, *rest: F.conv2d(x, weight, *rest),
    }
    return choices[contender]()


# ---------------------------------------------------------------------------------------------------------------------


def _bf16(
    name: str,
    shapes: str,
    build: Callable,
    floor: tuple[float, float],
    tolerance: float = 2e-2,
    rows: int | None = None,
) -> Case:
    """`rows`: of x, where csrc/cuda has a kernel for few of them."""
    few = (CUDA,) if rows is not None and rows <= small_batch.MAX_ROWS else ()
    # "ours" is the Triton kernel itself; "ours dispatched" what a layer of the library calls.
    return Case(
        name=name,
        experiment=name.split("/")[0],
        task=None,
        shapes=shapes,
        contenders=(OURS, "ours dispatched", *few, MASK_FIRST, COMPILED, PLAIN),
        build=build,
        floor=lambda: floor,
        tolerance=lambda tensor: tolerance,
        # The plain layer computes something else; its own result is not compared.
        reference=lambda contender: "" if contender == PLAIN else "reference",
        dtype="bfloat16",
    )
