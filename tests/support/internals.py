"""What tests reach into `ops.registry` and `ops.paths` for; no other module of the tests knows their inner names."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from hypermask_fast.ops import paths, registry


def nothing_was_chosen(patch: pytest.MonkeyPatch) -> None:
    """As at the start of a process: who serves a kind of call is found out anew, and not remembered afterwards."""
    patch.setattr(registry, "_choices", {})


def most_choices(patch: pytest.MonkeyPatch, count: int) -> None:
    """So many kinds of calls are remembered."""
    nothing_was_chosen(patch)
    patch.setattr(registry, "_MOST_CHOICES", count)


def missing(patch: pytest.MonkeyPatch, **why: str) -> None:
    """These backends are not to be had, for these reasons; "" makes one available."""
    nothing_was_chosen(patch)
    for backend, problem in why.items():
        patch.setitem(registry._problems, backend, problem)


def automatic(patch: pytest.MonkeyPatch, device: str, *backends: str) -> None:
    """What is tried on a device where nobody asks for a backend."""
    nothing_was_chosen(patch)
    patch.setitem(registry._AUTOMATIC, device, backends)


def nobody_was_warned(patch: pytest.MonkeyPatch) -> None:
    nothing_was_chosen(patch)
    patch.setattr(registry, "_warned", set())


def nobody_is_warned(patch: pytest.MonkeyPatch) -> None:
    """As if everybody had been."""
    patch.setattr(registry, "_warned", {("cpu", ""), ("cuda", "")})


def environment_asks_for(patch: pytest.MonkeyPatch, backend: str) -> None:
    """As HYPERMASK_BACKEND, which is read at import."""
    patch.setattr(registry, "_ENVIRONMENT", backend)


@contextmanager
def stand_in_gpu(patch: pytest.MonkeyPatch, name: str) -> Iterator[None]:
    """`paths` takes CPU tensors for those of a GPU of this name."""
    patch.setattr(paths, "on_gpu", lambda x: True)
    patch.setattr(paths, "gpu_name", lambda device: name)
    forget_paths()
    try:
        yield
    finally:
        forget_paths()


def product_dtype(patch: pytest.MonkeyPatch, name: str) -> None:
    """The dtype of products: meta tensors have no autocast to ask."""
    patch.setattr(paths, "_product_dtype", lambda x: name)


def forget_paths() -> None:
    """Tables are read again and choices made again."""
    paths.tables.cache_clear()
    paths._decide.cache_clear()
