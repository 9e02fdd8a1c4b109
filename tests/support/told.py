"""What a call is told that is refused."""

from collections.abc import Callable

from hypermask_fast import InputError

NOT_REFUSED = "not refused"


def refusal(call: Callable[[], object]) -> str:
    """Its InputError's line; NOT_REFUSED where there is none."""
    try:
        call()
    except InputError as error:
        assert "\n" not in str(error), error
        return str(error)
    return NOT_REFUSED
