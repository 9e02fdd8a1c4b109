"""What no backend takes is refused by all of them, and before a backend is chosen, in the same words."""

import pytest
from torch import Tensor

from hypermask_fast import InputError, ops
from support.arguments import on_device, valid
from support.comparing import DEVICE

# Nobody, and every name that can be asked for, also of what is not to be had here.
ASKED = (None, "reference", "plain", "cpu", "triton", "cuda")
whoever_is_asked = pytest.mark.parametrize("asked", ASKED)


def each_change(*cases: tuple[dict[str, object], str]) -> pytest.MarkDecorator:
    """Runs a test that takes `change` and `message` with these, named by what is changed."""
    return pytest.mark.parametrize(("change", "message"), cases, ids=["-".join(change) for change, _ in cases])


def changed(op: str, change: dict[str, object]) -> dict[str, object]:
    """The op's valid arguments with this change, where Triton runs."""
    moved = {n: v if isinstance(v, Tensor) and v.is_meta else on_device(v, DEVICE) for n, v in change.items()}
    return valid(op, DEVICE) | moved


def assert_refused(op: str, asked: str | None, change: dict[str, object], message: str) -> None:
    """The valid arguments with this change raise InputError with just this message."""
    with pytest.raises(InputError) as caught:
        getattr(ops, op)(**changed(op, change), backend=asked)
    assert str(caught.value) == message


def assert_kernel_refuses(triton, op: str, change: dict[str, object], message: str) -> None:
    """So does Triton's kernel, called without the op around it."""
    with pytest.raises(InputError) as caught:
        getattr(triton, op)(**changed(op, change))
    assert str(caught.value) == message
