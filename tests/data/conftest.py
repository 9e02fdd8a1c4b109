"""Data sets for the tests: the real ones where they lie beside the repository, small ones written here."""

import gzip
from pathlib import Path

import numpy as np
import pytest
from support.datasets import idx_bytes

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"


@pytest.fixture(scope="session")
def real_data():
    """The folder that holds the real mnist and cifar10."""
    if not (SHARED / "mnist").is_dir() or not (SHARED / "cifar10").is_dir():
        pytest.skip("the real MNIST and CIFAR-10 are not in ../shared/data beside the repository")
    return SHARED


@pytest.fixture
def mnist_arrays():
    """60 training and 20 test images of noise, every class 6 and 2 times in a shuffled order."""
    rng = np.random.default_rng(0)
    arrays = {}
    for prefix, per_class in (("train", 6), ("t10k", 2)):
        labels = rng.permutation(np.repeat(np.arange(10, dtype=np.uint8), per_class))
        arrays[prefix] = rng.integers(0, 256, (len(labels), 28, 28), dtype=np.uint8), labels
    return arrays


@pytest.fixture
def write_mnist(tmp_path, mnist_arrays):
    """Writes the four files, gzipped or not, named -idx3-ubyte or .idx3-ubyte; returns the folder."""

    def write(zipped=True, dot=False, folder=tmp_path):
        folder.mkdir(parents=True, exist_ok=True)
        for prefix, (images, labels) in mnist_arrays.items():
            for kind, ending, array in (("images", "idx3", images), ("labels", "idx1", labels)):
                name = f"{prefix}-{kind}{'.' if dot else '-'}{ending}-ubyte" + (".gz" if zipped else "")
                content = idx_bytes(array)
                (folder / name).write_bytes(gzip.compress(content) if zipped else content)
        return folder

    return write
