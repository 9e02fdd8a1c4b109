"""What masks look like: `inspect` measures, `record` keeps a task as it was learned, `write` makes files of it."""

from .inspection import Inspection, Masks
from .learned import Drift, Learned, MaskDrift, fingerprint, record
from .masks import inspect
from .pictures import figures, write

__all__ = [
    "Drift",
    "Inspection",
    "Learned",
    "MaskDrift",
    "Masks",
    "figures",
    "fingerprint",
    "inspect",
    "record",
    "write",
]
