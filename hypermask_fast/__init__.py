"""hypermask_fast: HyperMask (arXiv 2310.00113), continual learning with hypernetwork-made masks, fast."""

from pathlib import Path

from . import data, optim
from . import ops as functional
from .backends import explain, use_backend
from .errors import InputError
from .hypernet import HypernetConfig
from .inference import Prediction, predict
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
    "Prediction",
    "TaskMask",
    "data",
    "explain",
    "functional",
    "optim",
    "predict",
    "use_backend",
]

_root = Path(__file__).parent
if not (_root / "kernels").is_dir() and (_root.parent / "kernels" / "masked_linear.py").is_file():
    # A bare checkout or an editable install: kernels/ lies beside this package; an installed copy has it inside.
    __path__.append(str(_root.parent))
