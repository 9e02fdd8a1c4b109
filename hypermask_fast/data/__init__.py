"""Data: splits that hand out batches on a device, transforms of whole batches, scenarios of tasks, file
readers.

`load_scenario` loads one of `SCENARIOS` by name; `from_datasets`, `split_by_class` and `image_folders` make scenarios
of other data.
"""

from .autoaugment import AutoAugment
from .datasets import from_datasets
from .folders import image_folders
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
    "image_folders",
    "load_scenario",
    "split_by_class",
]
