"""The life of a task: added, copied, frozen; a removed one has tests/test_removed_tasks.py."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.life import batch, model_of, own_of, train
from support.networks import blob_model
from torch import nn

import hypermask_fast as hmf
from hypermask_fast import InputError

# -- add_task ---------------------------------------------------------------------------------------------------------


def test_a_copy_of_a_task_is_that_task_and_then_its_own():
    model = train(model_of(2), 1)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    new = model.add_task(optimizer, like=1)
    assert new == 2
    x, _ = batch()
    torch.testing.assert_close(model(x, 2), model(x, 1))
    assert all(torch.equal(a, b) for a, b in zip(own_of(model, 1), own_of(model, 2), strict=True))
    before = copy.deepcopy(own_of(model, 1))
    train(model, 2, optimizer=optimizer)
    mine = own_of(model, 2)
    assert not any(torch.equal(a, b) for a, b in zip(mine, before, strict=True))  # the optimiser has got all of them
    assert all(
        torch.equal(a, b) for a, b in zip(own_of(model, 1)[1:], before[1:], strict=True)
    )  # R moves the embedding


def test_a_copy_of_a_frozen_task_is_trained():
    model = train(model_of(2), 0)
    model.freeze_task(0)
    new = model.add_task(like=0)
    assert all(
        parameter.requires_grad for parameter in (model.hypernet.embeddings[new], *(v[new] for v in model.own.values()))
    )


def test_a_new_task_begins_with_what_the_network_came_with():
    net = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    nn.init.constant_(net[1].running_mean, 3.0)
    nn.init.constant_(net[1].weight, 2.0)
    model = hmf.HyperMask(net, 1, per_task="norm")
    train(model, 0)
    new = model.add_task()
    assert (net[1].running_mean[new] == 3).all() and not (net[1].running_mean[0] == 3).any()
    assert (model.own["1/weight"][new] == 2).all() and not (model.own["1/weight"][0] == 2).all()


@pytest.mark.parametrize("optimizer", [2, "foreign"])
def test_an_optimiser_that_is_none_of_the_models(optimizer):
    model = model_of(2)
    if optimizer == "foreign":
        optimizer = torch.optim.Adam(model_of(2).parameters())
    with pytest.raises(InputError, match="takes this model's optimizer, not"):
        model.add_task(optimizer)
    assert model.num_tasks == 2 and model.net[1].running_mean.shape[0] == 2


@pytest.mark.parametrize(
    ("like", "message"), [(2, "task 2 does not exist"), (0, "task 0 was removed"), (True, "integer")]
)
def test_no_copy_of_what_is_not_there(like, message):
    model = model_of(2)
    model.remove_task(0)
    with pytest.raises(InputError, match=message):
        model.add_task(like=like)
    assert model.num_tasks == 2 and len(model.own["0/bias"]) == 2 and len(model.net[1].running_mean) == 2


# -- freeze_task ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_tensor", [False, True])
def test_a_frozen_task_stays_as_it_is(by_tensor, monkeypatch):
    model = train(model_of(3), 0)
    train(model, 1)
    model.freeze_task(1)
    before = copy.deepcopy(own_of(model, 1))
    weight = model.net[0].weight.detach().clone()
    if by_tensor:
        monkeypatch.setattr("hypermask_fast.mask_making.values_at_hand", lambda tensor: False)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2, weight_decay=0.1)
    model.train()
    for task in (1, 2, 1):
        x, y = batch(task)
        asked = torch.tensor(task) if by_tensor else task
        loss = F.cross_entropy(model(x, asked), y) + (model.regularizer(2) if task == 2 else 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(own_of(model, 1), before, strict=True))
    assert not torch.equal(model.net[0].weight, weight)
    assert model.net[1].num_batches_tracked.tolist() == [3, 3, 1]


def test_a_frozen_task_in_training_mode_still_uses_the_batchs_statistics():
    model = blob_model(2, per_task="norm")
    model.net[3].p = 0.0
    x, _ = batch()
    for momentum in (0.1, None):  # None: a cumulative average
        model.net[1].momentum = momentum
        with torch.no_grad():
            model.freeze_task(0, frozen=False)
            expected = model.train()(x, 0)
            model.freeze_task(0)
            assert torch.equal(model(x, 0), expected)


def test_frozen_and_thawed():
    model = model_of(2)
    (model.hypernet.embeddings[1].sum() + model.own["0/bias"][1].sum()).backward()
    model.freeze_task(1)
    assert model.hypernet.embeddings[1].grad is None  # or the next step would still move it
    assert not any(p.requires_grad for p in (model.hypernet.embeddings[1], model.own["0/bias"][1]))
    model.freeze_task(1, frozen=False)
    assert all(p.requires_grad for p in (model.hypernet.embeddings[1], model.own["0/bias"][1])) and model.frozen == ()


def test_thawing_leaves_what_the_user_has_frozen():
    net = nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    net[1].bias.requires_grad_(False)
    model = hmf.HyperMask(net, 2, per_task="norm")
    model.freeze_task(0)
    model.freeze_task(0, frozen=False)
    assert model.own["1/weight"][0].requires_grad and not model.own["1/bias"][0].requires_grad


@pytest.mark.parametrize("do", ["freeze", "thaw", "remove", "load"])
def test_a_task_that_the_user_has_frozen_stays_so(do):
    """By requires_grad, which says nothing to the model: whatever happens to other tasks."""
    model = model_of(4)
    kept = [model.hypernet.embeddings[0], model.own["0/bias"][0]]
    for parameter in kept:
        parameter.requires_grad_(False)
    if do == "load":
        model.load_state_dict(model_of(4).state_dict())
    elif do == "remove":
        model.remove_task(2)
    else:
        model.freeze_task(1)
        model.freeze_task(1, frozen=do == "freeze")
    assert not any(parameter.requires_grad for parameter in kept)
    assert model.hypernet.embeddings[1].requires_grad == (do != "freeze")


# -- the plain network ------------------------------------------------------------------------------------------------


def test_disabled_is_the_network_that_came():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.LayerNorm(6), nn.Linear(6, 2))
    plain = copy.deepcopy(net).eval()
    model = hmf.HyperMask(net, 2, 30, per_task="norm").eval()
    x, _ = batch()
    with model.disabled():
        assert torch.equal(model.net(x), plain(x))
    train(model, 0)
    with model.disabled():
        y = model.net(x)
    state = {
        name: tensor for name, tensor in model.net.state_dict().items() if "running" not in name and "num_b" not in name
    }
    plain.load_state_dict(state, strict=False)
    assert torch.equal(y, plain(x))  # shared weights have learnt; its own statistics and affine parameters have not
    assert not torch.equal(model(x, 0), y)


def test_unconverted_it_is_the_plain_network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.LayerNorm(6), nn.Linear(6, 2))
    types, names = [type(m) for m in net.modules()], list(net.state_dict())
    model = hmf.HyperMask(net, 3, 30, per_task="norm", classes=[2, 1, 2])
    train(model, 0)
    model.freeze_task(1)
    model.remove_task(2)
    x, _ = batch()
    with model.disabled():
        expected = model.net(x)
    found = model.unconvert()
    assert found is net and [type(m) for m in net.modules()] == types and list(net.state_dict()) == names
    assert not any("mask" in key or key in ("frozen", "batch_statistics") for m in net.modules() for key in vars(m))
    assert not net._forward_hooks and not net._forward_pre_hooks and not net._forward_pre_hooks_with_kwargs
    assert torch.equal(net(x), expected)
    hmf.HyperMask(net, 1)  # and it can be masked again


# -- counting ---------------------------------------------------------------------------------------------------------


def test_print_trainable_parameters(capsys):
    model = blob_model(3, per_task="norm", hypernetwork=hmf.HypernetConfig(8, (12,)))
    model.freeze_task(0)
    model.remove_task(2)
    model.print_trainable_parameters()
    lines = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
    hypernetwork = 8 * 12 + 12 + 178 * 13
    masked = 8 * 16 + 16 + 16 * 2 + 2
    assert lines == [
        ["trainable", "all", "parameters of"],
        [str(masked), str(masked), "network, masked"],
        ["32", "96", "network, per task"],
        [f"{hypernetwork:,}", f"{hypernetwork:,}", "hypernetwork"],
        ["8", "16", "embeddings of 2 tasks"],
        [f"{masked + 32 + hypernetwork + 8:,}", f"{masked + 96 + hypernetwork + 16:,}", "all of them"],
    ]


def test_a_model_whose_network_has_been_given_back():
    model = blob_model(2)
    model.unconvert()
    for call in (lambda: model(torch.randn(2, 8), 0), lambda: model.export(0), model.add_task, lambda: model.net):
        with pytest.raises(InputError, match="has given this model's network back"):
            call()
    assert model.num_tasks == 2
