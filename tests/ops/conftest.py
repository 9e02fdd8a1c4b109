"""Fixtures of the op tests: poisoned memory, a fixed seed, every backend."""

from collections.abc import Callable, Iterator

import pytest
import torch
from support import backends, memory

from hypermask_fast import ops
from hypermask_fast.ops import registry


def pytest_configure(config):
    config.addinivalue_line("markers", "native: needs the extension")


def pytest_collection_modifyitems(items):
    """Tests of the extension are skipped where it is not built, and say why."""
    if problem := backends.native_problem():
        for item in items:
            if "native" in item.keywords:
                item.add_marker(pytest.mark.skip(reason=problem))


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN; and every test has its own seed."""
    torch.manual_seed(0)
    with memory.poisoned():
        yield


@pytest.fixture(params=backends.ISAS)
def isa(request) -> Iterator[str]:
    """Runs the test with each instruction set that this machine has."""
    with backends.instruction_set(request.param):
        yield request.param


@pytest.fixture
def cpu() -> Iterator:
    """The ops with the cpu backend asked for; of what it doesn't have, `test_backends` keeps the list."""
    with registry.use_backend("cpu"):
        yield ops


@pytest.fixture
def triton():
    """The Triton kernels, in the interpreter where there is no GPU."""
    if problem := registry.problem("triton"):
        pytest.skip(problem)
    from hypermask_fast import kernels

    return kernels


@pytest.fixture(scope="session")
def emulated():
    """The operators of csrc/cuda, compiled for the CPU."""
    from support import emulation

    if emulation.PROBLEM:
        pytest.skip(emulation.PROBLEM)
    return emulation.Emulation(emulation.build())


@pytest.fixture
def few_rows(emulated):
    """masked_linear and chunk_masked_linear of csrc/cuda for a few rows, run by a CPU."""
    from support.few_rows import FewRows

    return FewRows(emulated)


def _emulated(request) -> Callable:
    return lambda: request.getfixturevalue("emulated")


@pytest.fixture(params=backends.BACKENDS)
def backend(request) -> Iterator[backends.Public | backends.Emulated]:
    """The ops by one backend after another, those of `@on(...)` or all; see `support.backends`."""
    with backends.opened(request.param, _emulated(request)) as found:
        yield found


@pytest.fixture(params=backends.NATIVE)
def operators(request) -> Iterator:
    """The native operators themselves, those of `@operators_of(...)` or all."""
    with backends.opened_operators(request.param, _emulated(request)) as found:
        yield found


@pytest.fixture(params=[1, -1], ids=["larger", "smaller"])
def instruction_errors(request, emulated) -> Iterator[None]:
    """The GPU's approximate instructions are as far off as documented: all towards larger results, or smaller ones."""
    emulated.library.emulation_set_error_direction(request.param)
    yield
    emulated.library.emulation_set_error_direction(1)
