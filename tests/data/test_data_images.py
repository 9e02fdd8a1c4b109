"""Readers of CIFAR and Tiny ImageNet, on files written here in every format and on wrong ones."""

import codecs
import io
import os
import pickle
import struct

import numpy as np
import pytest
import torch
from support.datasets import batch, jpeg_bytes, python2_pickle, smooth, write_npz, write_tiny_imagenet

from hypermask_fast.data.sources import (
    read_cifar10,
    read_cifar100,
    read_tiny_imagenet,
)
from hypermask_fast.data.sources.cifar import read_jpeg_npz
from hypermask_fast.data.sources.safe_pickle import read_pickle
from hypermask_fast.errors import InputError


def refused(read, *args, match):
    """The reader raises InputError with one line that matches."""
    with pytest.raises(InputError, match=match) as caught:
        read(*args)
    assert "\n" not in str(caught.value)


# CIFAR pickles


def dump(data, labels, key, form):
    if form == "python 2":
        return python2_pickle(data, labels, key.encode())
    key, data_key = (key, "data") if form % 2 else (key.encode(), b"data")
    return pickle.dumps({data_key: data, key: labels, "batch_label": "one of five"}, protocol=form)


FORMS = ["python 2", 0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("below", ["", "cifar-10-batches-py"])
def test_cifar10_pickles(tmp_path, form, below):
    folder = tmp_path / below
    folder.mkdir(exist_ok=True)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    batches = [batch(4, 10, seed) for seed in range(6)]
    for name, (data, labels) in zip(names, batches, strict=True):
        (folder / name).write_bytes(dump(data, labels, "labels", form))
    x, y, test_x, test_y = read_cifar10(tmp_path)
    expected = np.concatenate([data for data, _ in batches[:5]]).reshape(20, 3, 32, 32)
    assert x.dtype == torch.uint8 and np.array_equal(x.numpy(), expected)
    assert y.tolist() == [label for _, labels in batches[:5] for label in labels] and y.dtype == torch.int64
    assert np.array_equal(test_x.flatten(1).numpy(), batches[5][0]) and test_y.tolist() == batches[5][1]
    (folder / "data_batch_3").unlink()
    refused(read_cifar10, tmp_path, match="no data_batch_3")


@pytest.mark.parametrize("form", FORMS)
def test_cifar100_pickles(tmp_path, form):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    parts = {"train": batch(7, 100, 0), "test": batch(3, 100, 1)}
    for name, (data, labels) in parts.items():
        (folder / name).write_bytes(dump(data, labels, "fine_labels", form))
    x, y, test_x, test_y = read_cifar100(tmp_path)
    assert np.array_equal(x.flatten(1).numpy(), parts["train"][0]) and y.tolist() == parts["train"][1]
    assert np.array_equal(test_x.flatten(1).numpy(), parts["test"][0]) and test_y.tolist() == parts["test"][1]


def test_fortran_ordered_arrays(tmp_path):
    data = np.asfortranarray(batch(4, 10, 0)[0])
    for protocol in (2, 4, 5):
        (tmp_path / "file").write_bytes(pickle.dumps({"data": data}, protocol=protocol))
        assert np.array_equal(read_pickle(tmp_path / "file")["data"], data)


class Attack:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_malicious_pickles_run_nothing(tmp_path, protocol):
    mark = tmp_path / "mark"
    (tmp_path / "test").write_bytes(b"")
    attacks = [
        Attack(os.system, f"touch {mark}"),
        Attack(eval, f"open({str(mark)!r}, 'w')"),
        Attack(getattr, "", "join"),
        Attack(np.load, str(mark)),
        Attack(io.open, str(mark), "w"),
    ]
    for attack in attacks:
        (tmp_path / "train").write_bytes(pickle.dumps({"data": attack}, protocol=protocol))
        refused(read_cifar100, tmp_path, match="train is not a CIFAR pickle: it asks for")
    assert not mark.exists()


def test_pickles_with_other_codecs_are_refused(tmp_path):
    (tmp_path / "test").write_bytes(b"")
    (tmp_path / "train").write_bytes(pickle.dumps({"data": Attack(codecs.encode, "x", "rot13")}, protocol=2))
    refused(read_cifar100, tmp_path, match="codec other than latin1")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list, not a dict"),
        ({1: 2}, "has a int where a name belongs"),
        ({"data": np.zeros((2, 3072), np.float32), "fine_labels": [0, 1]}, "other than uint8"),
        ({"data": np.array([{}, {}]), "fine_labels": [0, 1]}, "other than uint8"),
        ({"data": [1, 2], "fine_labels": [0, 1]}, r"data must be a \(n, 3072\) array"),
        ({"data": np.zeros((2, 3071), np.uint8), "fine_labels": [0, 1]}, r"data must be a \(n, 3072\) array"),
        (
            {"data": np.zeros((2, 3072), np.uint8), "labels": [0, 1]},
            "it has no 'fine_labels', only data, labels",
        ),
        ({"data": np.zeros((2, 3072), np.uint8), "fine_labels": [0]}, "2 integers"),
        ({"data": np.zeros((2, 3072), np.uint8), "fine_labels": [0, [1]]}, "2 integers"),
        ({"data": np.zeros((2, 3072), np.uint8), "fine_labels": [0.0, 1.0]}, "2 integers"),
        ({"data": np.zeros((2, 3072), np.uint8), "fine_labels": [0, 100]}, "0 .. 99, found 0 to 100"),
        ({"data": np.zeros((2, 3072), np.uint8), "fine_labels": [-1, 1]}, "0 .. 99, found -1 to 1"),
    ],
)
def test_cifar_wrong_contents(tmp_path, content, message):
    (tmp_path / "train").write_bytes(pickle.dumps(content))
    (tmp_path / "test").write_bytes(pickle.dumps(content))
    refused(read_cifar100, tmp_path, match=message)


