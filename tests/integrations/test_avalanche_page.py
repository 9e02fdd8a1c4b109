"""The page on Avalanche and its example: what they tell can be typed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.datasets import idx_bytes

pytest.importorskip("avalanche", reason="avalanche-lib is not installed: make test-integrations")

ROOT = Path(__file__).parents[2]

SMALL_MNIST = """
import avalanche.benchmarks, torch
from torch.utils.data import TensorDataset

def small(n, return_task_id=False, **settings):
    parts = []
    for count in (200, 100):
        y = torch.arange(count) % 10
        x = torch.randn(count, 1, 28, 28)
        x[torch.arange(count), 0, 2 * y] += 3
        parts.append(TensorDataset(x, y))
        parts[-1].targets = y.tolist()
    return avalanche.benchmarks.nc_benchmark(*parts, n, task_labels=return_task_id, **settings)

avalanche.benchmarks.SplitMNIST = small
"""


def test_the_blocks_of_the_page_run(tmp_path):
    blocks = re.findall(
        r"^```python\n(.*?)^```$", (ROOT / "docs/avalanche.md").read_text(encoding="utf-8"), re.M | re.S
    )
    assert len(blocks) == 2
    (tmp_path / "page.py").write_text("\n".join([SMALL_MNIST, *blocks]), encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-W", "ignore", "page.py"]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^\{'Top1_Acc", done.stdout, re.M)) == 10


def test_the_example_compares_four_strategies(tmp_path):
    rng = np.random.default_rng(0)
    for part, count in (("train", 400), ("t10k", 100)):
        labels = np.arange(count, dtype=np.uint8) % 10
        images = rng.integers(0, 30, (count, 28, 28), dtype=np.uint8)
        images[np.arange(count), 2 * labels + 4] += 200  # a bright row for each digit
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(idx_bytes(images))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    words = [sys.executable, "-W", "ignore", str(ROOT / "examples/with_avalanche.py"), "--iterations", "12"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words += ["--data-dir", str(tmp_path)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    _, header, *rows = done.stdout[done.stdout.index("accuracy in percent") :].splitlines()
    assert header.split()[-2:] == ["average", "forgetting"]
    table = {row[:14].strip(): [float(word) for word in row[14:].split()] for row in rows}
    assert list(table) == ["HyperMask", "EWC", "replay of 200", "naive"]
    assert all(len(numbers) == 7 for numbers in table.values())
    assert table["HyperMask"][5] > 80
