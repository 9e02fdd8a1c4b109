"""Fixtures of the op tests: poisoned memory, every instruction set, a fixed seed."""

import pytest
import torch
from support import emulation

from hypermask_fast import ops
from hypermask_fast.ops import registry as backends

ISAS = ("baseline", "avx2", "avx512")


def pytest_collection_modifyitems(items):
    """Tests of the extension are skipped where it is not built, and say why."""
    if backends.NATIVE_PROBLEM:
        for item in items:
            if "native" in item.keywords:
                item.add_marker(pytest.mark.skip(reason=backends.NATIVE_PROBLEM))


def pytest_configure(config):
    config.addinivalue_line("markers", "native: needs the extension")


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty gives NaN, so that an entry that no kernel writes shows; and every test has its own seed."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=range(len(ISAS)), ids=ISAS)
def isa(request):
    """Runs the test with each instruction set that this machine has."""
    before = torch.ops.hypermask_native.cpu_isa(-1)
    try:
        torch.ops.hypermask_native.cpu_isa(request.param)
    except RuntimeError as error:
        pytest.skip(str(error))
    yield ISAS[request.param]
    torch.ops.hypermask_native.cpu_isa(before)


@pytest.fixture
def cpu():
    """The ops with the cpu backend asked for; of what it doesn't have, `test_backends` keeps the list."""
    with backends.use_backend("cpu"):
        yield ops


@pytest.fixture(scope="session")
def emulated():
    """The ops of csrc/cuda, compiled for the CPU."""
    if emulation.PROBLEM:
        pytest.skip(emulation.PROBLEM)
    return emulation.Emulation(emulation.build())


@pytest.fixture(params=[1, -1], ids=["larger", "smaller"])
def instruction_errors(request, emulated):
    """The GPU's approximate instructions are as far off as documented: all towards larger results, or smaller ones."""
    emulated.library.emulation_set_error_direction(request.param)
    yield
    emulated.library.emulation_set_error_direction(1)
