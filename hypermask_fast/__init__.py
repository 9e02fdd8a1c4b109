"""hypermask_fast: HyperMask (arXiv 2310.00113), continual learning with hypernetwork-made masks, fast."""

from . import functional
from .errors import InputError
from .hypernet import HypernetConfig
from .layers import LayerMask, MaskedConv2d, MaskedLinear
from .layout import MaskLayout
from .masks import TaskMask
from .model import HyperMask

__version__ = "0.1.0"

__all__ = [
    "HyperMask",
    "HypernetConfig",
    "InputError",
    "LayerMask",
    "MaskLayout",
    "MaskedConv2d",
    "MaskedLinear",
    "TaskMask",
    "functional",
]
