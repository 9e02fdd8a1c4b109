"""The gradient of the hypernetwork's dense output layer, kept as the product that it is.

That gradient, N x H, is G^T H with G (K, N) and H (K, H), where K, the number of tasks, is small: so the two factors
are what a backward pass leaves in `weight.grad`. To everybody else it is a tensor like any other.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import InputError

_CHUNK = 1 << 16  # columns of the factors that are in float64 at a time
_aten = torch.ops.aten
_said: set[str] = set()
# What PyTorch has for tensor subclasses is not public, but documented: "Extending PyTorch", "Wrapper subclasses".
_make_wrapper: Any = Tensor._make_wrapper_subclass  # noqa: SLF001
_without_overrides: Any = torch._C._disabled_torch_function_impl  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]


class Factors(NamedTuple):
    """dW = sum_j scales[j] rows[j] hidden[j]^T. None of the tensors is modified in place once it is in here.

    Attributes:
        rows: (K, N); scales: (K,); hidden: (K, H); of one dtype and on one device.
    """

    rows: Tensor
    scales: Tensor
    hidden: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.shape[1], self.hidden.shape[1]

    def times(self, factor: Tensor | float) -> "Factors":
        return self._replace(scales=self.scales * factor)

    def plus(self, other: "Factors") -> "Factors | Tensor":
        """The sum. Where both have the same hidden vectors, as in accumulation, it has no more rows than either; where
        it would have more rows than W has columns, it is the product itself, which is smaller then."""
        if _same(self.hidden, other.hidden):
            rows = self.scales[:, None] * self.rows
            rows.addcmul_(other.scales[:, None], other.rows)
            return Factors(rows, torch.ones_like(self.scales), self.hidden)
        if len(self.rows) + len(other.rows) > self.hidden.shape[1]:
            return other.added_to(self.product())
        return Factors(*(torch.cat(pair) for pair in zip(self, other, strict=True)))

    def product(self) -> Tensor:
        """dW, (N, H)."""
        return self.rows.t() @ (self.scales[:, None] * self.hidden)

    def added_to(self, tensor: Tensor, alpha: float = 1.0) -> Tensor:
        """tensor += alpha dW, without dW in memory."""
        return tensor.addmm_(self.rows.t(), self.scales[:, None] * self.hidden, alpha=alpha)

    def norm(self) -> Tensor:
        """|dW|_2 = sqrt(trace((G G^T) (H H^T))), summed in float64; a scalar of the factors' dtype."""
        of_rows = self.rows.new_zeros((len(self.rows), len(self.rows)), dtype=torch.float64)
        for part in self.rows.split(_CHUNK, dim=1):
            part = part.double()
            of_rows.addmm_(part, part.t())
        hidden = self.scales.double()[:, None] * self.hidden.double()
        return (of_rows * (hidden @ hidden.t())).sum().clamp(min=0).sqrt().to(self.rows.dtype)

    def bound(self) -> Tensor:
        """At least the largest |dW| entry, and finite only where dW is: a scalar."""
        if 0 in self.rows.shape:
            return self.rows.new_zeros(())
        return (self.scales.abs() * self.rows.abs().amax(1) * self.hidden.abs().amax(1)).sum()


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether both are equal, where that may be found out: not while a CUDA graph is captured."""
    if a.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    return a.shape == b.shape and torch.equal(a, b)


def _wrapper(cls: type, shape: Sequence[int], like: Tensor) -> Any:
    return _make_wrapper(cls, tuple(shape), dtype=like.dtype, device=like.device)


class FactoredGradient(Tensor):
    """An (N, H) gradient that is kept as its factors.

    Sums with other gradients, scaling, the 2-norm, zeroing, a GradScaler's unscaling and check for overflow, and being
    added to a dense tensor are done on the factors, exactly. Any other operation meets the product, an ordinary
    tensor, which is made at that moment, said once, and from then on what the gradient is.

    Attributes:
        factors: its factors; None once it is the product.
    """

    held: "list[Factors | Tensor]"  # one entry, which aliases of the gradient share
    __torch_function__ = _without_overrides

    @staticmethod
    def __new__(cls, held: "list[Factors | Tensor]") -> "FactoredGradient":
        value = held[0]
        like = value.rows if isinstance(value, Factors) else value
        self = _wrapper(cls, value.shape, like)
        self.held = held
        return self

    @classmethod
    def of(cls, factors: Factors) -> "FactoredGradient":
        return cls([factors])

    @property
    def factors(self) -> Factors | None:
        value = self.held[0]
        return value if isinstance(value, Factors) else None

    def dense(self) -> Tensor:
        """The gradient as an ordinary (N, H) tensor, whose changes are the gradient's."""
        value = self.held[0]
        if isinstance(value, Factors):
            value = self.held[0] = value.product()
        return value

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (rule := _RULES.get(func)) is not None:
            result = rule(func, *args, **kwargs)
            if result is not NotImplemented:
                return result
        return _on_products(func, args, kwargs)

    def __repr__(self, **kwargs: Any) -> str:
        value = self.held[0]
        kept = f"{len(value.rows)} pairs of factors" if isinstance(value, Factors) else "as a dense tensor"
        return f"FactoredGradient({tuple(self.shape)}, {self.dtype}, {kept})"

    def __deepcopy__(self, memo: dict) -> "FactoredGradient":
        return self.clone()  # pyright: ignore[reportReturnType]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.dense().__reduce_ex__(protocol)

    def numpy(self, **kwargs: Any) -> Any:
        return self.dense().numpy(**kwargs)


