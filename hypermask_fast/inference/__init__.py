"""Which task is this? Predictions where the task of a sample is unknown."""

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
    "Prediction",
    "evaluating",
    "infer",
    "predict",
    "restored",
]
