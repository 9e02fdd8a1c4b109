"""What every launch function needs on the host: registration, checks of the input, facts of the device."""

import functools
import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor, library

from ..errors import InputError
from ..ops.paths import allows_tf32
from ..ops.registry import tensors

INTERPRETED = bool(triton.knobs.runtime.interpret)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
TRITON_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}

_LIBRARY = library.Library("hypermask_fast", "FRAGMENT")


def register(schema: str, implementation: Callable, shapes: Callable) -> None:
    """Define hypermask_fast::<schema>, run by `implementation`, with `shapes` as its shape function."""
    name = schema.split("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, on_its_device(implementation), "CUDA")
    _LIBRARY.impl(name, implementation, "CPU")  # serves the interpreter; without it `check_runnable` raises
    library.register_fake(f"hypermask_fast::{name}", shapes, lib=_LIBRARY)


def on_its_device(implementation: Callable) -> Callable:
    """Triton launches on the current device: with several GPUs the tensors' own must be that."""

    @functools.wraps(implementation)
    def run(*args):
        with torch.cuda.device_of(next(tensors(args))):
            return implementation(*args)

    return run


def register_autograd(name: str, setup_context: Callable, backward: Callable) -> None:
    library.register_autograd(f"hypermask_fast::{name}", backward, setup_context=setup_context, lib=_LIBRARY)


def check(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


def check_tensors(**tensors: Tensor | None) -> None:
    """All on the first one's device and of a dtype the kernels know.

    Raises:
        InputError: naming the tensor that is not.
    """
    device = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.dtype not in FLOATS:
            raise InputError(f"{name} is {tensor.dtype}; Triton kernels take float32, float16 and bfloat16")
        device = device or tensor.device
        if tensor.device != device:
            raise InputError(f"{name} is on {tensor.device}, {next(iter(tensors))} on {device}: use one device")


def check_runnable(tensor: Tensor) -> None:
    """Raises InputError where Triton cannot run: a CPU tensor outside the interpreter."""
    if not (tensor.is_cuda or INTERPRETED):
        raise InputError(
            f"Triton kernels need CUDA tensors, not {tensor.device.type} ones; on the CPU use another backend, "
            "or set TRITON_INTERPRET=1 before the first import to run them slowly for tests"
        )


def autocast(x: Tensor) -> Tensor:
    """x in autocast's dtype where autocast is on; weights and logits stay as stored, the kernels cast tiles."""
    kind = x.device.type
    if x.is_floating_point() and x.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return x.to(torch.get_autocast_dtype(kind))
    return x


def rows_of(x: Tensor) -> Tensor:
    """x (..., n) as (rows, n), a view where the strides allow."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


@functools.cache
def multiprocessors(index: int | None) -> int:
    return 4 if index is None else torch.cuda.get_device_properties(index).multi_processor_count


@functools.cache
def capability(index: int | None) -> int:
    """Compute capability as one number, 90 for Hopper; 0 for the interpreter."""
    if index is None:
        return 0
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def matmul_precision(dtype: torch.dtype) -> str:
    """Triton's input_precision for a product in dtype: TF32 where torch.backends.cuda.matmul allows it."""
    return "tf32" if dtype == torch.float32 and allows_tf32(convolution=False) else "ieee"


def convolution_precision(dtype: torch.dtype) -> str:
    """The same for convolutions, whose setting is torch.backends.cudnn.conv."""
    return "tf32" if dtype == torch.float32 and allows_tf32(convolution=True) else "ieee"


def approximate_tanh(dtype: torch.dtype) -> bool:
    """The hardware's tanh (error 2^-11) serves products in bfloat16, whose own rounding is 2^-9."""
    return dtype == torch.bfloat16 and not INTERPRETED and torch.version.hip is None


def multiples_of_8(*values: int) -> int:
    """Bit i says that values[i] is a multiple of 8 that Triton does not find out itself (see device.times8)."""
    return sum(1 << i for i, value in enumerate(values) if value % 16 == 8)


def common_factor(*values: int) -> int:
    """The largest of 1, 2, 4 and 8 that divides all values, for device.multiple."""
    return math.gcd(8, *values)


def index_type(size: int) -> tl.dtype:
    """Type for offsets up to size: 32 bits where they do, for 64-bit divisions are calls."""
    return tl.int64 if size >= 2**31 - 2**16 else tl.int32


def none_if_unneeded(gradients: tuple[Tensor, ...], needed: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """Backward ops return an empty tensor for what nobody asked; autograd wants None there."""
    return tuple(g if need else None for g, need in zip(gradients, needed, strict=True))
