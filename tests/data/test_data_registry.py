"""Scenarios by name."""

import pickle

import numpy as np
import pytest
import torch

from hypermask_fast import data
from hypermask_fast.data import SCENARIOS, load_scenario
from hypermask_fast.data.sources import read_mnist
from hypermask_fast.errors import InputError


def sizes(scenario):
    return [tuple(len(split) for split in task.splits) for task in scenario.tasks]


def test_public_names_exist():
    assert all(hasattr(data, name) for name in data.__all__)


def test_split_digits():
    made = load_scenario("split-digits")
    assert (made.name, made.num_classes, made.input_shape, len(made.tasks)) == (
        "split-digits",
        2,
        (1, 8, 8),
        5,
    )
    assert all(validation == 40 for _, validation, _ in sizes(made))
    assert sum(sum(row) for row in sizes(made)) == 1797
    x, y = made.tasks[2].train.batch(torch.arange(50), train=True)
    assert x.dtype == torch.float32 and x.min() == 0 and x.max() == 1 and set(y.tolist()) == {0, 1}
    assert made.tasks[2].name == "digits 4, 5"


def test_split_mnist_written(write_mnist, tmp_path):
    write_mnist()
    x, y, _, _ = read_mnist(tmp_path)
    made = load_scenario("split-mnist", tmp_path, validation=5)
    assert (made.num_classes, made.input_shape) == (2, (1, 28, 28))
    assert sizes(made) == [(7, 5, 4)] * 5
    for t, task in enumerate(made.tasks):
        members = (y // 2 == t).nonzero().squeeze(1)
        for split, index in ((task.validation, members[:5]), (task.train, members[5:])):
            got_x, got_y = next(split.chunks(100))
            torch.testing.assert_close(got_x, (x[index] / 255 - 0.1307) / 0.3081)
            assert torch.equal(got_y, y[index] - 2 * t)
    # Cropped: rows of zeros come in at an edge. Raw noise has none.
    torch.manual_seed(0)
    batch, _ = made.tasks[0].train.batch(torch.arange(7), train=True)
    assert batch.shape == (7, 1, 28, 28)
    assert ((batch - (0 - 0.1307) / 0.3081).abs() < 1e-5).all(-1).any()


def test_split_mnist_real(real_data):
    made = load_scenario("split-mnist", real_data)
    assert sizes(made)[0] == (12665 - 1000, 1000, 2115) and len(made.tasks) == 5
    assert sum(sum(row) for row in sizes(made)) == 70000


def test_permuted_mnist(write_mnist, tmp_path):
    write_mnist()
    x, y, _, test_y = read_mnist(tmp_path)
    made = load_scenario("permuted-mnist", tmp_path, validation=20, seed=3)
    assert (made.num_classes, made.input_shape, len(made.tasks)) == (10, (1024,), 10)
    assert sizes(made) == [(40, 20, 20)] * 10
    permutations = [task.train.prepare.permutation for task in made.tasks]
    assert len({tuple(p.tolist()) for p in permutations}) == 10
    padded = torch.nn.functional.pad(x, (2, 2, 2, 2)).flatten(1) / 255
    for task, permutation in zip(made.tasks, permutations, strict=True):
        assert torch.equal(next(task.validation.chunks(100))[0], padded[:20][:, permutation])
        got_x, got_y = task.train.batch(torch.arange(40), train=True)
        assert torch.equal(got_x, padded[20:][:, permutation]) and torch.equal(got_y, y[20:])
        assert torch.equal(next(task.test.chunks(100))[1], test_y)
        assert task.test.prepare.permutation is permutation


def test_permuted_mnist_seeds_and_sharing(write_mnist, tmp_path):
    write_mnist()

    def permutations(**kwargs):
        made = load_scenario("permuted-mnist", tmp_path, validation=20, **kwargs)
        return [task.train.prepare.permutation.tolist() for task in made.tasks]

    torch.manual_seed(0)
    first = permutations(seed=3)
    torch.manual_seed(1)
    assert permutations(seed=3) == first and permutations(seed=4) != first
    assert permutations(seed=3, tasks=4) == first[:4]
    made = load_scenario("permuted-mnist", tmp_path, validation=20)
    for other in (made, made.to("meta")):
        assert len({id(task.train.inputs) for task in other.tasks}) == 1
        assert len({id(task.test.inputs) for task in other.tasks}) == 1
    assert made.tasks[0].train.inputs.dtype == torch.uint8


def test_permuted_mnist_real(real_data):
    made = load_scenario("permuted-mnist", real_data, tasks=2)
    assert sizes(made) == [(55000, 5000, 10000)] * 2


@pytest.fixture
def cifar100_dir(tmp_path):
    """CIFAR-100 of 2 training and 1 test image a class; every pixel of an image is its label."""
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name, repeats in (("train", 2), ("test", 1)):
        labels = np.random.default_rng(0).permutation(np.repeat(np.arange(100), repeats))
        images = np.repeat(labels.astype(np.uint8)[:, None], 3072, 1)
        (folder / name).write_bytes(pickle.dumps({"data": images, "fine_labels": labels.tolist()}))
    return tmp_path


def classes_of(task):
    """The original class of each label, read back from the stored pixels."""
    pairs = {(y, x) for y, x in zip(task.train.labels.tolist(), task.train.inputs[:, 0, 0, 0].tolist(), strict=True)}
    pairs |= {(y, x) for y, x in zip(task.test.labels.tolist(), task.test.inputs[:, 0, 0, 0].tolist(), strict=True)}
    assert len(pairs) == len(dict(pairs))
    return [c for _, c in sorted(pairs)]


def test_split_cifar100(cifar100_dir):
    made = load_scenario("split-cifar100", cifar100_dir, validation=3)
    assert (made.num_classes, made.input_shape, len(made.tasks)) == (10, (3, 32, 32), 10)
    assert sizes(made) == [(17, 3, 10)] * 10
    assert [classes_of(task) for task in made.tasks] == [list(range(10 * t, 10 * t + 10)) for t in range(10)]


def test_cifar100_in_fecams_order(cifar100_dir):
    made = load_scenario("cifar100-5x20", cifar100_dir, validation=0)
    assert (made.num_classes, len(made.tasks)) == (20, 5)
    order = [c for task in made.tasks for c in classes_of(task)]
    assert order[:5] == [68, 56, 78, 8, 23] and sorted(order) == list(range(100))
    assert order == np.random.RandomState(1993).permutation(100).tolist()


def test_colour_scenarios_are_normalised_and_augmented(cifar100_dir):
    task = load_scenario("split-cifar100", cifar100_dir, validation=0).tasks[3]
    x, y = task.train.batch(torch.arange(20))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = ((30 + y) / 255)[:, None] - mean
    torch.testing.assert_close(x, (expected / std)[:, :, None, None].expand(-1, -1, 32, 32))
    torch.manual_seed(0)
    augmented, _ = task.train.batch(torch.arange(20), train=True)
    assert augmented.shape == x.shape and not torch.equal(augmented, x)
    # A crop of one colour leaves the black border: between none and 4 rows of it.
    black = ((0 - mean) / std)[None, :, None, None]
    border = ((augmented - black).abs() < 1e-5).all(1).all(-1).sum(-1)
    assert border.max() == 4 and border.min() >= 0


def test_split_cifar10_real(real_data, tmp_path):
    with np.load(real_data / "cifar10" / "test.npz") as file:
        offsets = file["offsets"][:601]
        np.savez(
            tmp_path / "train.npz",
            jpeg=file["jpeg"][: offsets[-1]],
            offsets=offsets,
            labels=file["labels"][:600],
        )
        (tmp_path / "test.npz").write_bytes((tmp_path / "train.npz").read_bytes())
        labels = file["labels"][:600]
    made = load_scenario("split-cifar10", tmp_path, validation=50)
    assert (made.num_classes, made.input_shape, len(made.tasks)) == (2, (3, 32, 32), 5)
    for t, task in enumerate(made.tasks):
        assert task.test.labels.tolist() == [y - 2 * t for y in labels.tolist() if y // 2 == t]
        assert (len(task.train), len(task.validation)) == (len(task.test) - 50, 50)


@pytest.mark.parametrize("name", SCENARIOS)
def test_arguments_refused(name, tmp_path):
    most = SCENARIOS[name].tasks
    for wrong in (0, most + 1, -1, 1.0, True):
        with pytest.raises(InputError, match=f"tasks of {name} must be a whole number, 1 .. {most}"):
            load_scenario(name, tmp_path, tasks=wrong)
    with pytest.raises(InputError, match="validation must be a whole number, 0 or more, not -1"):
        load_scenario(name, tmp_path, validation=-1)
    with pytest.raises(InputError, match="seed must be"):
        load_scenario(name, tmp_path, seed=-1)
    if SCENARIOS[name].files is not None:
        with pytest.raises(InputError, match="--data-dir"):
            load_scenario(name)
        with pytest.raises(InputError, match="expected"):
            load_scenario(name, tmp_path)


def test_validation_too_large(write_mnist, tmp_path):
    write_mnist()
    for name, n in (("split-mnist", 12), ("permuted-mnist", 60)):
        with pytest.raises(InputError, match=f"it has {n}, so at most {n - 1}"):
            load_scenario(name, tmp_path, validation=n)
        assert sizes(load_scenario(name, tmp_path, validation=n - 1, tasks=1))[0][0] == 1


def test_tasks_limits(write_mnist, tmp_path):
    write_mnist()
    assert [task.name for task in load_scenario("split-mnist", tmp_path, validation=1, tasks=2).tasks] == [
        "digits 0, 1",
        "digits 2, 3",
    ]


def test_unknown_names():
    with pytest.raises(InputError, match=r"did you mean split-mnist.*There are: split-digits, split-mnist,"):
        load_scenario("split-mnst")
    with pytest.raises(InputError, match=r"unknown scenario 'x'. There are: split-digits"):
        load_scenario("x")
