"""One `Timing` for all of a session's benchmarks, and what the results say of the machine."""

import pytest
import torch

from .. import machine
from .timing import DEVICES, Timing


@pytest.fixture(scope="session")
def timing() -> Timing:
    return Timing()


def pytest_benchmark_update_machine_info(config, machine_info) -> None:
    """Adds the devices. pytest-benchmark warns where these facts differ between compared results, so no commit here."""
    for device in DEVICES:
        about = machine.describe(torch.device(device))
        del about["commit"]
        machine_info[f"hypermask_fast on {device}"] = about
