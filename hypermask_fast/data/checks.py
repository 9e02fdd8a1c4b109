"""Checks of arguments that several functions take."""

from __future__ import annotations

from ..errors import InputError


def check_whole(what: str, value: object, low: int, high: int | None = None) -> None:
    """Raises InputError unless value is an int (bool is not), low .. high; high None is no upper limit."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        limits = f"{low} or more" if high is None else f"{low} .. {high}"
        raise InputError(f"{what} must be a whole number, {limits}, not {value!r}")
