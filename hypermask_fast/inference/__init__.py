"""Which task is this? Predictions where the task of a sample is unknown."""

from ..packed_model import PackedModel, load_packed
from ..packing import Packed
from .predictions import Prediction, predict

__all__ = ["Packed", "PackedModel", "Prediction", "load_packed", "predict"]
