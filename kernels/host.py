"""What every launch function needs on the host: registration, checks of dtype and device, facts of the GPU."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, library

from ..errors import InputError
from ..ops.arguments import tensors
from ..ops.once import differentiable_once
from ..ops.paths import allows_tf32

INTERPRETED = bool(triton.knobs.runtime.interpret)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)

_LIBRARY = library.Library("hypermask_triton", "DEF")


def register(schema: str, implementation: Callable, shapes: Callable) -> None:
    """Define hypermask_triton::<schema>, run by `implementation`, with `shapes` as its shape function."""
    name = schema.split("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, on_its_device(implementation), "CUDA")
    _LIBRARY.impl(name, in_the_interpreter(implementation), "CPU")
    library.register_fake(f"hypermask_triton::{name}", shapes, lib=_LIBRARY)


def on_its_device(implementation: Callable) -> Callable:
    """Triton launches on the current device: with several GPUs the tensors' own must be that."""

    @functools.wraps(implementation)
    def run(*args):
        with torch.cuda.device_of(next(tensors(args))):
            return implementation(*args)

    return run


def in_the_interpreter(implementation: Callable) -> Callable:
    """On the CPU kernels run in Triton's interpreter only; else `check_runnable` raises."""

    @functools.wraps(implementation)
    def run(*args):
        check_runnable(next(tensors(args)))
        return implementation(*args)

    return run


def register_autograd(name: str, setup_context: Callable, backward: Callable) -> None:
    once = differentiable_once(name, backward)
    library.register_autograd(f"hypermask_triton::{name}", once, setup_context=setup_context, lib=_LIBRARY)


# What an op's arguments must be is said by its rule in ops/arguments/. An operator can be called directly too, so it
# asks that rule before it launches, and these for what Triton's kernels need besides.


def check_tensors(**named: Tensor | Sequence[Tensor] | None) -> None:
    """Raises InputError unless all tensors have dtypes that the kernels know and are on the first one's device."""
    _check(named, FLOATS)


def check_device(**named: Tensor | Sequence[Tensor] | None) -> None:
    """Raises InputError unless all tensors are on the first one's device."""
    _check(named, None)


def _check(named: dict[str, Tensor | Sequence[Tensor] | None], dtypes: Sequence[torch.dtype] | None) -> None:
    first, device = "", None
    for name, value in named.items():
        for tensor in (value,) if isinstance(value, Tensor) else value or ():
            if dtypes is not None and tensor.dtype not in dtypes:
                raise InputError(f"{name} is {tensor.dtype}; Triton kernels take float32, float16 and bfloat16")
            if device is None:
                first, device = name, tensor.device
            elif tensor.device != device:
                raise InputError(f"{name} is on {tensor.device}, {first} on {device}: use one device")


def check_one_dtype(weights: Sequence[Tensor]) -> None:
    """Raises InputError unless all weights have one dtype, as tensors must whose addresses a kernel chooses from."""
    if len({weight.dtype for weight in weights}) > 1:
        raise InputError("the weights differ in dtype")


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


class Gpu(NamedTuple):
    """What launch settings depend on besides sizes and dtypes.

    Attributes:
        capability: compute capability as one number, 90 for Hopper; 0 in the interpreter.
        multiprocessors: how many there are.
    """

    capability: int
    multiprocessors: int


@functools.cache
def gpu(device: torch.device) -> Gpu:
    """Facts of a tensor's device."""
    if device.type != "cuda":
        return Gpu(capability=0, multiprocessors=4)
    found = torch.cuda.get_device_properties(device)
    return Gpu(10 * found.major + found.minor, found.multi_processor_count)


@functools.cache
def name(device: torch.device) -> str:
    """The GPU's name, "" in the interpreter."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


def stored_bytes(weight: Tensor, logits: Tensor) -> int:
    """Bytes of an entry of the weight or of the logits, the larger of the two; see `settings`."""
    return max(weight.element_size(), logits.element_size())


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


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. (Triton's own is made for kernels too: on the host a call of it takes microseconds.)"""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of 2 that is n or more, for n of at least 1. (See `cdiv`.)"""
    return 1 << (n - 1).bit_length()


def none_if_unneeded(gradients: tuple[Tensor, ...], needed: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """Backward ops return an empty tensor for what nobody asked; autograd wants None there."""
    return tuple(g if need else None for g, need in zip(gradients, needed, strict=True))
