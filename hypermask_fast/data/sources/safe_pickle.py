"""Reading the CIFAR pickles without running what a pickle may ask to run.

A pickle is a program: it names functions and has them called. This reader knows the few names that arrays
need and answers each with a stand-in that only records what it is given; any other name is refused. So
neither foreign code nor numpy's own state-setting code ever sees the file's contents, only `numpy.frombuffer`
of checked bytes.
"""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import InputError


def read_pickle(path: str | Path) -> dict[str, Any]:
    """A pickled dict of builtin containers, numbers, strings and uint8 arrays, by any version of Python.

    Returns:
        the dict with its keys as str; arrays as read-only numpy uint8.

    Raises:
        InputError: the file cannot be read, is damaged or truncated, asks for anything else, or holds no
            dict.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            loaded = _Unpickler(file, encoding="bytes").load()
        if not isinstance(loaded, dict):
            raise _Refused(f"it holds a {type(loaded).__name__}, not a dict")
        return {_text(k): v.array() if isinstance(v, _Array) else v for k, v in loaded.items()}
    except _Refused as error:
        raise InputError(f"{path} is not a CIFAR pickle: {error}") from error
    # A damaged pickle is a damaged program: it can fail in any way at all.
    except Exception as error:
        raise InputError(
            f"{path} cannot be read as a pickle: {type(error).__name__}: {error}".splitlines()[0]
        ) from error


class _Refused(Exception):
    """The file asks for something that arrays in a dict do not need."""


class _Class:
    """Stands for numpy.ndarray where a pickle names it as an argument."""


class _DType:
    """Stands for numpy.dtype: keeps the name it was made from; the state that follows says nothing of
    uint8."""

    def __init__(self, name: Any, *_: Any) -> None:
        self.name = _text(name)

    def __setstate__(self, state: Any) -> None:
        pass


class _Array:
    """Stands for an array: keeps shape, dtype, order and bytes."""

    def __setstate__(self, state: Any) -> None:
        _, self.shape, self.dtype, self.fortran, self.data = state

    def array(self) -> np.ndarray:
        """The uint8 array, read-only."""
        if not isinstance(self.dtype, _DType) or self.dtype.name not in ("u1", "|u1"):
            raise _Refused("it has an array of other than uint8")
        if not all(type(n) is int and n >= 0 for n in self.shape) or math.prod(self.shape) != len(self.data):
            raise _Refused(f"it has an array of shape {self.shape} but {len(self.data)} bytes")
        return np.frombuffer(bytes(self.data), np.uint8).reshape(self.shape, order="F" if self.fortran else "C")


def _reconstruct(*_: Any) -> _Array:
    """numpy's _reconstruct(ndarray, (0,), b"b"): an array whose state follows."""
    return _Array()


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any, *_: Any) -> _Array:
    """numpy's _frombuffer, how pickle protocol 5 writes an array."""
    array = _Array()
    array.__setstate__((1, shape, dtype, _text(order) == "F", data))
    return array


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    """codecs.encode as Python 3 uses it to write bytes in protocols up to 2: Latin-1 and nothing else."""
    if _text(encoding).lower() not in ("latin1", "latin-1") or not isinstance(text, str):
        raise _Refused("it asks for a codec other than latin1")
    return text.encode("latin1")


_STAND_INS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Class,
    ("numpy", "dtype"): _DType,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
    ("numpy._core.numeric", "_frombuffer"): _from_buffer,
    ("_codecs", "encode"): _encode,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _STAND_INS[module, name]
        except KeyError:
            raise _Refused(f"it asks for {module}.{name}, and only uint8 arrays and plain values are allowed") from None


def _text(value: Any) -> str:
    """A str of what Python 2 wrote as bytes."""
    if isinstance(value, bytes):
        return value.decode("latin1")
    if not isinstance(value, str):
        raise _Refused(f"it has a {type(value).__name__} where a name belongs")
    return value