def _on_products(func: Any, args: Any, kwargs: Any) -> Any:
    """func on the products in the gradients' places; what it returns of these stands for the gradient again."""
    of: dict[int, FactoredGradient] = {}

    def product(x: Any) -> Any:
        if not isinstance(x, FactoredGradient):
            return x
        if x.factors is not None:
            _say_once(x, func)
        of[id(x.dense())] = x
        return x.dense()

    result = func(*_each_within(args, product), **_each_within(kwargs, product))
    return _each_within(result, lambda x: of.get(id(x), x))


def _each_within(value: Any, change: Callable[[Any], Any]) -> Any:
    """The value with `change` of everything in its lists, tuples and dictionaries."""
    if isinstance(value, list | tuple):
        return type(value)([_each_within(x, change) for x in value])
    if isinstance(value, dict):
        return {key: _each_within(x, change) for key, x in value.items()}
    return change(value)


def _say_once(gradient: FactoredGradient, func: Any) -> None:
    if "product" in _said:
        return
    _said.add("product")
    size = gradient.numel() * gradient.element_size() / 1e6
    warnings.warn(
        f"the gradient of the hypernetwork's output layer is made in full, {size:.0f} MB, for {func}: the numbers are "
        "the same, a step costs more time and memory",
        stacklevel=4,
    )


# -- what is done on the factors: a rule is given (func, *args), and returns NotImplemented for what is not its own ----


def _detach(func: Any, x: FactoredGradient) -> FactoredGradient:
    return FactoredGradient(x.held)


def _view(func: Any, x: FactoredGradient, size: Sequence[int]) -> Any:
    """Of the same shape, as a DTensor makes of its local part; any other is the product's."""
    return FactoredGradient(x.held) if tuple(size) == tuple(x.shape) else NotImplemented


def _clone(func: Any, x: FactoredGradient, **kwargs: Any) -> FactoredGradient:
    value = x.held[0]
    return FactoredGradient([value if isinstance(value, Factors) else value.clone()])


def _nothing(x: FactoredGradient) -> Factors:
    """The factors of a zero gradient."""
    rows, width = x.shape
    like: dict[str, Any] = {"dtype": x.dtype, "device": x.device}
    return Factors(*(torch.zeros(shape, **like) for shape in ((0, rows), (0,), (0, width))))


def _new_empty_strided(func: Any, x: FactoredGradient, size: Sequence[int], *rest: Any, **kwargs: Any) -> Any:
    """What autograd makes to copy a gradient into: to be a factored one again."""
    return FactoredGradient.of(_nothing(x)) if tuple(size) == tuple(x.shape) else _like(func, x, size, *rest, **kwargs)


