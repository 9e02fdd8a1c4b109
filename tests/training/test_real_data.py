"""The presets on the real data they are for, shortened."""

from dataclasses import replace

import pytest

from hypermask_fast.data import TensorSplit
from hypermask_fast.training import run
from hypermask_fast.training.config import load_preset
from hypermask_fast.training.trainer import Trainer


def shortened(preset, data_dir, tasks, target=None, samples=500, **settings):
    """A trainer of the preset's first tasks, tested on few samples; the rows it logs."""
    values = {"data.dir": str(data_dir), "data.tasks": tasks} | {f"training.{k}": v for k, v in settings.items()}
    values |= {f"target.{k}": v for k, v in (target or {}).items()}
    config = load_preset(preset).with_values(values)
    scenario = run.read_scenario(config)
    few = tuple(replace(task, test=first(task.test, samples)) for task in scenario.tasks)
    rows = []

    class Rows:
        def begin_task(self, *args): ...
        def step(self, task, iteration, values):
            rows.append(values)

        def advance(self, iterations): ...
        def message(self, text): ...
        def close(self): ...

    model = run.build_model(config, scenario)
    return Trainer(model, replace(scenario, tasks=few), config.training, seed=config.seed, logger=Rows()), rows


def first(split, count):
    return TensorSplit(split.inputs[:count], split.labels[:count], split.prepare)


@pytest.mark.parametrize("fidelity", ["official", "default"])
def test_split_mnist(mnist_dir, fidelity):
    trainer, _ = shortened("split-mnist", mnist_dir, 2, iterations=100)
    result = trainer.fit()
    assert result.matrix[1].min() > 85
    assert result.baseline.max() < 80


def test_permuted_mnist(mnist_dir):
    trainer, rows = shortened("permuted-mnist", mnist_dir, 1, iterations=30, log_every=1)
    trainer.fit()
    assert rows[-1]["cross_entropy"] < 0.6 * rows[0]["cross_entropy"]


def test_split_cifar10(cifar10_dir):
    """A narrow ResNet-20 with batch norm and augmentation: the loss falls over a few hundred steps."""
    settings = {"iterations": 200, "batch_size": 8, "log_every": 1, "validate_every": 1000}
    trainer, rows = shortened("split-cifar10", cifar10_dir, 1, target={"width": 16}, samples=50, **settings)
    trainer.fit()
    losses = [values["cross_entropy"] for values in rows]
    assert sum(losses[-50:]) < 0.9 * sum(losses[:50])
