"""Which task is this? Predictions where the task of a sample is unknown."""

from .predictions import Prediction, predict

__all__ = ["Prediction", "predict"]
