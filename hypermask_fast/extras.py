"""Packages that come with an extra of ours, such as `pip install "hypermask-fast[train]"`."""

from collections.abc import Iterator
from contextlib import contextmanager

from .errors import InputError

_DISTRIBUTIONS = {  # where the names differ
    "PIL": "pillow",
    "avalanche": "avalanche-lib",
    "distutils": "setuptools",
    "sklearn": "scikit-learn",
    "tomli_w": "tomli-w",
}


@contextmanager
def needed_for(what: str, extra: str = "train") -> Iterator[None]:
    """For the imports of one purpose: a package that is not installed becomes an InputError, which names the extra.

        with needed_for("drawing pictures"):
            from matplotlib.figure import Figure

    Args:
        what: the purpose, which begins the message.
        extra: the extra of hypermask-fast that the package comes with.

    Raises:
        InputError: such as `drawing pictures needs matplotlib: pip install "hypermask-fast[train]"`.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        name = _DISTRIBUTIONS.get(module, module)
        raise InputError(f'{what} needs {name}: pip install "hypermask-fast[{extra}]"') from error
