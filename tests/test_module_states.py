"""States of modules beside parameters and buffers, `get_extra_state`: files hold those that are tensors."""

import pytest
import torch
from support.networks import blob_scenario
from support.training import config
from torch import nn

import hypermask_fast as hmf
from hypermask_fast import InputError
from hypermask_fast.inference import load_packed
from hypermask_fast.training.trainer import Trainer


class Counting(nn.Module):
    """Has a state of its own, `seen`."""

    def __init__(self, seen):
        super().__init__()
        self.layer, self.seen = nn.Linear(6, 2), seen

    def forward(self, x):
        return self.layer(x)

    def get_extra_state(self):
        return self.seen

    def set_extra_state(self, state):
        self.seen = state


def network(seen):
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), Counting(seen))


def model(seen):
    made = hmf.HyperMask(network(seen), num_tasks=3, sparsity=20, hypernetwork=hmf.HypernetConfig(4, (5,))).eval()
    made(torch.randn(2, 8), task=0)
    return made


@pytest.mark.parametrize("seen", [{"batches": 3}, None, 3], ids=str)
def test_one_that_is_no_tensor_is_in_no_file(tmp_path, seen):
    message = rf"files hold tensors alone, and .*2\._extra_state .* is of type {type(seen).__name__}"
    with pytest.raises(InputError, match=message):
        model(seen).save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match=message):
        model(seen).export(0, "safetensors", tmp_path / "net.safetensors")
    assert not list(tmp_path.iterdir())
    assert model(seen).export(0).get_submodule("2").seen == seen


@pytest.mark.parametrize("where", [{"run_dir": "run"}, {"keep": "best"}], ids=str)
def test_a_run_that_saves_weights_says_so_before_it_trains(tmp_path, where):
    folder = tmp_path / where["run_dir"] if "run_dir" in where else None
    settings = config(**{key: value for key, value in where.items() if key == "keep"})
    with pytest.raises(InputError, match=r"net\.2\._extra_state in the network's state_dict is of type dict"):
        Trainer(model({"batches": 3}), blob_scenario(), settings, run_dir=folder)
    assert not list(tmp_path.iterdir())


def test_a_run_that_saves_none_trains():
    Trainer(model({"batches": 3}), blob_scenario(), config(iterations=1)).fit()


def test_a_tensor_is_saved_with_the_model(tmp_path):
    model(torch.arange(3)).save_pretrained(tmp_path)
    net = network(torch.zeros(3, dtype=torch.int64))
    hmf.HyperMask.from_pretrained(tmp_path, net)
    assert net.state_dict()["2._extra_state"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("seen", [{"batches": 3}, torch.arange(3)], ids=["dict", "tensor"])
def test_packed_tasks_have_no_place_for_one(tmp_path, seen):
    with pytest.raises(InputError, match=r"packed tasks .* and 2 \(Counting\) has another state"):
        model(seen).pack()
    plain = hmf.HyperMask(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Sequential(nn.Linear(6, 2))), 3).eval()
    plain(torch.randn(2, 8), task=0)
    plain.pack().save(tmp_path / "tasks")
    with pytest.raises(InputError, match="has another state"):
        load_packed(tmp_path / "tasks", network(seen))
