"""Scenarios by name."""

import numpy as np
import pytest
import torch
from support.datasets import jpeg_bytes, write_cifar100

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
    write_cifar100(tmp_path, 4)
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
    assert sizes(made) == [(37, 3, 10)] * 10
    assert [classes_of(task) for task in made.tasks] == [list(range(10 * t, 10 * t + 10)) for t in range(10)]


# Of the published runs of 5 x 20, task by task.
CIFAR100_ORDER = """
87 0 52 58 44 91 68 97 51 15 94 92 10 72 49 78 61 14 8 86
84 96 18 24 32 45 88 11 4 67 69 66 77 47 79 93 29 50 57 83
17 81 41 12 37 59 25 20 80 73 1 28 6 46 62 82 53 9 31 75
38 63 33 74 27 22 36 3 16 21 60 19 70 90 89 43 5 42 65 76
40 30 23 85 2 95 56 48 71 64 98 13 99 7 34 55 54 26 35 39
"""
SIZES = {
    "cifar100-5x20": (20,) * 5,
    "cifar100-50-5x10": (50, *(10,) * 5),
    "cifar100-50-10x5": (50, *(5,) * 10),
    "cifar100-40-20x3": (40, *(3,) * 20),
}


@pytest.mark.parametrize("name", SIZES)
def test_cifar100_in_the_published_order(cifar100_dir, name):
    made = load_scenario(name, cifar100_dir, validation_per_class=1)
    assert made.classes == SIZES[name] == SCENARIOS[name].classes
    assert (made.num_classes, len(made.tasks)) == (max(SIZES[name]), len(SIZES[name]))
    classes = [classes_of(task) for task in made.tasks]
    assert [c for group in classes for c in group] == [int(c) for c in CIFAR100_ORDER.split()]
    assert [task.name for task in made.tasks] == list(SCENARIOS[name].task_names(3))
    for task, group in zip(made.tasks, classes, strict=True):
        assert task.class_names == tuple(map(str, group))
        assert task.name.startswith(f"classes {group[0]}, {group[1]}, {group[2]}")
        for split, each in zip(task.splits, (3, 1, 1), strict=True):
            assert torch.equal(split.labels.bincount(), torch.full((len(group),), each))
        assert task.validation.augment is None and task.test.augment is None


def test_cifar100_larger_first_tasks_alone(cifar100_dir):
    made = load_scenario("cifar100-40-20x3", cifar100_dir, validation_per_class=1, tasks=2)
    assert made.classes == (40, 3) and made.num_classes == 40


