"""masked_linear and chunk_masked_linear of csrc/cuda for few rows, run by a CPU, and arguments for them.

Most arguments are whole numbers, and logits whose mask is exactly 0 or 1: every sum is exact in every dtype, so that
one entry too many, too few or in the wrong place shows.

What depends on the library's inner names stands here: the functions from `call` to `gradient`.
"""

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hypermask_fast import ops
from hypermask_fast.ops import reference
from hypermask_fast.ops.native import few_rows
from support.tolerances import assert_close

OPS = ("masked_linear", "chunk_masked_linear")
MAX_WIDTH = few_rows.MAX_WIDTH
HALVES = (torch.float16, torch.bfloat16)
DTYPES = {"masked_linear": (torch.float32, *HALVES), "chunk_masked_linear": HALVES}  # what each op takes
KINDS = {torch.float32: "sum", torch.float16: "float16", torch.bfloat16: "bfloat16"}  # of tolerances
GRADIENT_KINDS = {torch.float32: "sum", torch.float16: "gradient float16", torch.bfloat16: "gradient bfloat16"}


def call(op: str, *args: object) -> Tensor:
    """The backend's function: any strides and leading dimensions of x."""
    return getattr(ops, op).offers["cuda"].function(*args)


def refusal(op: str, *args: object) -> str:
    """Why the backend can't serve these arguments on a GPU, "" if it can."""
    return getattr(ops, op).offers["cuda"].condition(*args)


def offered_dtypes(op: str) -> tuple[torch.dtype, ...]:
    return getattr(ops, op).offers["cuda"].dtypes


def gradient(op: str) -> tuple[Callable, Callable]:
    """The operator's backward and its setup_context."""
    return getattr(few_rows, f"_{op}_backward"), getattr(few_rows, f"_{op}_setup")


@functools.cache
def emulated_operators() -> None:
    """Gives the emulated operators the shape functions and the gradients of the real ones."""
    for op in OPS:
        torch.library.register_fake(f"hypermask_emulated::{op}", few_rows._shapes)
        backward, setup = gradient(op)
        torch.library.register_autograd(f"hypermask_emulated::{op}", backward, setup_context=setup)


class FewRows:
    """`few_rows.masked_linear(*args)` is the kernel of csrc/cuda, run twice in guarded memory; see `emulation`."""

    def __init__(self, emulated) -> None:
        emulated_operators()
        self._emulated = emulated

    def __getattr__(self, op: str) -> Callable:
        return getattr(self._emulated, op)

    def operator(self, op: str):
        """The operator itself, differentiable."""
        return getattr(torch.ops.hypermask_emulated, op).default


def with_forward_of_the_definition(op: str) -> Callable:
    """The op with the kernel's gradient, its forward pass taken over by the definition: on any device."""

    class Op(torch.autograd.Function):
        forward = staticmethod(getattr(reference, op))
        backward, setup_context = map(staticmethod, gradient(op))

    return Op.apply


def most_rows(op: str, dtype: torch.dtype) -> int:
    """Of x, that the backend serves."""
    return 64 if op == "masked_linear" and dtype in HALVES else 16


# Arguments


def whole(*shape: int, low: int = -1, high: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randint(low, high + 1, shape).to(dtype)


def double(values: list | tuple) -> list:
    return [v.double() if isinstance(v, Tensor) else v for v in values]


def exact(op: str, args: list | tuple) -> Tensor:
    """The definition of whole numbers, without the last digits of a mask near 1."""
    return getattr(reference, op)(*double(args)).round()


def misaligned(tensor: Tensor) -> Tensor:
    """The same values, contiguous, at an address that is a multiple of the entry's size only."""
    memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    return memory[1:].view(tensor.shape).copy_(tensor)


def linear(rows: int, outputs: int, inputs: int, dtype: torch.dtype) -> list:
    """Random arguments of masked_linear."""
    x, weight, logits, bias = (
        torch.randn(*s).to(dtype) for s in ((rows, inputs), (outputs, inputs), (outputs, inputs), (outputs,))
    )
    return [x, weight, logits, torch.tensor(0.5), bias]


def chunked(
    rows: int, outputs: int, inputs: int, chunk_size: int, width: int, start: int, dtype: torch.dtype, make=whole
) -> list:
    """Arguments of chunk_masked_linear; of whole numbers the logits are multiples of 16, with a threshold of 8."""
    chunks = -(-(start + outputs * inputs) // chunk_size)
    hidden, layer, shift = make(chunks, width), 16 * make(chunk_size, width), 16 * make(chunk_size)
    tensors = [make(rows, inputs), make(outputs, inputs), hidden, layer, shift]
    return [*(t.to(dtype) for t in tensors), start, torch.tensor(8.0), make(outputs).to(dtype)]


def without_jumps(args: list) -> list:
    """Random arguments of chunk_masked_linear with small logits, none of which rounding moves over the threshold."""
    return [*args[:3], args[3] / 64, args[4] / 64, args[5], torch.tensor(0.0), args[7]]


def valid(op: str, dtype: torch.dtype = torch.float16) -> list:
    if op == "masked_linear":
        return linear(3, 20, 10, dtype)
    return chunked(3, 20, 10, 50, 6, 7, dtype, make=torch.randn)


# What holds for both ops


def assert_bad_tensors_are_refused(few_rows: FewRows, op: str, how: str) -> None:
    """Each tensor in turn of another dtype, stride, shape or number of dimensions: one line that names the op."""
    changes = {
        "dtype": lambda t: t.double(),
        "stride": lambda t: t.repeat_interleave(2, -1)[..., ::2],
        "shape": lambda t: torch.cat([t, t], -1),
        "dimensions": lambda t: t[None],
    }
    for i, value in enumerate(valid(op)):
        if not isinstance(value, Tensor) or (value.dim() == 0 and how != "dtype"):
            continue
        bad = valid(op)
        bad[i] = changes[how](value)
        with pytest.raises(RuntimeError, match=f"^{op}: ") as caught:
            getattr(few_rows, op)(*bad)
        assert "\n" not in str(caught.value).split("(origin")[0]


def assert_gradients_of_the_definition(few_rows: FewRows, op: str, args: list) -> None:
    """Of every tensor, each in the dtype that the tensor has, four roundings from the definition's in float64."""
    wide = double(args)
    leaves = [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.dim()]
    for values in (args, wide):
        for i in leaves:
            values[i] = values[i].detach().requires_grad_()
    y, expected = few_rows.operator(op)(*args), getattr(reference, op)(*wide)
    outer = torch.randn_like(y)
    found = torch.autograd.grad(y, [args[i] for i in leaves], outer)
    wanted = torch.autograd.grad(expected, [wide[i] for i in leaves], outer.double())
    for i, got, exact in zip(leaves, found, wanted, strict=True):
        assert got.dtype == args[i].dtype
        assert_close(got, exact, GRADIENT_KINDS[got.dtype], f"gradient of argument {i}")