def test_cifar_damaged_pickles(tmp_path):
    whole = python2_pickle(*batch(2, 100, 0), b"fine_labels")
    path = tmp_path / "train"
    (tmp_path / "test").write_bytes(whole)
    rng = np.random.default_rng(0)
    refused(read_cifar100, tmp_path, match="has no CIFAR-100")
    for length in [0, 1, 2, 3, *rng.integers(4, len(whole), 20).tolist(), len(whole) - 1]:
        path.write_bytes(whole[:length])
        refused(read_cifar100, tmp_path, match=r"train (cannot be read|is not)")
    path.write_bytes(whole.replace(b"J" + struct.pack("<i", 3072), b"J" + struct.pack("<i", 3073)))
    refused(read_cifar100, tmp_path, match=r"shape \(2, 3073\) but 6144 bytes")


# CIFAR-10 as .npz of JPEGs


def test_cifar10_npz(tmp_path):
    rng = np.random.default_rng(0)
    pixels = [smooth(rng, 32) for _ in range(5)]
    files = [jpeg_bytes(p) for p in pixels]
    folder = tmp_path / "cifar10"
    folder.mkdir()
    write_npz(folder / "train.npz", files[:3], [3, 1, 9])
    write_npz(folder / "test.npz", files[3:], [0, 2])
    x, y, test_x, test_y = read_cifar10(tmp_path)
    assert x.shape == (3, 3, 32, 32) and x.dtype == torch.uint8 and y.tolist() == [3, 1, 9]
    assert test_y.tolist() == [0, 2]
    for got, expected in zip(torch.cat([x, test_x]), pixels, strict=True):
        assert (got.permute(1, 2, 0).int() - torch.from_numpy(expected).int()).abs().max() < 12


def test_cifar10_npz_real(real_data):
    with np.load(real_data / "cifar10" / "test.npz") as file:
        labels = file["labels"]
    x, y = read_jpeg_npz(real_data / "cifar10" / "test.npz", 10)
    assert x.shape == (5000, 3, 32, 32) and y.tolist() == labels.tolist()
    # Red, green and blue in this order: CIFAR-10's known means, which differ enough to tell.
    mean = (x / 255).mean((0, 2, 3))
    assert torch.allclose(mean, torch.tensor([0.4914, 0.4822, 0.4465]), atol=0.01)


