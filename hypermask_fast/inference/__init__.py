"""Which task is this? Predictions where the task of a sample is unknown."""

from ..packed_model import PackedModel, load_packed
from ..packing import Packed
from .distances import KINDS, SHRINKAGES, FeCAM, Mahalanobis, restored
from .fitting import evaluating
from .predictions import FITTED, METHODS, Prediction, infer, predict

__all__ = [
    "FITTED",
    "KINDS",
    "METHODS",
    "SHRINKAGES",
    "FeCAM",
    "Mahalanobis",
    "Packed",
    "PackedModel",
    "Prediction",
    "evaluating",
    "infer",
    "load_packed",
    "predict",
    "restored",
]
