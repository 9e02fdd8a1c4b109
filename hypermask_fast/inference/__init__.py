"""Which task is this? Predictions where the task of a sample is unknown."""

from .distances import KINDS, FeCAM, Mahalanobis, restored
from .predictions import METHODS, Prediction, infer, predict

__all__ = ["KINDS", "METHODS", "FeCAM", "Mahalanobis", "Prediction", "infer", "predict", "restored"]
