"""Running statistics per task: batch norm of every kind, SyncBatchNorm, subclasses, InstanceNorm."""

import copy
import warnings

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

import hypermask_fast as hmf
from hypermask_fast import InputError
from hypermask_fast.masking.norms import TaskStatistics


class Own(nn.BatchNorm1d):
    """A user's subclass with a forward of its own."""

    def forward(self, input):
        return super().forward(input) * 2


NORMS = {
    "BatchNorm1d": lambda **k: nn.BatchNorm1d(4, **k),
    "BatchNorm1d without affine": lambda **k: nn.BatchNorm1d(4, affine=False, **k),
    "SyncBatchNorm": lambda **k: nn.SyncBatchNorm(4, **k),
    "subclass": lambda **k: Own(4, **k),
    "InstanceNorm1d": lambda **k: nn.InstanceNorm1d(4, track_running_stats=True, **k),
    "InstanceNorm1d affine": lambda **k: nn.InstanceNorm1d(4, track_running_stats=True, affine=True, **k),
}
HALF, EXACT = {"rtol": 2e-2, "atol": 2e-2}, {"rtol": 1e-5, "atol": 1e-5}
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class Net(nn.Module):
    def __init__(self, norm, dtype=torch.float32):
        super().__init__()
        self.conv = nn.Conv1d(2, 4, 3)
        self.norm = norm
        self.head = nn.Linear(4, 3)
        self.to(dtype)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).relu().mean(-1))


def model_of(kind, tasks=3, dtype=torch.float32, fidelity="default", **settings):
    torch.manual_seed(0)
    net = Net(NORMS[kind](**settings), dtype)
    return hmf.HyperMask(net, tasks, 30, hmf.HypernetConfig(6, (8,)), fidelity=fidelity)


def images(task=0, n=6, dtype=torch.float32):
    return ((1.0 + task) * torch.randn(n, 2, 7, generator=torch.Generator().manual_seed(task))).to(dtype)


def seen(model, tasks=(0, 1, 2), rounds=2, dtype=torch.float32):
    """Shows every task some batches in training mode."""
    with torch.no_grad():
        for _ in range(rounds):
            for task in tasks:
                model.train()(images(task, dtype=dtype), task)
    return model.eval()


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("kind", NORMS)
def test_each_tasks_statistics_are_those_of_a_network_of_its_own(kind, momentum):
    """The same batches through a plain network per task, its masked weights put in by hand."""
    model = model_of(kind, momentum=momentum)
    assert isinstance(model.net.norm, TaskStatistics) and isinstance(model.net.norm, type(NORMS[kind]()))
    seen(model)
    for task in range(3):
        plain = Net(NORMS[kind](momentum=momentum))
        plain.load_state_dict(dict(zip(model.layout.names, model.mask(task).effective, strict=True)), strict=False)
        with torch.no_grad():
            for _ in range(2):
                plain.train()(images(task))
        for name in STATISTICS:
            torch.testing.assert_close(getattr(model.net.norm, name)[task], getattr(plain.norm, name))
        x = images(7)
        torch.testing.assert_close(model(x, task), plain.eval()(x))
        exported = model.export(task)
        assert type(exported.norm) is type(plain.norm)
        torch.testing.assert_close(exported(x), plain(x))
        reloaded = Net(NORMS[kind](momentum=momentum)).eval()
        reloaded.load_state_dict(exported.state_dict())
        torch.testing.assert_close(reloaded(x), plain(x))


@pytest.mark.parametrize("kind", NORMS)
def test_every_way_to_ask(kind, monkeypatch):
    model = seen(model_of(kind))
    x, tasks = images(), torch.tensor([2, 0, 1, 1, 2, 0])
    torch.testing.assert_close(
        model(x, tasks), torch.cat([model(x[i : i + 1], t) for i, t in enumerate(tasks.tolist())])
    )
    torch.testing.assert_close(model.forward_all_tasks(x), torch.stack([model(x, t) for t in range(3)]))
    expected = model(x, 2)
    other = copy.deepcopy(model)
    monkeypatch.setattr("hypermask_fast.mask_making.values_at_hand", lambda tensor: False)
    torch.testing.assert_close(model(x, torch.tensor(2)), expected)
    model.train()(x, torch.tensor(2))
    other.train()(x, 2)
    for name in STATISTICS:
        torch.testing.assert_close(getattr(model.net.norm, name), getattr(other.net.norm, name))


