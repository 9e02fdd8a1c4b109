"""Which backend serves an op: reference | cpu | triton | cuda.

Chosen by, in this order: the op's argument `backend`, `with use_backend("...")`, the environment's HYPERMASK_BACKEND,
and otherwise automatically, the fastest that can serve.

An argument is strict: a backend that can't run this op on these tensors raises and says why. A block or the
environment asks for all ops at once, so an op that the backend doesn't have at all is chosen automatically; one that
it has but can't run on these tensors raises, and every op does where there is no such backend.

Each accelerated backend offers an op as a function with the reference's signature and a condition: a function of the
same arguments that returns "" or why it can't serve them.

Layers have a second way besides a backend's fused kernel: "mask first", W * m and then PyTorch's own product. Where
nobody asks for a backend by name, `dispatch` chooses between the two by shape.
"""

import json
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import util
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InputError
from . import paths as dispatch
from . import reference
from .paths import FUSED_BACKENDS, MASK_FIRST, constant_in_graphs

BACKENDS = ("reference", "cpu", "triton", "cuda")
_DEVICE = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}  # what auto tries on a device, the fastest first


class Offer(NamedTuple):
    """One op in one backend; `condition` returns "" or why these arguments can't be served."""

    function: Callable
    condition: Callable
    dtypes: tuple[torch.dtype, ...]


_offers: dict[tuple[str, str], Offer] = {}
_scope = threading.local()
_warned: set[tuple[str, str]] = set()  # device, and op or "" for all of them
_problems: dict[str, str] = {}


def _recorded(part: str) -> str:
    """What setup.py noted about a part it left out."""
    record = Path(__file__).parents[1] / "_build.json"
    return json.loads(record.read_text()).get(part, "") if record.exists() else ""


def _load_native() -> str:
    """Loads the extension; "" or why it is not there."""
    spec = util.find_spec("hypermask_fast._native")
    if spec is None:
        return _recorded("native") or "the extension is not built: pip install --no-build-isolation ."
    try:
        torch.ops.load_library(spec.origin)
    except OSError as error:
        return f"the extension does not load: {error}"
    return ""


def _cuda_problem() -> str:
    if NATIVE_PROBLEM:
        return NATIVE_PROBLEM
    if not torch._C._dispatch_has_kernel_for_dispatch_key("hypermask_native::mask_thresholds", "CUDA"):
        return _recorded("cuda") or "the extension was built without CUDA"
    return "" if torch.cuda.is_available() else "no CUDA device"


NATIVE_PROBLEM = _load_native()
_ENVIRONMENT = os.environ.get("HYPERMASK_BACKEND")


@constant_in_graphs
def problem(backend: str) -> str:
    """Why a backend is not to be had here at all, "" if it is. Found out once."""
    if backend not in _problems:
        _problems[backend] = _find_problem(backend)
    return _problems[backend]


def _find_problem(backend: str) -> str:
    if backend in ("reference", MASK_FIRST):
        return ""
    if backend == "cpu":
        return NATIVE_PROBLEM
    if backend == "cuda":
        return _cuda_problem()
    if util.find_spec("triton") is None:
        return "triton is not installed"
    if not any(name == backend for _, name in _offers):
        return "no Triton kernels are installed"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return "" if torch.cuda.is_available() or interpreted else "no CUDA device (or TRITON_INTERPRET=1 for tests)"


def offer(
    op: str,
    backend: str,
    function: Callable,
    condition: Callable | None = None,
    dtypes: tuple[torch.dtype, ...] = (torch.float32,),
) -> None:
    """Adds an op to a backend; without a condition it serves every call on its device, in one of `dtypes`.

    What Triton and "mask first" can't serve is for their conditions alone to say.
    """
    _offers[op, backend] = Offer(function, condition or (lambda *args, **kwargs: ""), dtypes)
    _problems.pop(backend, None)


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Within the block, and in this thread, ops run on the named backend where it has them, or "auto"."""
    _check_name(backend)
    before = getattr(_scope, "backend", None)
    _scope.backend = backend
    try:
        yield
    finally:
        _scope.backend = before


def _check_name(backend: str) -> None:
    if backend not in BACKENDS and backend != "auto":
        raise InputError(f"backend must be one of auto, {', '.join(BACKENDS)}, not {backend!r}")


def requested(backend: str | None = None) -> str:
    """The backend asked for by argument, scope or environment; "auto" if none is."""
    wanted = backend or getattr(_scope, "backend", None) or _ENVIRONMENT or "auto"
    if wanted != "auto":
        _check_name(wanted)
    return wanted


def wanted_for(op: str, backend: str | None = None) -> str:
    """`requested` for one op: "auto" too where scope or environment ask for a backend that doesn't have it."""
    wanted = requested(backend)
    known = wanted in ("auto", "reference") or (op, wanted) in _offers
    return wanted if backend or known or problem(wanted) else "auto"


def _refusal(op: str, backend: str, tensor: Tensor, args: tuple, kwargs: dict) -> str:
    """Why `backend` can't serve this call, "" if it can."""
    if backend == "reference":
        return ""
    return problem(backend) or _mismatch(op, backend, tensor, args, kwargs)


def _mismatch(op: str, backend: str, tensor: Tensor, args: tuple, kwargs: dict) -> str:
    """Why `backend` would not serve this call even where it is to be had, "" if it would."""
    entry = _offers.get((op, backend))
    if entry is None:
        return f"{backend} has no {op}"
    if backend in ("triton", MASK_FIRST):
        return entry.condition(*args, **kwargs)
    if tensor.device.type != backend:
        return f"the tensors are on {tensor.device.type}"
    if tensor.dtype not in entry.dtypes:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in entry.dtypes)
        return f"{backend} computes in {known}, not {str(tensor.dtype).removeprefix('torch.')}"
    return entry.condition(*args, **kwargs)