def test_validation_of_each_class_is_its_first_images(cifar100_dir):
    made = load_scenario("split-cifar100", cifar100_dir, validation_per_class=2)
    whole = load_scenario("split-cifar100", cifar100_dir, validation=0)
    for task, before in zip(made.tasks, whole.tasks, strict=True):
        y, seen, held_out = before.train.labels.tolist(), [0] * 10, []
        for label in y:
            seen[label] += 1
            held_out.append(seen[label] <= 2)
        assert task.validation.labels.tolist() == [label for label, out in zip(y, held_out, strict=True) if out]
        assert task.train.labels.tolist() == [label for label, out in zip(y, held_out, strict=True) if not out]
        assert torch.equal(task.train.inputs[:, 0, 0, 0] - task.train.labels, task.train.inputs[:, 0, 0, 0] // 10 * 10)
    with pytest.raises(InputError, match="4 leaves a class of task 0 no training samples: one has 4, so at most 3"):
        load_scenario("split-cifar100", cifar100_dir, validation_per_class=4)
    with pytest.raises(InputError, match="give one of them"):
        load_scenario("split-cifar100", cifar100_dir, validation=2, validation_per_class=2)
    with pytest.raises(InputError, match="validation_per_class must be a whole number, 0 or more, not -1"):
        load_scenario("split-cifar100", cifar100_dir, validation_per_class=-1)
    with pytest.raises(InputError, match="50 leaves a class of task 0 no training samples"):
        load_scenario("cifar100-5x20", cifar100_dir)


def test_cifar100_5x20_is_augmented_and_normalised_as_published(cifar100_dir):
    made = load_scenario("cifar100-5x20", cifar100_dir, validation_per_class=1)
    mean, std = torch.tensor([0.5071, 0.4867, 0.4408]), torch.tensor([0.2675, 0.2565, 0.2761])
    for split in made.tasks[2].splits:
        x, _ = next(split.chunks(100))
        stored = split.inputs[:, 0, 0, 0].float() / 255
        torch.testing.assert_close(x, ((stored[:, None] - mean) / std)[..., None, None].expand(-1, -1, 32, 32))
        assert split.prepare == data.Normalize(mean=(0.5071, 0.4867, 0.4408), std=(0.2675, 0.2565, 0.2761))
    train = made.tasks[2].train
    assert train.augment == data.Compose(
        data.PadCrop(32, 4), data.HorizontalFlip(), data.BrightnessJitter(63 / 255), data.AutoAugment(32)
    )
    torch.manual_seed(0)
    index = torch.arange(40)
    found, _ = train.batch(index, train=True)
    torch.manual_seed(0)
    x = train.inputs[index]
    for transform in train.augment.transforms:
        x = transform(x)
    assert torch.equal(found, train.prepare(x)) and not torch.equal(found, train.batch(index)[0])


@pytest.fixture
def tiny_dir(tmp_path):
    """Tiny ImageNet of the last two published seeds' first classes: 3 training and 1 test image of each, of its own
    brightness; wnids.txt has all 200."""
    root = tmp_path / "tiny-imagenet-200"
    (root / "val" / "images").mkdir(parents=True)
    wnids = [f"n{c:03}" for c in np.random.default_rng(1).permutation(200)]
    (root / "wnids.txt").write_text("\n".join(wnids) + "\n")
    chosen = {int(c) for seed in (8, 9) for c in np.random.default_rng(seed).permutation(200)[:10]}
    lines = []
    for c in sorted(chosen):
        folder = root / "train" / wnids[c] / "images"
        folder.mkdir(parents=True)
        content = jpeg_bytes(np.full((64, 64, 3), c, np.uint8))
        for i in range(3):
            (folder / f"{wnids[c]}_{i}.JPEG").write_bytes(content)
        (root / "val" / "images" / f"val_{c}.JPEG").write_bytes(content)
        lines.append(f"val_{c}.JPEG\t{wnids[c]}\t0\t0\t62\t62")
    (root / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_tiny_imagenet_has_other_tasks_for_every_seed(tiny_dir):
    names = SCENARIOS["tiny-imagenet"].task_names
    for seed in (8, 9):
        order = np.random.default_rng(seed).permutation(200).tolist()
        made = load_scenario("tiny-imagenet", tiny_dir, seed=seed, validation_per_class=1, tasks=2)
        assert (made.classes, made.input_shape) == ((5, 5), (3, 64, 64))
        for t, task in enumerate(made.tasks):
            assert classes_of(task) == order[5 * t : 5 * t + 5]
            assert task.name == names(seed)[t] == f"classes {', '.join(map(str, order[5 * t : 5 * t + 5]))}"
        assert sizes(made) == [(10, 5, 5)] * 2
        assert sorted(c for name in names(seed) for c in map(int, name.split(" ", 1)[1].split(", "))) == list(
            range(200)
        )
    assert made.tasks[0].train.augment == data.Compose(data.PadCrop(64, 4), data.HorizontalFlip())
    assert made.tasks[0].train.prepare == data.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert len({names(seed) for seed in range(5, 10)}) == 5


def test_colour_scenarios_are_normalised_and_augmented(cifar100_dir):
    task = load_scenario("split-cifar100", cifar100_dir, validation=0).tasks[3]
    x, y = task.train.batch(torch.arange(20))
    assert len(task.train) == 40
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
    edition = SCENARIOS[name].edition
    with pytest.raises(InputError, match=f"no edition {edition + 1} of {name}'s data, only {edition}"):
        load_scenario(name, tmp_path, edition=edition + 1)
    if edition > 1:
        with pytest.raises(InputError, match=f"edition 1 of {name}'s data, which .*, is no longer there"):
            load_scenario(name, tmp_path, edition=1)
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
