"""Settings: fields of dataclasses whose types and limits are annotated at the field, and meant as the docstring says.

    @dataclass(frozen=True)
    class HypernetConfig:
        '''Shape of a hypernetwork.

        Attributes:
            embedding: size E of a task's embedding.
        '''

        embedding: Annotated[int, Range(1, WIDEST)] = 48

What is checked and what `hypermask-fast settings` shows both come from there.
"""

import functools
import inspect
import re
import types
import typing
from dataclasses import MISSING, Field, dataclass, fields
from math import inf, isfinite
from numbers import Real
from typing import Any

from .checks import shown
from .errors import InputError

LARGEST = 2**63 - 1  # of TOML's integers and PyTorch's
WIDEST = 10**7  # units of a layer: two such layers have fewer weights than an int64 counts
DEEPEST = 100  # layers


@dataclass(frozen=True)
class Range:
    """A number from low to high, or above low and up to high; finite. unit: what it counts or measures."""

    low: float
    high: float = inf
    above: bool = False
    unit: str = ""


@dataclass(frozen=True)
class OneOf:
    """One of these words."""

    words: tuple[str, ...]


@dataclass(frozen=True)
class Widths:
    """Widths of layers, each 1 .. WIDEST; `least` to DEEPEST of them. unit: what a width counts."""

    least: int = 0
    unit: str = "units"


@dataclass(frozen=True)
class Text:
    """Printable characters, of a path any but NUL; `longest` of them at most."""

    longest: int = 1000
    path: bool = False


@dataclass(frozen=True)
class Kind:
    """What a field may be: a type, perhaps None too, and limits."""

    type: Any
    optional: bool
    limits: Any

    @property
    def unit(self) -> str:
        return getattr(self.limits, "unit", "")

    @property
    def text(self) -> str:
        """In words, such as "a whole number, 1 or more"."""
        limits = self.limits
        match limits:
            case OneOf(words):
                return f"{', '.join(words[:-1])} or {words[-1]}"
            case Widths(least):
                return f"a list of {'one or more ' if least else ''}positive widths"
            case Range() if self.type is int:
                return "a whole number, " + (f"{limits.low} or more" if limits.high == inf else _between(limits))
            case Range(0, above=True):
                return "a positive number"
            case Range(high=high) if high == inf:
                return f"a number, {limits.low:g} or more"
            case Range(unit="percent"):
                return f"a percentage from {limits.low:g} to {limits.high:g}"
        return {str: "text", bool: "true or false", float: "a finite number"}.get(self.type, "a list")

    def check(self, what: str, value: object) -> None:
        """Raises InputError unless `value` is of this kind; `what` names it."""
        if value is None and self.optional:
            return
        if isinstance(self.limits, Widths):
            _check_widths(what, value, self.limits)
        elif isinstance(self.limits, Text):
            _check_text(what, value, self.limits)
        elif not self._holds(value):
            raise InputError(f"{what} must be {self.text}, not {shown(value)}")
        elif self.type is int and isinstance(value, int) and value > LARGEST:
            raise InputError(f"{what} must be at most {LARGEST}, not {shown(value)}")

    def _holds(self, value: Any) -> bool:
        match self.limits:
            case OneOf(words):
                return isinstance(value, str) and value in words
            case Range(low, high, above):
                inside = _is_number(value, self.type) and (value > low if above else value >= low) and value <= high
                return inside and (self.type is int or _finite(value))
        return isinstance(value, self.type)


def _is_number(value: Any, kind: type) -> bool:
    return isinstance(value, kind if kind is int else Real) and not isinstance(value, bool)


@functools.cache
def kinds(owner: type) -> dict[str, Kind]:
    """Of each field of a dataclass that is no dataclass itself."""
    found = {}
    for name, hint in typing.get_type_hints(owner, include_extras=True).items():
        limits = None
        if typing.get_origin(hint) is typing.Annotated:
            hint, limits = typing.get_args(hint)
        options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        (kind,) = (option for option in options if option is not types.NoneType)
        if not (isinstance(kind, type) and hasattr(kind, "__dataclass_fields__")):
            found[name] = Kind(typing.get_origin(kind) or kind, types.NoneType in options, limits)
    return found


def check_fields(owner: Any, table: str = "") -> None:
    """Checks every field of a dataclass's instance; its messages call them "table.field".

    Raises:
        InputError: a value of another type, or outside of its limits.
    """
    for name, kind in kinds(type(owner)).items():
        kind.check(f"{table}.{name}" if table else name, getattr(owner, name))


@functools.cache
def meanings(owner: type) -> dict[str, str]:
    """What a dataclass's docstring says of each field below "Attributes:"; one line each.

    Entries begin "name:", or "name, name:" where several share one.
    """
    _, _, section = inspect.cleandoc(owner.__doc__ or "").partition("Attributes:\n")
    entries = re.split(r"^    (?=\w[\w, ]*:)", section.split("\n\n")[0], flags=re.M)
    found = {}
    for entry in entries:
        names, _, text = entry.partition(":")
        found |= dict.fromkeys(re.split(r",\s*", names.strip()), " ".join(text.split()))
    return {name: found[name] for name in (field.name for field in fields(owner)) if name in found}


def default(field: Field) -> Any:
    """A field's default; dataclasses.MISSING where it has none."""
    return field.default if field.default_factory is MISSING else field.default_factory()


def _between(limits: Range) -> str:
    return f"{limits.low} .. {limits.high}"


def _finite(value: Any) -> bool:
    try:
        return isfinite(value)
    except OverflowError:  # a whole number beyond any float
        return False


def _check_widths(what: str, value: Any, limits: Widths) -> None:
    whole = isinstance(value, (tuple, list)) and all(type(width) is int for width in value)
    if not whole or len(value) < limits.least or any(width < 1 for width in value):
        listed = "one or more " if limits.least else ""
        raise InputError(f"{what} must list {listed}positive widths, not {shown(_as_list(value))}")
    if len(value) > DEEPEST:
        raise InputError(f"{what} must list at most {DEEPEST} widths, not {len(value)}")
    if any(width > WIDEST for width in value):
        raise InputError(f"{what} must list widths up to {WIDEST}, not {shown(_as_list(value))}")


def _as_list(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _check_text(what: str, value: object, limits: Text) -> None:
    if not isinstance(value, str):
        raise InputError(f"{what} must be text, not {shown(value)}")
    try:
        value.encode()  # config.toml is UTF-8; bytes of a command line may be no text
    except UnicodeEncodeError as error:
        raise InputError(f"setting {what!r} must be text in UTF-8, not {shown(value)}") from error
    if "\0" in value if limits.path else not value.isprintable():
        wrong = "hold no NUL" if limits.path else "be one line of printable text"
        raise InputError(f"{what} must {wrong}, not {shown(value)}")
    if len(value) > limits.longest:
        raise InputError(f"{what} must have at most {limits.longest} characters, not {len(value)}")