def choose(op: str, backend: str | None, tensor: Tensor, args: tuple, kwargs: dict) -> Callable:
    """The function that serves this call of `op`; `tensor` stands for device and dtype.

    Raises:
        InputError: the backend named by argument, scope or environment can't serve the call; the message says why.
    """
    wanted = wanted_for(op, backend)
    if wanted != "auto":
        if why := _refusal(op, wanted, tensor, args, kwargs):
            raise InputError(f"backend {wanted!r} can't run {op}: {why}")
        return getattr(reference, op) if wanted == "reference" else _offers[op, wanted].function
    names, _ = _automatic(op, tensor, args, kwargs)
    for name in names:
        if not _refusal(op, name, tensor, args, kwargs):
            return _offers[op, name].function
    _say_once(op, tensor, args, kwargs)
    return getattr(reference, op)


def _automatic(op: str, tensor: Tensor, args: tuple, kwargs: dict) -> tuple[tuple[str, ...], str]:
    """What auto tries for this call, in order, and why, where there is a choice of paths."""
    fused = _DEVICE.get(tensor.device.type, ())
    choice = dispatch.choose(op, args, kwargs)
    if choice is None or tensor.device.type == "cpu":  # the CPU's own offers mask first
        return (*fused, MASK_FIRST), choice.why if choice else ""
    return (MASK_FIRST,) if choice.path == MASK_FIRST else (*choice.order, MASK_FIRST), choice.why


def may_fuse(x: Tensor) -> bool:
    """False where no layer runs fused anyway: without a GPU, unless such a backend is asked for by name."""
    wanted = requested()
    return wanted in FUSED_BACKENDS or (wanted == "auto" and x.device.type != "cpu")


def fused_function(op: str, *args) -> Callable | None:
    """The fused kernel that a layer should call, None where it should rather multiply with W * m.

    By name: that of the backend asked for, if it serves the call. Automatically: that of the first backend that does,
    in the order that `dispatch` gives, where it says so.
    """
    wanted = wanted_for(op)
    if wanted == "auto":
        choice = dispatch.choose(op, args, {})
        names = choice.order if choice.path == dispatch.FUSED else ()
    else:
        names = (wanted,) if wanted in FUSED_BACKENDS else ()
    served = fused_backends(op, *args, among=names)
    return _offers[op, served[0]].function if served else None


def fused_backends(op: str, *args, among: tuple[str, ...] = FUSED_BACKENDS) -> list[str]:
    """The backends whose fused kernel serves this call of a layer op."""
    return [name for name in among if not _refusal(op, name, args[0], args, {})]


def _say_once(op: str, tensor: Tensor, args: tuple, kwargs: dict) -> None:
    """Warns that the reference runs because a backend that would serve this call is missing.

    Once per device where all its accelerated backends are missing, else once per op. A call that none of them would
    serve is no surprise.
    """
    device = tensor.device.type
    if torch.compiler.is_compiling() or not _warned.isdisjoint({(device, ""), (device, op)}):
        return
    names = _DEVICE.get(device, ())
    missing = [name for name in names if problem(name)]
    missed = [name for name in missing if not _mismatch(op, name, tensor, args, kwargs)]
    if names and not missed:
        return
    everything = len(missing) == len(names)
    _warned.add((device, "" if everything else op))
    reasons = [f"{name}: {problem(name)}" for name in (missing if everything else missed)]
    text = "; ".join(reasons) or f"no backend for {device}"
    what = "its reference ops" if everything else f"the reference of {op}"
    warnings.warn(f"hypermask_fast runs {what} on {device} ({text})", stacklevel=5)  # who called ops


def explain(op: str, *args, backend: str | None = None, **kwargs) -> str:
    """Which backend would run `op` with these arguments, and why not the others; one line each.

    >>> print(explain("semi_binary_mask", logits, threshold))
    """
    if not hasattr(reference, op):
        raise InputError(f"there is no op {op!r}")
    tensor = next(tensors((*args, *kwargs.values())), None)
    if tensor is None:
        raise InputError("explain needs the op's arguments, to see their device and dtype")
    wanted, asked = wanted_for(op, backend), requested(backend)
    names, why = _automatic(op, tensor, args, kwargs) if wanted == "auto" else ((wanted,), "")
    refusals = {name: _refusal(op, name, tensor, args, kwargs) for name in names}
    chosen = next((name for name in names if not refusals[name]), "reference" if wanted == "auto" else "nothing")
    how = "asked for" if wanted != "auto" else "chosen automatically"
    how += f": {asked} has no {op}" if asked != wanted else ""
    lines = [f"{op}: {chosen} ({how})"]
    lines += [f"  {why}"] if why else []
    return "\n".join(lines + [f"  not {name}: {why}" for name, why in refusals.items() if why and name != MASK_FIRST])


def debug() -> bool:
    """HYPERMASK_DEBUG=1: checks of values that lie on a GPU are made too, at the price of waiting for it."""
    return os.environ.get("HYPERMASK_DEBUG", "0") == "1"


def tensors(values: tuple) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors(tuple(value))


def served(backend: str) -> list[str]:
    """The ops a backend offers."""
    return sorted(op for op, name in _offers if name == backend)
