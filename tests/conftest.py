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

# Files that take longest, longest first: a worker takes a file at a time (`make test`), and none should be left with
# one of these when the others are done.
LONGEST = (
    "test_program.py", "offline/test_offline.py", "training/test_sharded_checkpoint.py", "training/test_real_data.py",
    "test_loops.py", "training/test_resume.py", "ops/test_factored_step.py", "bench/test_command.py",
    "building/test_cuda_compile.py", "distributed/test_shards.py", "test_several.py", "docs/test_pages.py",
    "ops/test_layer_ops.py", "bench/test_contenders.py", "ops/test_backends.py", "building/test_setup.py",
    "distributed/test_faults.py", "test_threads.py", "test_processors.py", "examples/test_examples.py",
    "ops/test_compile.py", "masking/test_task_batch.py", "masking/test_fused_layers.py", "bench/test_gpu_script.py",
    "training/test_settings_sweep.py", "training/test_lock.py", "training/test_forged_checkpoints.py",
    "distributed/test_command_line.py", "docs/test_several_and_own.py", "building/test_extension.py",
    "training/test_world.py", "distributed/test_reducer.py", "distributed/test_shards_life.py",
    "training/test_divergence.py", "training/test_report.py", "training/test_interrupt.py", "test_exporting.py",
    "data/test_data_damaged.py", "bench/test_micro.py", "bench/test_bench.py", "integrations/test_mammoth.py",
    "distributed/test_batch_norm.py", "ops/test_masked_linear.py",
)  # fmt: skip
SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


def pytest_collection_modifyitems(items):
    place = {Path(__file__).parent / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))  # which keeps the others as they are


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
