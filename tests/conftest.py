"""Fixtures of all tests, and what must be in the environment before PyTorch and Triton are imported."""

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # where tests ask for deterministic algorithms on a GPU

import torch

# Triton's kernels run in its interpreter where there is no GPU. It reads the variable when it is imported.
if not torch.cuda.is_available() and "TRITON_INTERPRET" not in os.environ:
    if "triton" in sys.modules:
        raise pytest.UsageError("something has imported Triton before the tests: set TRITON_INTERPRET=1")
    os.environ["TRITON_INTERPRET"] = "1"

from support import networks

import hypermask_fast as hmf
from hypermask_fast.ops import registry

torch.set_num_threads(1)  # small tensors, and test processes beside each other
registry.problem("triton")  # found out once in a process: now, before a test takes the variable away for itself

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture
def mnist_dir() -> Path:
    """The real MNIST files, where they lie beside the checkout."""
    folder = SHARED_DATA / "mnist"
    if not folder.is_dir():
        pytest.skip("real MNIST is not beside the checkout")
    return folder


@pytest.fixture
def cifar10_dir() -> Path:
    folder = SHARED_DATA / "cifar10"
    if not folder.is_dir():
        pytest.skip("real CIFAR-10 is not beside the checkout")
    return folder


@pytest.fixture
def convnet_model() -> hmf.HyperMask:
    return networks.convnet_model()


@pytest.fixture
def fresh_compiler():
    """What other tests have compiled doesn't count as a recompilation here, nor what this one compiles there."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
