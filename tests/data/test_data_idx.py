"""Readers of digits and MNIST, on files written here in every form and on wrong ones."""

import gzip
import struct

import numpy as np
import pytest
import torch

from hypermask_fast.data.sources import read_digits, read_mnist
from hypermask_fast.errors import InputError


def refused(read, *args, match):
    """The reader raises InputError with one line that matches."""
    with pytest.raises(InputError, match=match) as caught:
        read(*args)
    assert "\n" not in str(caught.value)


# digits


def test_digits_split_is_stratified_and_fixed():
    datasets = pytest.importorskip("sklearn.datasets")
    x, y, test_x, test_y = read_digits()
    assert x.dtype == test_x.dtype == torch.uint8 and x.shape[1:] == (1, 8, 8)
    assert len(y) + len(test_y) == 1797 and x.min() == 0 and x.max() == 255
    train, test = torch.bincount(y, minlength=10), torch.bincount(test_y, minlength=10)
    assert torch.equal(test, (train + test) // 5)
    seen, expected = [0] * 10, {True: [], False: []}
    for image, label in zip(*datasets.load_digits(return_X_y=True), strict=True):
        seen[label] += 1
        expected[seen[label] % 5 == 0].append((image.reshape(1, 8, 8) / 16, label))
    for (got_x, got_y), part in (((x, y), expected[False]), ((test_x, test_y), expected[True])):
        assert got_y.tolist() == [label for _, label in part]
        np.testing.assert_allclose(got_x.numpy() / 255, np.stack([image for image, _ in part]), atol=0.5 / 255)


# MNIST


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("dot", [True, False])
@pytest.mark.parametrize("below", ["", "mnist", "MNIST/raw"])
def test_mnist_names_and_places(write_mnist, mnist_arrays, tmp_path, zipped, dot, below):
    write_mnist(zipped, dot, tmp_path / below)
    x, y, test_x, test_y = read_mnist(str(tmp_path))
    assert x.dtype == torch.uint8 and y.dtype == torch.int64 and x.shape == (60, 1, 28, 28)
    assert np.array_equal(x[:, 0].numpy(), mnist_arrays["train"][0]) and y.tolist() == list(mnist_arrays["train"][1])
    assert np.array_equal(test_x[:, 0].numpy(), mnist_arrays["t10k"][0])
    assert test_y.tolist() == list(mnist_arrays["t10k"][1])


def test_mnist_real(real_data):
    x, y, test_x, test_y = read_mnist(real_data)
    assert x.shape == (60000, 1, 28, 28) and test_x.shape == (10000, 1, 28, 28)
    assert y[:8].tolist() == [5, 0, 4, 1, 9, 2, 1, 3] and test_y[:4].tolist() == [7, 2, 1, 0]
    # The mean and deviation that everybody normalises by.
    share = torch.bincount(x.flatten(), minlength=256).double() / x.numel()
    values = torch.arange(256) / 255
    mean = (share * values).sum()
    assert abs(mean - 0.1307) < 1e-4 and abs((share * (values - mean) ** 2).sum().sqrt() - 0.3081) < 1e-4


def test_mnist_missing(write_mnist, tmp_path):
    refused(read_mnist, tmp_path / "none", match="none does not exist")
    refused(read_mnist, tmp_path, match=r"no MNIST training images: expected train-images-idx3-ubyte.gz or")
    (write_mnist() / "t10k-labels-idx1-ubyte.gz").unlink()
    refused(read_mnist, tmp_path, match=r"no MNIST test labels: expected t10k-labels-idx1-ubyte.gz or")


IMAGES = "train-images-idx3-ubyte.gz"


def idx_zeros(*shape):
    """An IDX file of zeros."""
    return bytes((0, 0, 8, len(shape))) + struct.pack(f">{len(shape)}I", *shape) + bytes(int(np.prod(shape)))


HEADER = idx_zeros(60, 28, 28)[:16]


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (HEADER + bytes(60 * 784 - 1), "promises 47040 bytes of data, it has only 47039"),
        (HEADER + bytes(60 * 784 + 1), "it has more"),
        (HEADER[:9], "ends within its header"),
        (b"", "begins with bytes ''"),
        (
            bytes((0, 0, 8, 1)) + HEADER[4:] + bytes(60 * 784),
            "begins with bytes '00 00 08 01', expected '00 00 08 03'",
        ),
        (bytes((0, 0, 13, 3)) + HEADER[4:] + bytes(60 * 784), "00 00 0d 03"),
        (idx_zeros(60, 27, 28), "expected 28 x 28"),
        (idx_zeros(59, 28, 28), "59 images but .* 60 labels"),
        (bytes((0, 0, 8, 3)) + b"\xff" * 12, "cannot be read|only 0"),
    ],
)
def test_mnist_wrong_files(write_mnist, tmp_path, content, message, zipped):
    (write_mnist() / IMAGES).write_bytes(gzip.compress(content) if zipped else content)
    refused(read_mnist, tmp_path, match=f"{IMAGES}.*({message})")


def test_mnist_damaged_gzip(write_mnist, tmp_path):
    path = write_mnist() / IMAGES
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    refused(read_mnist, tmp_path, match=f"{IMAGES} cannot be read")
    path.write_bytes(content[:20000] + bytes(200) + content[20200:])
    refused(read_mnist, tmp_path, match=f"{IMAGES} cannot be read")


def test_mnist_label_out_of_range(write_mnist, tmp_path):
    path = write_mnist() / "train-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(idx_zeros(60)[:-1] + bytes([10])))
    refused(read_mnist, tmp_path, match="has label 10, expected 0 to 9")
