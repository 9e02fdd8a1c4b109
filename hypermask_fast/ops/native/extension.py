"""Loads the library of the extension, or tells why it can't serve."""

import json
import struct
from importlib import util
from pathlib import Path

import torch

from .schemas import SCHEMAS

PACKAGE = Path(__file__).parents[2]
BUILD = "build it again by pip install --no-build-isolation ."


def recorded(part: str) -> str:
    """What setup.py noted about a part that it left out; "" where it noted nothing that can be read."""
    try:
        record = json.loads((PACKAGE / "_build.json").read_text())
    except (OSError, ValueError):
        return ""
    return str(record.get(part, "")) if isinstance(record, dict) else ""


def load() -> str:
    """Loads the extension; "" or why it is not there, which is told where an op of it would serve."""
    spec = util.find_spec("hypermask_fast._native")
    if spec is None or spec.origin is None:
        return recorded("native") or "the extension is not built: pip install --no-build-isolation ."
    return _problem(Path(spec.origin))


def _problem(library: Path) -> str:
    try:
        if not _is_whole(library):
            return f"{library} is no whole library: {BUILD}"
        torch.ops.load_library(library)
    except (OSError, RuntimeError) as error:  # of another PyTorch, of another processor, not readable, ...
        reason = next(iter(str(error.__cause__ or error).splitlines()), type(error).__name__).removeprefix(
            f"{library}: "
        )
        return f"{library} does not load ({reason}); {BUILD}"
    other = _other_operator()
    return f"{library} was built from other sources than these ({other}); {BUILD}" if other else ""


def _is_whole(library: Path) -> bool:
    """Whether the file reaches to its ELF section headers, which come last. To load one that was cut off, where a build
    or a copy was interrupted, would end the process."""
    with library.open("rb") as file:
        header = file.read(64)
    if len(header) < 64 or header[:5] != b"\x7fELF\x02":
        return False
    (begin,) = struct.unpack_from("<Q", header, 40)
    size, count = struct.unpack_from("<HH", header, 58)
    return library.stat().st_size >= begin + size * count


def _other_operator() -> str:
    """The first operator that the loaded library lacks or declares otherwise, in words; "" where all are as meant."""
    for schema in SCHEMAS:
        expected = torch._C.parse_schema(f"hypermask_native::{schema}")  # pyright: ignore[reportPrivateUsage]
        packet = getattr(torch.ops.hypermask_native, expected.name.partition("::")[2], None)
        if packet is None:
            return f"it has no {expected.name}"
        if str(packet.default._schema) != str(expected):  # noqa: SLF001  # no public way
            return f"{expected.name} takes or returns something else there"
    return ""
