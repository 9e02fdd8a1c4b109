"""Reading the CIFAR pickles without running what a pickle may ask to run.

A pickle is a program: it names functions and has them called. As "Restricting Globals" in the documentation of
`pickle` shows, this reader knows only the few names that an array of bytes needs. What stands for them here makes
arrays of uint8 and nothing else: numpy's own functions would make any array, those of pointers among them.
"""

import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from ...checks import one_line
from ...errors import InputError


def read_pickle(path: str | Path) -> dict[str, Any]:
    """A pickled dict of builtin containers, numbers, strings and uint8 arrays, by any version of Python.

    Returns:
        the dict with its keys as str; arrays as numpy uint8.

    Raises:
        InputError: the file cannot be read, is damaged or truncated, asks for anything else, or holds no
            dict.
    """
    try:
        with open(path, "rb") as file:
            loaded = _Unpickler(file, encoding="bytes").load()
        if not isinstance(loaded, dict):
            raise _Refused(f"it holds a {type(loaded).__name__}, not a dict")
        return {_text(key): value for key, value in loaded.items()}
    except _Refused as error:
        raise InputError(f"{path} is not a CIFAR pickle: {one_line(error)}") from error
    # A damaged pickle is a damaged program: it can fail in any way at all.
    except Exception as error:
        reason = one_line(f"{type(error).__name__}: {error}")
        raise InputError(f"{path} cannot be read as a pickle: {reason}") from error


class _Refused(Exception):
    """The file asks for something that arrays in a dict do not need."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        key = f"{module}.{name}".replace("numpy._core", "numpy.core")
        if key not in _GLOBALS:
            raise _Refused(f"it asks for {module}.{name}, and only uint8 arrays and plain values are allowed")
        return _GLOBALS[key]


class _Array(np.ndarray):
    def __setstate__(self, state: Any) -> None:
        _, shape, _, _, data = state
        if math.prod(shape) != len(data):
            raise _Refused(f"it has an array of shape {shape} but {len(data)} bytes")
        super().__setstate__(state)


def _reconstruct(*_: Any) -> _Array:
    """numpy's _reconstruct(ndarray, (0,), b"b"): an array whose state follows."""
    return _Array(0, np.uint8)


def _frombuffer(data: Any, _: Any, shape: Any, order: Any) -> np.ndarray:
    """How pickle protocol 5 writes an array."""
    return np.frombuffer(data, np.uint8).reshape(shape, order=order)


def _dtype(name: Any, *_: Any) -> np.dtype:
    """numpy.dtype, whose own takes names of types that hold pointers."""
    if _text(name) not in ("u1", "|u1"):
        raise _Refused("it has an array of other than uint8")
    return np.dtype(np.uint8)


def _encode(text: str, encoding: Any = "latin1") -> bytes:
    """codecs.encode as Python 3 uses it to write bytes in protocols up to 2: Latin-1 and nothing else."""
    if _text(encoding).lower() not in ("latin1", "latin-1"):
        raise _Refused("it asks for a codec other than latin1")
    return text.encode("latin1")


def _text(value: Any) -> str:
    """A str of what Python 2 wrote as bytes."""
    if isinstance(value, bytes):
        return value.decode("latin1")
    if not isinstance(value, str):
        raise _Refused(f"it has a {type(value).__name__} where a name belongs")
    return value


_GLOBALS: dict[str, Any] = {
    "numpy.ndarray": None,  # an argument of _reconstruct
    "numpy.dtype": _dtype,
    "numpy.core.multiarray._reconstruct": _reconstruct,
    "numpy.core.numeric._frombuffer": _frombuffer,
    "_codecs.encode": _encode,
}
