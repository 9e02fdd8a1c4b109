"""Data and a network of your own for the command line: no script to run, two functions that `train` is told of.

    hypermask-fast train split-digits --scenario examples/own_data_and_network.py:tasks \
        --network examples/own_data_and_network.py:network --out runs/mine

The preset gives all other settings. docs/your-own.md says what the functions get and what they return.
"""

import torch
from torch import nn

from hypermask_fast.data import Scenario, TaskData, TensorSplit

FEATURES = 8


def tasks() -> Scenario:
    """Three tasks: is feature t larger than the next one? PyTorch's generator has the run's seed."""

    def split(task: int, samples: int) -> TensorSplit:
        x = torch.randn(samples, FEATURES)
        return TensorSplit(x, (x[:, task] > x[:, task + 1]).long())

    made = [
        TaskData(f"feature {t}", split(t, 500), split(t, 100), split(t, 200), ("smaller", "larger")) for t in range(3)
    ]
    return Scenario("features", tuple(made), input_shape=(FEATURES,), num_classes=2)


def network(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """A small network with layer norm, for inputs of one dimension."""
    return nn.Sequential(nn.Linear(*input_shape, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, num_classes))
