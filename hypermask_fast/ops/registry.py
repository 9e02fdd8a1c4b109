"""What an op is, who offers it, and which backend serves a call: reference | plain | cpu | triton | cuda.

A backend is chosen by, in this order: the op's argument `backend`, `with use_backend("...")`, the environment's
HYPERMASK_BACKEND, and otherwise automatically: the fastest that can serve the call.

An argument is strict: a backend that can't run this op on these tensors raises and says why. A block or the
environment asks for all ops at once, so a call for which the backend has no kernel at all is chosen automatically; one
that it has a kernel for but can't run on these tensors raises, and every call does where there is no such backend.

"plain" is PyTorch's own products, arranged well, on any device and dtype: for a layer W * m first and then the product.
Where nobody asks for a backend by name, `paths` chooses between a fused kernel and that, by shape.
"""

import inspect
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar, overload

import torch
from torch import Tensor

from ..errors import InputError
from ..transforming import transforming
from . import arguments, paths, signature
from .paths import FUSED_BACKENDS, constant_in_graphs

P = ParamSpec("P")
R = TypeVar("R", covariant=True)

REFERENCE, PLAIN, AUTO = "reference", "plain", "auto"
BACKENDS = (REFERENCE, PLAIN, "cpu", "triton", "cuda")
NATIVE = ("cpu", "cuda")  # the extension's backends, each named as its device
OPS: dict[str, "Op[..., Any]"] = {}  # every op by name; an `Op` adds itself


class _Scope(threading.local):
    """What `use_backend` asks for in this thread."""

    backend: str | None = None


_AUTOMATIC = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}  # what auto tries on a device, the fastest first
_ENVIRONMENT = os.environ.get("HYPERMASK_BACKEND")
_scope = _Scope()
_warned: set[tuple[str, str]] = set()  # device, and op or "" for all of them
_finders: dict[str, Callable[[], str]] = {REFERENCE: lambda: "", PLAIN: lambda: ""}
_problems: dict[str, str] = {}
_choices: dict[tuple, Callable[..., Any]] = {}  # kind of call, as `Op._kind` has it -> what serves such calls
_MOST_CHOICES = 4096


def serves(*values: Any) -> str:
    """The condition of who serves every call."""
    return ""


def _is_tensor(annotation: Any) -> bool:
    return annotation in (Tensor, Tensor | None)


@dataclass(frozen=True)
class Offer:
    """One op on one backend. Every function takes all of the op's arguments by position.

    Attributes:
        function: does what the op's definition says. Where it has a method `of_kind`, that is given the first call's
            arguments, and returns what serves all calls of the kind of this one without looking at them again.
        condition: "" or why the backend can't serve these tensors.
        form: "" or why this is no call that the backend has a kernel for: another one serves such calls.
        dtypes: those in which the extension's kernel computes; the other backends' conditions look for themselves.
    """

    function: Callable[..., Any]
    condition: Callable[..., str] = serves
    form: Callable[..., str] = serves
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)


class Chosen(NamedTuple):
    """Who serves a call. backend: its name; function: takes the call's arguments; why: the reason, "" if there is no
    choice of paths."""

    backend: str
    function: Callable[..., Any]
    why: str = ""


