import dataclasses

import pytest

from hypermask_fast.training import describe
from hypermask_fast.training.config import RunConfig, load_preset


@pytest.mark.parametrize(
    ("preset", "values", "title"),
    [
        ("split-digits", {}, "split-digits, 5 tasks of 2 classes, MLP-100-100"),
        ("split-digits", {"data.tasks": 2, "target.hidden": [10]}, "split-digits, 2 tasks of 2 classes, MLP-10"),
        ("split-digits", {"data.tasks": 1, "target.hidden": []}, "split-digits, 1 task of 2 classes, MLP"),
        (
            "split-digits",
            {"data.scenario": "permuted-mnist", "target.name": "resnet20"},
            "permuted-mnist, 10 tasks of 10 classes, ResNet-20 of width 32",
        ),
        ("tiny-imagenet-zenkenet", {}, "tiny-imagenet, 40 tasks of 5 classes, ZenkeNet"),
        ("cifar100-50-10x5", {}, "cifar100-50-10x5, 11 tasks of 50 + 10 x 5 classes, ResNet-20 of width 32"),
        ("cifar100-50-10x5", {"data.tasks": 2}, "cifar100-50-10x5, 2 tasks of 50 + 5 classes, ResNet-20 of width 32"),
        ("cifar100-50-10x5", {"data.tasks": 1}, "cifar100-50-10x5, 1 task of 50 classes, ResNet-20 of width 32"),
        ("split-digits", {"title": "mine"}, "mine: split-digits, 5 tasks of 2 classes, MLP-100-100"),
        ("split-digits", {"data.scenario": "none", "target.name": "own"}, "none, own"),
    ],
)
def test_titles_say_what_the_settings_are(preset, values, title):
    assert describe.title(load_preset(preset).with_values(values)) == title


def test_details_say_what_was_changed():
    config = load_preset("split-digits")
    assert describe.details(config) == (
        "hypernetwork 24-50-50, sparsity 30 %, beta 0.01, lam 0.01, 600 iterations of 64 samples, lr 0.001, seed 0"
    )
    changes = {
        "hypernet.embedding": 3,
        "hypernet.hidden": [4],
        "hypernet.chunk_size": 100,
        "method.sparsity": 0.5,
        "method.beta": 2,
        "method.lam": 1e-6,
        "training.epochs": 7,
        "training.batch_size": 5,
        "training.lr": 0.125,
        "seed": 9,
        "fidelity": "official",
    }
    assert describe.details(config.with_values(changes)) == (
        "hypernetwork 3-4 in chunks of 100, sparsity 0.5 %, beta 2, lam 1e-06, 7 epochs of 5 samples, lr 0.125, "
        "seed 9, official fidelity"
    )
    for key, value in changes.items():
        assert describe.details(config.with_values({key: value})) != describe.details(config), key


def test_a_title_is_a_setting_that_decides_nothing():
    config = load_preset("split-digits")
    titled = dataclasses.replace(config, title="anything")
    assert titled.digest() == config.digest()
    assert RunConfig.from_toml(titled.to_toml(), "file") == titled