def _like(func: Any, x: FactoredGradient, *args: Any, **kwargs: Any) -> Tensor:
    """A new tensor, of which x gives no more than the shape, dtype and device."""
    return func(torch.empty((), dtype=x.dtype, device=x.device).expand(x.shape), *args, **kwargs)


def _zero(func: Any, x: FactoredGradient) -> FactoredGradient:
    x.held[0] = _nothing(x)
    return x


def _fits(tensor: Any, x: FactoredGradient) -> bool:
    """Whether it is an ordinary tensor like x."""
    plain = isinstance(tensor, Tensor) and not isinstance(tensor, FactoredGradient)
    return plain and tensor.shape == x.shape and tensor.dtype == x.dtype and tensor.device == x.device


def _copy(func: Any, to: Tensor, x: Tensor, non_blocking: bool = False) -> Any:
    if isinstance(to, FactoredGradient):
        if isinstance(x, FactoredGradient) and x.shape == to.shape and x.dtype == to.dtype and x.device == to.device:
            value = x.held[0]
            to.held[0] = value if isinstance(value, Factors) else value.clone()
        elif not isinstance(x, FactoredGradient):
            to.held[0] = torch.empty(to.shape, dtype=to.dtype, device=to.device).copy_(x)
        else:
            return NotImplemented
        return to
    if isinstance(x, FactoredGradient) and x.factors is not None and _fits(to, x):
        return x.factors.added_to(to.zero_())
    return NotImplemented


def _add(func: Any, a: Any, b: Any, *, alpha: float = 1.0) -> Any:
    """a + alpha b, in place or not."""
    in_place = func in _IN_PLACE
    if func in _SUBTRACTIONS:
        alpha = -alpha
    if isinstance(a, FactoredGradient) and isinstance(b, FactoredGradient):
        if a.factors is None or b.factors is None or a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
            return NotImplemented
        total = a.factors.plus(b.factors if alpha == 1 else b.factors.times(alpha))
    elif isinstance(a, FactoredGradient):
        if a.factors is None or not _fits(b, a):
            return NotImplemented
        total = a.factors.added_to(b * alpha)
    elif b.factors is not None and _fits(a, b):
        return b.factors.added_to(a if in_place else a.clone(), alpha)
    else:
        return NotImplemented
    if not in_place:
        return FactoredGradient([total])
    a.held[0] = total
    return a


def _scale(func: Any, a: Any, b: Any) -> Any:
    """Times or divided by one number, in place or not."""
    divides = func in _DIVISIONS
    if not isinstance(a, FactoredGradient) and not divides and func not in _IN_PLACE:
        a, b = b, a
    if not isinstance(a, FactoredGradient) or a.factors is None:
        return NotImplemented
    if isinstance(b, Tensor):
        if isinstance(b, FactoredGradient) or b.dim() > 0 or b.is_complex():
            return NotImplemented
        b = b.to(a.factors.scales)
    elif not isinstance(b, int | float):
        return NotImplemented
    scaled = a.factors._replace(scales=a.factors.scales / b if divides else a.factors.scales * b)
    if func not in _IN_PLACE:
        return FactoredGradient.of(scaled)
    a.held[0] = scaled
    return a


def _neg(func: Any, x: FactoredGradient) -> Any:
    return NotImplemented if x.factors is None else FactoredGradient.of(x.factors.times(-1.0))


