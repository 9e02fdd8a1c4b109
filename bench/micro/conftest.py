"""One `Timing` for all of a session's benchmarks, and what the results say of the machine."""

import os

import pytest
import torch

from .. import machine
from .timing import DEVICES, Timing

LOAD = os.getloadavg()[0]  # before this run adds its own


@pytest.fixture(scope="session")
def timing() -> Timing:
    return Timing()


def pytest_benchmark_update_machine_info(config, machine_info) -> None:
    """Adds the devices. pytest-benchmark warns where these facts differ between compared results, so no commit here."""
    for device in DEVICES:
        about = machine.describe(torch.device(device))
        del about["commit"]
        machine_info[f"hypermask_fast on {device}"] = about


def pytest_benchmark_update_json(config, benchmarks, output_json) -> None:
    """How busy the machine was: what was measured beside other work says little."""
    output_json["load_average_before"] = LOAD
