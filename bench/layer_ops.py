"""Ops that only a GPU has kernels for: masks applied, or generated, inside the matrix product and the convolution.

Everything is in bfloat16, each contender replayed from a CUDA graph over several sets of inputs, so that neither
Python nor the L2 cache takes part; where a Python loop is what a peer is, and in the linear layer's backward pass by
itself, all contenders run eagerly.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from hypermask_fast import ops
from hypermask_fast.ops.paths import FEWEST_ROWS, MAX_ROWS

from . import op_cases
from .case import OURS, Case
from .op_case import BACKWARD, BOTH, FORWARD, OpCase, case_of
from .op_cases import Convolution
from .op_run import by_backend, compiled

# Peers: W * m made at every call and then cuBLAS or cuDNN, the same by torch.compile, and the layer without a mask.
MASK_FIRST, COMPILED, PLAIN = "W*m, plain layer", "torch.compile", "plain layer"
CUDA = "ours cuda"  # csrc/cuda's kernel for a few rows


def cases(quick: bool, dtype: torch.dtype = torch.bfloat16) -> list[Case]:
    """dtype: of the inputs; another one only to see that everything runs where there is no GPU."""
    size = 48 if quick else 4096
    few, many = ((1, 5), 20) if quick else ((1, 16, 64), 8192)
    found = [_masked_linear(size, rows, FORWARD, dtype) for rows in (*few, many)]
    found.append(_masked_linear(size, many, BACKWARD, dtype))
    for rows in few:
        op_case = op_cases.chunk_masked_linear(rows, size, size, 100 if quick else 8000, 100)
        found.append(_case(op_case, f"chunk_masked_linear/forward{rows}", FORWARD, dtype, _plain_linear, rows))
    layers = _TINY if quick else (*resnet20(), *resnet50())
    return found + [_masked_conv2d(layer, direction, dtype) for direction in (FORWARD, BOTH) for layer in layers]


def _case(
    op_case: OpCase, name: str, direction: str, dtype: torch.dtype, plain: Callable, rows: int = MAX_ROWS + 1
) -> Case:
    """rows: of x, where csrc/cuda has a kernel for few of them."""
    contenders = {
        OURS: partial(by_backend, op_case.op, "triton"),  # the kernel itself
        "ours dispatched": lambda: ops.OPS[op_case.op],  # what a layer of the library calls
        CUDA: partial(by_backend, op_case.op, "cuda"),
        MASK_FIRST: lambda: op_case.definition,
        COMPILED: lambda: compiled(op_case.definition),
        PLAIN: lambda: plain,
    }
    if rows > (MAX_ROWS if op_case.op == "masked_linear" and dtype != torch.float32 else FEWEST_ROWS):
        del contenders[CUDA]
    # The plain layer computes something else; its own result is not compared.
    return case_of(op_case, name, contenders, direction, dtype, graph=direction != BACKWARD, unchecked=(PLAIN,))


def _plain_linear(x, weight, *rest):
    return F.linear(x, weight, rest[-1])


def _plain_conv2d(x, weight, logits, threshold, *rest):
    return F.conv2d(x, weight, *rest)


def _masked_linear(size: int, rows: int, direction: str, dtype: torch.dtype) -> Case:
    name = f"masked_linear/{direction}{rows}"
    return _case(op_cases.masked_linear(rows, size, size), name, direction, dtype, _plain_linear, rows)


def _masked_conv2d(layer: Convolution, direction: str, dtype: torch.dtype) -> Case:
    """Channels last: the forward pass, or forward and backward to all but an image."""
    op_case = op_cases.masked_conv2d(layer, channels_last=True)
    return _case(op_case, f"masked_conv2d/{direction}/{layer.name}", direction, dtype, _plain_conv2d)


def resnet20(width: int = 32, side: int = 32) -> tuple[Convolution, ...]:
    """Every shape there is in the presets' ResNet-20 on CIFAR's images, once."""
    shapes, inputs = [(3, 16, side, 3)], 16
    for outputs, stride in ((width, 1), (2 * width, 2), (4 * width, 2)):
        shapes += [(inputs, outputs, side, 3, stride), (outputs, outputs, side // stride, 3)]
        inputs, side = outputs, side // stride
    return tuple(Convolution("resnet20", *shape) for shape in shapes)


def resnet50(side: int = 224) -> tuple[Convolution, ...]:
    """Every shape there is in ResNet-50 on ImageNet's images, once; a stage's stride is in its first 3x3 layer."""
    shapes, inputs, side = [(3, 64, side, 7, 2)], 64, side // 4
    for width, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        outputs, below = 4 * width, side // stride
        shapes += [(inputs, width, side, 1), (width, width, side, 3, stride), (width, outputs, below, 1)]
        shapes += [(inputs, outputs, side, 1, stride)]  # the shortcut
        shapes += [(outputs, width, below, 1), (width, width, below, 3)]  # the stage's other blocks
        inputs, side = outputs, below
    return tuple(dict.fromkeys(Convolution("resnet50", *shape) for shape in shapes))


_TINY = tuple(Convolution("tiny", *shape, batch=2) for shape in ((4, 8, 6, 3, 1), (4, 8, 5, 1, 1), (3, 8, 9, 7, 2)))
