"""Kernels run in Triton's interpreter where there is no GPU, on the GPU (bfloat16 too) where there is one."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # comparing.py and offline.py, for the tests

import torch

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    if "triton" in sys.modules:
        raise pytest.UsageError(
            "Triton reads TRITON_INTERPRET at import and is imported already: "
            "run tests/kernels in a process of its own or set TRITON_INTERPRET=1"
        )
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty is filled with NaN, so that an entry nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.backends.cudnn.allow_tf32 = False  # PyTorch's own default is True: float32 convolutions of 11 bits
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.ones(1).new_empty(3).isnan().all()
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(before)
