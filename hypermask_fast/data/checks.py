"""Checks of arguments that several functions take, and how their messages show what was found."""

from __future__ import annotations

import textwrap

from ..errors import InputError


def check_whole(what: str, value: object, low: int, high: int | None = None) -> None:
    """Raises InputError unless value is an int (bool is not), low .. high; high None is no upper limit."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        limits = f"{low} or more" if high is None else f"{low} .. {high}"
        raise InputError(f"{what} must be a whole number, {limits}, not {value!r}")


def one_line(found: object) -> str:
    """What a file holds, or the error that reading it has given, as text for a message: short, printable, one line."""
    text = textwrap.shorten(str(found), 160, placeholder=" ...") or type(found).__name__
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