@pytest.mark.parametrize("kind", NORMS)
def test_saved_resumed_added_removed_frozen(kind):
    model = seen(model_of(kind))
    again = model_of(kind)
    again.load_state_dict(load(save(model.state_dict())))
    x = images(9)
    for task in range(3):
        assert torch.equal(again.eval()(x, task), model(x, task))
    seen(model, [1], 1)
    seen(again, [1], 1)
    assert torch.equal(model.net.norm.running_var, again.net.norm.running_var)
    new = model.add_task(like=2)
    torch.testing.assert_close(model(x, new), model(x, 2))
    seen(model, [new], 1)
    assert not torch.equal(model.net.norm.running_mean[new], model.net.norm.running_mean[2])
    assert torch.equal(model.net.norm.running_mean[2], again.net.norm.running_mean[2])
    model.remove_task(0)
    assert (model.net.norm.running_mean[0] == 0).all() and model.net.norm.num_batches_tracked[0] == 0
    model.freeze_task(1)
    before = {name: getattr(model.net.norm, name).clone() for name in STATISTICS}
    seen(model, [1])
    assert all(torch.equal(getattr(model.net.norm, name), tensor) for name, tensor in before.items())


@pytest.mark.parametrize("kind", NORMS)
def test_official_fidelity_always_uses_the_batchs_own(kind):
    model = model_of(kind, fidelity="official")
    before = {name: getattr(model.net.norm, name).clone() for name in STATISTICS}
    x = images(3)
    plain = Net(NORMS[kind]())
    plain.load_state_dict(dict(zip(model.layout.names, model.mask(1).effective, strict=True)), strict=False)
    expected = plain.train()(x)
    torch.testing.assert_close(model.train()(x, 1), expected)
    torch.testing.assert_close(model.eval()(x, 1), expected)
    assert all(torch.equal(getattr(model.net.norm, name), tensor) for name, tensor in before.items())
    exported = model.export(1)
    torch.testing.assert_close(exported(x), expected)
    assert not any("running" in name for name in exported.state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["BatchNorm1d", "SyncBatchNorm", "InstanceNorm1d affine"])
def test_other_dtypes(kind, dtype):
    model = seen(model_of(kind, dtype=dtype), dtype=dtype)
    assert model.net.norm.running_mean.dtype == dtype and (model.net.norm.running_var != 1).any(1).all()
    x, tasks = images(dtype=dtype), torch.tensor([2, 0, 1, 1, 2, 0])
    y = model(x, tasks)
    assert y.dtype == dtype
    expected = torch.cat([model(x[i : i + 1], t) for i, t in enumerate(tasks.tolist())])
    torch.testing.assert_close(y, expected, rtol=1e-2, atol=1e-2)
    again = model_of(kind, dtype=dtype)
    again.load_state_dict(load(save(model.state_dict())))
    assert torch.equal(again.eval()(x, 2), model(x, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_of_several_tasks_keep_the_networks_dtype(dtype):
    norm = nn.BatchNorm1d(4).to(dtype)
    model = hmf.HyperMask(nn.Sequential(nn.Linear(2, 4, dtype=dtype), norm, nn.Linear(4, 3, dtype=dtype)), 3)
    with torch.no_grad():
        norm._buffers["running_mean"].normal_()
        norm._buffers["running_var"].uniform_(0.5, 2)
    x, tasks = torch.randn(6, 4, dtype=dtype), torch.tensor([2, 0, 1, 1, 2, 0])
    y = norm.eval().forward_rows(x, tasks)
    stacked = norm.stacked()
    expected = torch.stack(
        [
            nn.functional.batch_norm(row[None].double(), *(stacked[n][t].double() for n in STATISTICS[:2]))[0]
            for row, t in zip(x, tasks.tolist(), strict=True)
        ]
    )
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, **(HALF if dtype != torch.float32 else EXACT))
    del model


def test_instance_norm_without_statistics_is_left_alone():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = hmf.HyperMask(Net(nn.InstanceNorm1d(4)), 2)
    assert not isinstance(model.net.norm, TaskStatistics)
    assert model.eval()(images(), 1).isfinite().all()


def test_a_plain_networks_state_serves_every_task():
    model = seen(model_of("SyncBatchNorm"))
    plain = Net(nn.SyncBatchNorm(4))
    nn.init.constant_(plain.norm.running_mean, 5.0)
    model.net.load_state_dict(plain.state_dict())
    assert (model.net.norm.running_mean == 5).all() and model.net.norm.running_mean.shape == (3, 4)


@pytest.mark.parametrize("names", [["running_mean", "running_var", "num_batches_tracked"], ["running_var"]])
def test_statistics_that_two_modules_share_are_refused(names):
    """Each would have its own from then on."""
    first, second = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
    for name in names:
        setattr(second, name, getattr(first, name))
    net = nn.Sequential(nn.Linear(8, 4), first, second, nn.Linear(4, 2))
    with pytest.raises(InputError, match=f"2 has its {names[0]} together with 1"):
        hmf.HyperMask(net, 2)
    assert type(first) is nn.BatchNorm1d and first.running_var is second.running_var
    hmf.HyperMask(nn.Sequential(nn.Linear(8, 4), first, first, nn.Linear(4, 2)), 2)
