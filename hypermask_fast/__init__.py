"""hypermask_fast: HyperMask (arXiv 2310.00113), continual learning with hypernetwork-made masks, fast."""

from . import startup  # noqa: F401  before all that takes time

# isort: split
from . import analysis, data, distributed, inference, optim
from . import ops as functional
from .errors import InputError
from .hypernet import HypernetConfig
from .inference import Prediction, predict
from .masking.layers import LayerMask, MaskedConv2d, MaskedLinear
from .masking.layout import MaskLayout
from .masking.masks import TaskMask
from .model import HyperMask
from .ops import explain, use_backend

__version__ = "0.1.0"

__all__ = [
    "HyperMask",
    "HypernetConfig",
    "InputError",
    "LayerMask",
    "MaskLayout",
    "MaskedConv2d",
    "MaskedLinear",
    "Prediction",
    "TaskMask",
    "analysis",
    "data",
    "distributed",
    "explain",
    "functional",
    "inference",
    "optim",
    "predict",
    "use_backend",
]
