"""Data: splits that hand out batches on a device, transforms of whole batches, scenarios of tasks, file
readers.

`load_scenario` loads one of `SCENARIOS` by name; `from_datasets` and `split_by_class` make scenarios of other
data.
"""

from .autoaugment import AutoAugment
from .datasets import from_datasets
from .registry import SCENARIOS, ScenarioInfo, load_scenario
from .scenario import Scenario, TaskData, split_by_class
from .splits import DatasetSplit, Split, TensorSplit
from .transforms import (
    BrightnessJitter,
    Compose,
    HorizontalFlip,
    Normalize,
    PadCrop,
    PermutePixels,
    Scale,
    Transform,
)

__all__ = [
    "SCENARIOS",
    "AutoAugment",
    "BrightnessJitter",
    "Compose",
    "DatasetSplit",
    "HorizontalFlip",
    "Normalize",
    "PadCrop",
    "PermutePixels",
    "Scale",
    "Scenario",
    "ScenarioInfo",
    "Split",
    "TaskData",
    "TensorSplit",
    "Transform",
    "from_datasets",
    "load_scenario",
    "split_by_class",
]
