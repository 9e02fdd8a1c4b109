"""Checks of arguments that several rooms take, and how their messages show what was found."""

from __future__ import annotations

import textwrap
from numbers import Integral
from typing import Any, TypeGuard

from .errors import InputError

_LONGEST = 100  # characters of a wrong value that a message shows


def is_whole(value: object) -> TypeGuard[int]:
    """Whether it is an integer, Python's or another such as NumPy's; a bool is none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_whole(what: str, value: Any, low: int, high: int | None = None) -> int:
    """The value as an int. Raises InputError unless it is a whole number, low .. high; high None is no upper limit."""
    if not is_whole(value) or value < low or (high is not None and value > high):
        limits = f"{low} or more" if high is None else f"{low} .. {high}"
        raise InputError(f"{what} must be a whole number, {limits}, not {shown(value)}")
    return int(value)


def shown(value: object) -> str:
    """A value in a message: its repr in one line, cut where it is long."""
    try:
        text = " ".join(repr(value).split())
    except (ValueError, RecursionError):  # an integer of thousands of digits, lists in lists in lists
        return f"so large {'a number' if isinstance(value, int) else 'a value'}"
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def one_line(found: object) -> str:
    """What a file holds, or the error that reading it has given, as text for a message: short, printable, one line."""
    text = textwrap.shorten(str(found), 160, placeholder=" ...") or type(found).__name__
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