def _norm(
    func: Any,
    x: FactoredGradient,
    ord: float = 2,
    dim: Any = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Any:
    if x.factors is None or ord != 2 or dim is not None or keepdim:
        return NotImplemented
    return x.factors.norm().to(dtype or x.dtype)


def _unscale(func: Any, gradients: list[Tensor], found_inf: Tensor, inverse: Tensor) -> None:
    """A GradScaler's: found_inf = 1 where a gradient is not finite, then all of them times inverse."""
    factored = [x for x in gradients if isinstance(x, FactoredGradient)]
    others = [x for x in gradients if not isinstance(x, FactoredGradient)]
    for x in factored:
        if x.factors is None:
            others.append(x.dense())
        else:
            found_inf.logical_or_(~x.factors.bound().isfinite())
            x.mul_(inverse.reshape(()))
    if others:
        func(others, found_inf, inverse)


def _each(single: Callable[..., Any]) -> Callable[..., Any]:
    """The rule of a function of many tensors that is `single` of each."""

    def rule(func: Any, tensors: list[Tensor], *args: Any, **kwargs: Any) -> list[Any] | None:
        results = [single(x, *args, **kwargs) for x in tensors]
        return None if func in _IN_PLACE else results

    return rule


def _overload(name: str, overload: str) -> Any:
    return getattr(getattr(_aten, name), overload)


def _overloads(name: str) -> list[Any]:
    return [_overload(name, overload) for overload in getattr(_aten, name).overloads()]


_foreach_zero = _overload("_foreach_zero_", "default")
_foreach_mul = _overload("_foreach_mul_", "Scalar"), _overload("_foreach_mul_", "Tensor")

_IN_PLACE = {
    *(_aten.add_.Tensor, _aten.sub_.Tensor, _aten.mul_.Tensor, _aten.div_.Tensor, _aten.mul_.Scalar, _aten.div_.Scalar),
    *(_foreach_zero, *_foreach_mul),
}
_SUBTRACTIONS = {_aten.sub.Tensor, _aten.sub_.Tensor}
_DIVISIONS = {_aten.div.Tensor, _aten.div_.Tensor, _aten.div.Scalar, _aten.div_.Scalar}
_LIKE = [f for name in ("empty_like", "zeros_like", "ones_like", "full_like", "new_empty", "new_zeros", "new_ones",
                        "new_full", "rand_like", "randn_like") for f in _overloads(name)]  # fmt: skip
_RULES: dict[Any, Callable[..., Any]] = {
    _aten.detach.default: _detach,
    _aten.alias.default: _detach,
    _aten.view.default: _view,
    _aten.clone.default: _clone,
    _aten.new_empty_strided.default: _new_empty_strided,
    _aten.zero_.default: _zero,
    _aten.copy_.default: _copy,
    **dict.fromkeys((_aten.add.Tensor, _aten.add_.Tensor, *_SUBTRACTIONS), _add),
    **dict.fromkeys((_aten.mul.Tensor, _aten.mul_.Tensor, _aten.mul.Scalar, _aten.mul_.Scalar, *_DIVISIONS), _scale),
    _aten.neg.default: _neg,
    _aten.linalg_vector_norm.default: _norm,
    _overload("_amp_foreach_non_finite_check_and_unscale_", "default"): _unscale,
    _foreach_zero: _each(Tensor.zero_),
    **dict.fromkeys(_foreach_mul, _each(Tensor.mul_)),
    _overload("_foreach_norm", "Scalar"): _each(torch.linalg.vector_norm),
    **dict.fromkeys(_LIKE, _like),
}


class SteppedGradient(Tensor):
    """In the place of a gradient that backward has stepped already: whoever asks it for a number is told."""

    __torch_function__ = _without_overrides

    @staticmethod
    def __new__(cls, weight: Tensor) -> "SteppedGradient":
        return _wrapper(cls, weight.shape, weight)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (_aten.detach.default, _aten.clone.default, _aten.new_empty_strided.default):  # autograd's own
            return SteppedGradient(args[0])
        if func is _aten.view.default and tuple(args[1]) == tuple(args[0].shape):  # a DTensor's
            return SteppedGradient(args[0])
        if func is _aten.copy_.default and all(isinstance(x, SteppedGradient) for x in args[:2]):
            return args[0]
        raise InputError(
            f"{func}: the output layer's gradient is gone, backward has stepped the layer already: what comes between "
            "backward() and step() needs an hmf.optim.Adam without step_in_backward"
        )

    def __repr__(self, **kwargs: Any) -> str:
        return f"SteppedGradient({tuple(self.shape)})"

    def __deepcopy__(self, memo: dict) -> "SteppedGradient":
        return SteppedGradient(self)
