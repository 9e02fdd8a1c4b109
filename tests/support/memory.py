"""Uninitialised memory that shows."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def poisoned() -> Iterator[None]:
    """Within, torch.empty gives NaN, so that an entry that no kernel writes shows; algorithms are deterministic, and
    float32 convolutions are not of TF32, PyTorch's own default."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    fill, tf32 = torch.utils.deterministic.fill_uninitialized_memory, torch.backends.cudnn.allow_tf32
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.backends.cudnn.allow_tf32 = False
    assert torch.ones(1).new_empty(3).isnan().all()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.backends.cudnn.allow_tf32 = tf32
