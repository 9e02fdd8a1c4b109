"""Triton's kernel language is no Python that a type checker can judge: kernels, and what is called in them, are Any.

So the host code around them is checked as any other code, and no rule is turned off.
"""

from typing import Any

from . import language as language

knobs: Any

class OutOfResources(Exception):
    required: int
    limit: int
    name: str

def jit(function: Any = None, **settings: Any) -> Any: ...
