"""Drawing with matplotlib, which is imported by who draws and not before."""

import io
import os
import sys
import textwrap
from contextlib import suppress
from typing import TYPE_CHECKING

from .extras import needed_for

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def figure_class() -> "type[Figure]":
    """matplotlib's Figure, used without pyplot, so that nothing global changes. InputError: matplotlib is missing.

    matplotlib can't be imported while MPLBACKEND names a backend that is not installed, as a notebook's shell has it,
    although a Figure needs no backend. So it is imported without, and told of MPLBACKEND afterwards.
    """
    backend = None if "matplotlib" in sys.modules else os.environ.pop("MPLBACKEND", None)
    try:
        with needed_for("drawing pictures"):
            import matplotlib
            from matplotlib.figure import Figure
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    if backend:
        with suppress(ValueError):  # not installed
            matplotlib.rcParams["backend"] = backend
    return Figure


def png(figure: "Figure") -> bytes:
    """The picture's file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    content = io.BytesIO()
    FigureCanvasAgg(figure).print_png(content)
    return content.getvalue()


def wrapped(text: str, characters: int) -> list[str]:
    """Its lines, none longer; no formulas."""
    lines = [part for line in text.split("\n") for part in textwrap.wrap(line, characters)]
    return [line.replace("$", r"\$") for line in lines]