class Op(Generic[P, R]):
    """An op of the method. Called with its definition's arguments, it runs on the fastest backend that serves the call.

    Args:
        definition: the function in `reference` that says what the op computes.
        rule: the function in `arguments` that says what its arguments must be.
        layer: for a masked layer, how its arguments show the shape of the product; see `paths`.
        values_rule: what the rule also asks of values in its tensors, where that is anything: it is judged at every
            call, all else once for each kind of call (see `signature`).
        offers: backend -> its `Offer`.
    """

    def __init__(
        self,
        definition: Callable[P, R],
        rule: Callable[..., None],
        layer: paths.Layer | None = None,
        values_rule: Callable[..., None] | None = None,
        /,
        **offers: Offer,
    ) -> None:
        signature = inspect.signature(definition)
        parameters = list(signature.parameters.values())
        self.name = self.__name__ = self.__qualname__ = definition.__name__
        self.definition, self.rule, self.layer, self.offers = definition, rule, layer, offers
        self._values_rule = values_rule
        self.__doc__ = f"{inspect.getdoc(definition)}\n\nbackend: the name of the one that must serve the call."
        chosen = inspect.Parameter("backend", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=str | None)
        self.__signature__ = signature.replace(parameters=[*parameters, chosen])
        self._names = tuple(p.name for p in parameters)
        self._defaults = tuple(p.default for p in parameters)
        self._tensors = [(i, p.name, p.annotation) for i, p in enumerate(parameters) if _is_tensor(p.annotation)]
        OPS[self.name] = self

    @overload
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R: ...
    @overload
    def __call__(self, *args: Any, backend: str | None, **kwargs: Any) -> R: ...
    def __call__(self, *args: Any, backend: str | None = None, **kwargs: Any) -> R:
        values = args if not kwargs and len(args) == len(self._names) else self.positional(args, kwargs)
        kind = None if torch.compiler.is_compiling() else self._kind(values, backend)
        serving = None if kind is None else _choices.get(kind)
        if serving is None:
            return self._first_of_its_kind(values, backend, kind)(*values)
        if self._values_rule is not None:
            self._values_rule(*values)
        return serving(*values)

    def _kind(self, values: tuple[Any, ...], backend: str | None) -> tuple | None:
        """All that decides whether the arguments fit and who serves the call; None where the call has to be looked at
        anew each time."""
        about = None if transforming() else signature.of(values)
        if about is None:
            return None
        around = paths.surroundings(self.layer)
        return self.name, backend, _scope.backend, _ENVIRONMENT, torch.is_grad_enabled(), around, about

    def _first_of_its_kind(self, values: tuple[Any, ...], backend: str | None, kind: tuple | None) -> Callable[..., R]:
        """What serves this call, which is remembered for others of its kind."""
        function = self._choose(values, self._judged(values), backend).function
        if kind is not None:
            if len(_choices) >= _MOST_CHOICES:
                _choices.clear()
            of_kind = getattr(function, "of_kind", None)
            _choices[kind] = function if of_kind is None else of_kind(*values)
        return function

    def _judged(self, values: tuple[Any, ...]) -> Tensor:
        """The first tensor, which stands for device and dtype. Raises InputError where the arguments do not fit."""
        if not torch.compiler.is_compiling():
            for i, name, kind in self._tensors:
                if not isinstance(values[i], kind):
                    raise InputError(f"{self.name}: {name} must be a tensor, not {type(values[i]).__name__}")
        first = next(arguments.tensors(values), None)
        if first is None:
            raise InputError(f"{self.name}: there is no tensor among the arguments")
        if not torch.compiler.is_compiling():
            arguments.one_device(self.name, first, values)
        self.rule(*values)
        if self._values_rule is not None and not torch.compiler.is_compiling():
            self._values_rule(*values)
        return first

    def positional(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """All arguments by position, defaults where none is given, as a call of the definition would have them."""
        given = len(args)
        if not kwargs and given == len(self._names):
            return args
        rest = zip(self._names[given:], self._defaults[given:], strict=True)
        values = (*args, *(kwargs.pop(name, default) for name, default in rest))
        missing = [name for name, value in zip(self._names, values, strict=False) if value is inspect.Parameter.empty]
        if kwargs or missing or given > len(self._names):
            wrong = f"is missing {', '.join(missing)}" if missing else f"takes {', '.join(self._names)} and backend"
            raise TypeError(f"{self.name}() {wrong}")
        return values

    def choose(self, *args: Any, backend: str | None = None, **kwargs: Any) -> Chosen:
        """Who would serve this call. Raises InputError where the backend asked for can't, and says why."""
        values = self.positional(args, kwargs)
        return self._choose(values, self._judged(values), backend)

    def _choose(self, values: tuple[Any, ...], first: Tensor, backend: str | None) -> Chosen:
        wanted = self._wanted(backend, values)
        if wanted == AUTO:
            return self._automatic(values, first)
        if why := self.refusal(wanted, *values):
            raise InputError(f"backend {wanted!r} can't run {self.name}: {why}")
        return Chosen(wanted, self._function(wanted))

    def _function(self, backend: str) -> Callable[..., Any]:
        return self.definition if backend == REFERENCE else self.offers[backend].function

    def _wanted(self, backend: str | None, values: tuple[Any, ...]) -> str:
        """`requested` for this call: "auto" too where scope or environment ask for what has no kernel for it."""
        wanted = requested(backend)
        if backend or wanted in (AUTO, REFERENCE) or problem(wanted):
            return wanted
        offer = self.offers.get(wanted)
        return AUTO if offer is None or offer.form(*values) else wanted

    def _automatic(self, values: tuple[Any, ...], first: Tensor) -> Chosen:
        if _is_followed():
            return Chosen(REFERENCE, self.definition)
        names, why = self._order(values, first)
        for name in names:
            if not self.refusal(name, *values):
                return Chosen(name, self.offers[name].function, why)
        self._say_once(values, first)
        return Chosen(REFERENCE, self.definition, why)

    def _order(self, values: tuple[Any, ...], first: Tensor) -> tuple[tuple[str, ...], str]:
        """What auto tries for this call, in order, and why, where there is a choice of paths."""
        device = first.device.type
        choice = self.layer.choose(self.name, values) if self.layer else None
        if choice is None or device == "cpu":  # the CPU's own layers mask first
            return (*_AUTOMATIC.get(device, ()), PLAIN), choice.why if choice else ""
        return (*choice.order, PLAIN) if choice.path == paths.FUSED else (PLAIN,), choice.why

    def refusal(self, backend: str, *values: Any) -> str:
        """Why `backend` can't serve a call with all these arguments, "" if it can."""
        if backend == REFERENCE:
            return ""
        if _is_followed():
            return "within torch.func's transforms and forward-mode differentiation only the reference can"
        return problem(backend) or self._mismatch(backend, values)

    def _mismatch(self, backend: str, values: tuple[Any, ...]) -> str:
        """Why `backend` would not serve this call even where it is to be had, "" if it would."""
        offer = self.offers.get(backend)
        if offer is None:
            return f"{backend} has no {self.name}"
        if backend in NATIVE:
            first = next(arguments.tensors(values))
            if first.device.type != backend:
                return f"the tensors are on {first.device.type}"
            if first.dtype not in offer.dtypes:
                known = ", ".join(str(dtype).removeprefix("torch.") for dtype in offer.dtypes)
                return f"{backend} computes in {known}, not {str(first.dtype).removeprefix('torch.')}"
        return offer.form(*values) or offer.condition(*values)

    def fused(self, *values: Any) -> Callable[..., Any] | None:
        """The fused kernel that a layer with these arguments should call; None where it should multiply with W * m.

        By name: that of the backend asked for, if it serves the call. Automatically: that of the first backend that
        does, in the order that `paths` gives, where it says so.
        """
        wanted = self._wanted(None, values)
        if wanted == AUTO:
            choice = self.layer.choose(self.name, values) if self.layer else None
            names = choice.order if choice and choice.path == paths.FUSED else ()
        else:
            names = (wanted,) if wanted in FUSED_BACKENDS else ()
        return next((self.offers[name].function for name in names if not self.refusal(name, *values)), None)

    def explain(self, values: tuple[Any, ...], backend: str | None) -> str:
        """See `explain` below."""
        first, wanted, asked = self._judged(values), self._wanted(backend, values), requested(backend)
        names, why = self._order(values, first) if wanted == AUTO else ((wanted,), "")
        refusals = {name: self.refusal(name, *values) for name in names}
        nobody = REFERENCE if wanted == AUTO else "nothing"
        chosen = next((name for name in names if not refusals[name]), nobody)
        how = "asked for" if wanted != AUTO else "chosen automatically"
        if asked != wanted:
            how += f": {self._mismatch(asked, values)}"
        lines = [f"{self.name}: {chosen} ({how})", *([f"  {why}"] if why else [])]
        return "\n".join(lines + [f"  not {name}: {why}" for name, why in refusals.items() if why and name != PLAIN])

    def _say_once(self, values: tuple[Any, ...], first: Tensor) -> None:
        """Warns that the reference runs because a backend that would serve this call is missing.

        Once per device where all its accelerated backends are missing, else once per op. A call that none of them would
        serve is no surprise.
        """
        device = first.device.type
        if torch.compiler.is_compiling() or not _warned.isdisjoint({(device, ""), (device, self.name)}):
            return
        names = _AUTOMATIC.get(device, ())
        missing = [name for name in names if problem(name)]
        missed = [name for name in missing if not self._mismatch(name, values)]
        if names and not missed:
            return
        everything = len(missing) == len(names)
        _warned.add((device, "" if everything else self.name))
        reasons = [f"{name}: {problem(name)}" for name in (missing if everything else missed)]
        text = "; ".join(reasons) or f"no backend for {device}"
        what = "its reference ops" if everything else f"the reference of {self.name}"
        warnings.warn(f"hypermask_fast runs {what} on {device} ({text})", stacklevel=6)  # who called the op


def declare(backend: str, find_problem: Callable[[], str]) -> None:
    """Makes a backend known; find_problem: why it is not to be had here at all, "" if it is, asked once."""
    _finders[backend] = find_problem


@constant_in_graphs
def problem(backend: str) -> str:
    """Why a backend is not to be had here at all, "" if it is. Found out once."""
    if backend not in _problems:
        _problems[backend] = _finders[backend]()
    return _problems[backend]


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Within the block, and in this thread, ops run on the named backend where it has them, or "auto"."""
    _check_name(backend)
    before = _scope.backend
    _scope.backend = backend
    try:
        yield
    finally:
        _scope.backend = before


def _is_followed() -> bool:
    """Whether a call must be one that PyTorch can look into. (A compiled graph has looked into it already.)"""
    return not torch.compiler.is_compiling() and transforming()


def _check_name(backend: str) -> None:
    if backend not in BACKENDS and backend != AUTO:
        raise InputError(f"backend must be one of auto, {', '.join(BACKENDS)}, not {backend!r}")


def requested(backend: str | None = None) -> str:
    """The backend asked for by argument, scope or environment; "auto" if none is."""
    wanted = backend or _scope.backend or _ENVIRONMENT or AUTO
    if wanted != AUTO:
        _check_name(wanted)
    return wanted


def may_fuse(x: Tensor) -> bool:
    """False where no layer runs fused anyway: on the CPU, unless such a backend is asked for by name."""
    wanted = requested()
    return wanted in FUSED_BACKENDS or (wanted == AUTO and x.device.type != "cpu")


def explain(op: str | Op[..., Any], *args: Any, backend: str | None = None, **kwargs: Any) -> str:
    """Which backend would run `op` with these arguments, and why not the others; one line each.

    >>> print(explain("semi_binary_mask", logits, threshold))

    Raises:
        InputError: no such op, or no tensor among the arguments.
    """
    if isinstance(op, str) and op not in OPS:
        raise InputError(f"there is no op {op!r}; there are {', '.join(sorted(OPS))}")
    entry = OPS[op] if isinstance(op, str) else op
    try:
        values = entry.positional(args, kwargs)
    except TypeError as error:
        raise InputError(f"explain needs the op's arguments, to see their devices and shapes: {error}") from None
    return entry.explain(values, backend)


def served(backend: str) -> list[str]:
    """The ops that a backend offers."""
    return sorted(name for name, op in OPS.items() if backend in op.offers)


def debug() -> bool:
    """HYPERMASK_DEBUG=1: checks of values that lie on a GPU are made too, at the price of waiting for it."""
    return os.environ.get("HYPERMASK_DEBUG", "0") == "1"
