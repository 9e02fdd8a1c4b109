"""A plugin of pytest, `-p bench.gpu_first`: what runs CUDA's kernels first, then Triton's, then all else.

So that where time ends, what only a GPU can show has been tested.
"""

import pytest


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Otherwise in the order that they had."""
    items.sort(key=rank)


def rank(item: pytest.Item) -> int:
    """By the test's name and its parameters."""
    name = item.name.lower()
    return 0 if "cuda" in name or "gpu" in name else 1 if "triton" in name else 2
