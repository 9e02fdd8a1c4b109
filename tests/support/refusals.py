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


def assert_refused(op: str, asked: str | None, change: dict[str, object], message: str) -> None:
    """The valid arguments with this change raise InputError with just this message."""
    given = valid(op, DEVICE)
    for name, value in change.items():
        given[name] = value if isinstance(value, Tensor) and value.is_meta else on_device(value, DEVICE)
    with pytest.raises(InputError) as caught:
        getattr(ops, op)(**given, backend=asked)
    assert str(caught.value) == message
