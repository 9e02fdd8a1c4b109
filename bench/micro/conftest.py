"""One `Timing` for all of a session's benchmarks, and what the results say of the machine."""

import pytest
import torch

from .. import machine
from .timing import DEVICES, Timing


@pytest.fixture(scope="session")
def timing() -> Timing:
    return Timing()


def pytest_benchmark_update_machine_info(config, machine_info) -> None:
    """pytest-benchmark's own facts stay: it compares results by them."""
    for device in DEVICES:
        machine_info[f"hypermask_fast on {device}"] = machine.describe(torch.device(device))