def test_cifar10_npz_wrong(tmp_path):
    rng = np.random.default_rng(0)
    good = [jpeg_bytes(smooth(rng, 32)) for _ in range(2)]
    total = sum(map(len, good))
    path = tmp_path / "train.npz"
    write_npz(path, good, [0, 1])
    refused(read_cifar10, tmp_path, match=r"has train.npz but no test.npz")
    write_npz(tmp_path / "test.npz", good, [0, 1])
    cases = [
        (good, [0, 1], {"offsets": None}, "cannot be read as an .npz of jpeg, offsets and labels"),
        (good, [0, 1], {"offsets": np.array([0, 5])}, "offsets must rise"),
        (good, [0, 1], {"offsets": np.array([0, total + 1, total])}, "offsets must rise"),
        (good, [0, 1], {"offsets": np.array([0.0, 5.0, total])}, "1-d integers"),
        (good, [0, 1, 2], {}, "2 integers"),
        (good, [0, 10], {}, "0 .. 9, found 0 to 10"),
        (good, [0, 1], {"labels": np.array([{}, {}])}, "cannot be read"),
        ([good[0], good[1][:200]], [0, 1], {}, "image 1 is not a readable JPEG"),
        ([b"nonsense", good[1]], [0, 1], {}, "image 0 is not a JPEG$"),
        ([good[0], jpeg_bytes(smooth(rng, 48))], [0, 1], {}, r"image 1 is \(48, 48\), expected 32 x 32"),
    ]
    for files, labels, changes, message in cases:
        write_npz(path, files, labels, **changes)
        refused(read_cifar10, tmp_path, match=f"train.npz.*{message}")
    path.write_bytes(b"not a zip file")
    refused(read_cifar10, tmp_path, match=r"train.npz is not an .npz file, or is cut off")


# Tiny ImageNet


@pytest.fixture
def tiny(tmp_path):
    """The folder, and the colours of its training images."""
    root = tmp_path / "tiny-imagenet-200"
    return root, write_tiny_imagenet(root)


def test_tiny_imagenet(tiny):
    root, colours = tiny
    for given in (root, root.parent):
        x, y, test_x, test_y = read_tiny_imagenet(given, range(3))
        assert x.shape == (6, 3, 64, 64) and x.dtype == torch.uint8 and test_x.shape == (3, 3, 64, 64)
        assert y.tolist() == [0, 0, 1, 1, 2, 2] and test_y.tolist() == [2, 0, 1]
        for i, pixels in enumerate(x):
            assert np.abs(pixels[:, 0, 0].numpy().astype(int) - colours[divmod(i, 2)]).max() < 12
    x, y, _, test_y = read_tiny_imagenet(root, range(2))
    assert y.tolist() == [0, 0, 1, 1] and test_y.tolist() == [0, 1]


def test_tiny_imagenet_wrong(tiny):
    root, _ = tiny
    refused(read_tiny_imagenet, root, range(4), match="must list 4 or more distinct classes, it has 3")
    refused(read_tiny_imagenet, root / "val", range(3), match=r"no Tiny ImageNet: expected wnids.txt")
    image = root / "train" / "n1" / "images" / "n1_0.JPEG"
    content = image.read_bytes()
    image.write_bytes(jpeg_bytes(np.zeros((32, 32, 3), np.uint8)))
    refused(read_tiny_imagenet, root, range(3), match=r"images/n1_0.JPEG is \(32, 32\), expected 64 x 64$")
    image.write_bytes(content)
    (root / "val" / "images" / "val_1.JPEG").unlink()
    refused(read_tiny_imagenet, root, range(3), match=r"val_1.JPEG cannot be read")
    (root / "val" / "val_annotations.txt").write_text("val_0.JPEG n1\n")
    refused(read_tiny_imagenet, root, range(3), match="line 1: expected a file name, a tab and a class")
    (root / "val" / "val_annotations.txt").unlink()
    refused(read_tiny_imagenet, root, range(3), match=r"val_annotations.txt is missing")
    for file in (root / "train" / "n2" / "images").iterdir():
        file.unlink()
    refused(read_tiny_imagenet, root, range(3), match="expected the training images of n2")
