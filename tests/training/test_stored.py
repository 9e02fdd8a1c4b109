"""Checkpoints of other networks and other settings: refused, and nothing of the model has changed."""

from pathlib import Path

import pytest
import torch
from support.networks import blob_model, blob_scenario
from torch import nn

import hypermask_fast as hmf
from hypermask_fast import InputError
from hypermask_fast.training import checkpoint, stored
from hypermask_fast.training.config import TrainingConfig
from hypermask_fast.training.trainer import Trainer

CONFIG = TrainingConfig(iterations=3, batch_size=8)


@pytest.fixture
def run_dir(tmp_path) -> Path:
    Trainer(blob_model(2), blob_scenario(2), CONFIG, run_dir=tmp_path, settings="a").fit()
    return tmp_path


def load(run_dir: Path, model: hmf.HyperMask, settings: str = "a", tasks: int = 2) -> int:
    state = stored.load(run_dir, model, tasks, CONFIG, [settings], None)[1]
    return state["task"]


def network(*layers: nn.Module) -> hmf.HyperMask:
    return hmf.HyperMask(nn.Sequential(*layers), 2, hypernetwork=hmf.HypernetConfig(embedding=8, hidden=(12,)))


def test_other_settings(run_dir):
    assert load(run_dir, blob_model(2)) == 2
    with pytest.raises(InputError, match="other settings than its config.toml has"):
        load(run_dir, blob_model(2), "b")


def test_another_number_of_tasks(run_dir):
    with pytest.raises(InputError, match=r"\.safetensors is of a run of 2 tasks, not 1$"):
        load(run_dir, blob_model(2), tasks=1)


def test_an_earlier_version_s_checkpoint_does_not_say_whose_moments_it_has(tmp_path):
    """And goes on all the same."""
    config = TrainingConfig(iterations=3, batch_size=8, checkpoint_every=2)
    training = Trainer(blob_model(2), blob_scenario(2), config, run_dir=tmp_path)
    training.stop = lambda: training.result.steps == 2
    with pytest.raises(KeyboardInterrupt):
        training.fit()
    tensors, state, file = checkpoint.load(tmp_path)
    assert "net.0.weight" in state.pop("moments")
    checkpoint.save(tmp_path, file.stem.removeprefix("checkpoint-"), tensors, state)
    Trainer(blob_model(2), blob_scenario(2), config, run_dir=tmp_path).fit(resume=True)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            lambda: network(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.ReLU(), nn.Linear(16, 3)),
            r"another network: .* is float32 \(.*\) there, float32 \(.*\) here",
        ),
        (lambda: blob_model(1), "another network: hypernet.embeddings.1 is not in this network"),
        (lambda: blob_model(2).double(), "float32 .* there, float64 .* here"),
        (lambda: blob_model(3), "another network: hypernet.embeddings.2 is not in the checkpoint"),
    ],
    ids=["shape", "fewer", "dtype", "more"],
)
def test_another_network(run_dir, other, message):
    model = other()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError, match=message):
        load(run_dir, model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
