"""The life of a task: added, copied, frozen, removed."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.networks import blob_model, blob_scenario
from torch import nn

import hypermask_fast as hmf
from hypermask_fast import InputError
from hypermask_fast.training.config import TrainingConfig
from hypermask_fast.training.evaluation import entropy_accuracy
from hypermask_fast.training.trainer import Trainer

CHUNKED = hmf.HypernetConfig(6, (10,), 30, 4)
HYPERNETWORKS = [None, CHUNKED, hmf.HypernetConfig(6, (10,), 30, 4, by_tensor=True)]


def model_of(tasks=4, **settings):
    return blob_model(tasks, **{"per_task": ["0.bias", "norm"], "lam": 0.1, **settings})


def batch(seed=0, n=12):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 8, generator=generator), torch.randint(2, (n,), generator=generator)


def train(model, task, steps=3, optimizer=None):
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2) if optimizer is None else optimizer
    for step in range(steps):
        x, y = batch(100 * task + step)
        loss = F.cross_entropy(model(x, task), y) + model.regularizer(task)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def stir(model):
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)


def own_of(model, task):
    """All that belongs to one task alone."""
    values = [model.hypernet.embeddings[task], *(values[task] for values in model.own.values())]
    return [
        *values,
        model.net[1].running_mean[task],
        model.net[1].running_var[task],
        model.net[1].num_batches_tracked[task],
    ]


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


@pytest.mark.parametrize(
    ("like", "message"), [(2, "task 2 does not exist"), (0, "task 0 was removed"), (True, "integer")]
)
def test_no_copy_of_what_is_not_there(like, message):
    model = model_of(2)
    model.remove_task(0)
    with pytest.raises(InputError, match=message):
        model.add_task(like=like)
    assert model.num_tasks == 2 and len(model.own["0/bias"]) == 2 and len(model.net[1].running_mean) == 2


# -- remove_task ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hypernetwork", HYPERNETWORKS)
def test_ids_of_others_stay(hypernetwork):
    model = model_of(**({} if hypernetwork is None else {"hypernetwork": hypernetwork})).eval()
    x, _ = batch()
    before = [model(x, task) for task in range(4)]
    model.remove_task(1)
    assert model.tasks == (0, 2, 3) and model.num_tasks == 4
    for task in model.tasks:
        torch.testing.assert_close(model(x, task), before[task])
    assert model.add_task() == 4 and model.tasks == (0, 2, 3, 4)


def entry_points():
    x, _ = batch()
    mixed = torch.tensor([0, 1] * 6)
    return {
        "forward": lambda m: m(x, 1),
        "by name": lambda m: m(x, task=1),
        "tensor": lambda m: m(x, torch.tensor(1)),
        "mixed": lambda m: m(x, mixed),
        "mask": lambda m: m.mask(1),
        "all_masks": lambda m: m.all_masks([0, 1]),
        "use_task": lambda m: m.use_task(1).__enter__(),
        "export": lambda m: m.export(1),
        "begin": lambda m: m.begin_task(1),
        "regularizer": lambda m: m.regularizer(1),
        "drifts": lambda m: m.drifts(1),
        "freeze": lambda m: m.freeze_task(1),
        "remove": lambda m: m.remove_task(1),
    }


@pytest.mark.parametrize("name", entry_points())
def test_a_removed_task_asked_for_is_refused(name):
    model = model_of().eval()
    model.remove_task(1)
    with pytest.raises(InputError, match=r"^task 1 was removed: this model has tasks 0, 2, 3$"):
        entry_points()[name](model)


def test_a_mask_from_before_the_removal_is_refused():
    model = model_of().eval()
    x, _ = batch()
    mask = model.mask(1)
    masks = model.all_masks()
    model.remove_task(1)
    for call in (
        lambda: model(x, mask),
        lambda: model.forward_all_tasks(x, masks=masks),
        lambda: model.regularizer(mask),
    ):
        with pytest.raises(InputError, match="task 1 was removed"):
            call()


def test_a_task_that_is_not_looked_at_and_was_removed_gives_nan(monkeypatch):
    model = model_of().eval()
    model.remove_task(0)
    x, _ = batch()
    expected = model(x, 2)
    monkeypatch.setattr("hypermask_fast.mask_making.values_at_hand", lambda tensor: False)
    assert model(x, torch.tensor(0)).isnan().all()
    torch.testing.assert_close(model(x, torch.tensor(2)), expected)


def test_all_tasks_by_id():
    model = model_of().eval()
    x, _ = batch(n=30)
    before = model.forward_all_tasks(x)
    model.remove_task(1)
    outputs = model.forward_all_tasks(x)
    assert outputs.shape == before.shape and outputs[1].isnan().all()
    torch.testing.assert_close(outputs[[0, 2, 3]], before[[0, 2, 3]])
    masks = model.all_masks()
    assert [mask.task for mask in masks] == [0, 2, 3]
    torch.testing.assert_close(model.forward_all_tasks(x, masks=masks), before[[0, 2, 3]])  # rows as the masks lie
    entropy = torch.distributions.Categorical(logits=before).entropy()
    entropy[1] = torch.inf
    assert torch.equal(model.infer_task(x), entropy.argmin(0)) and 3 in entropy.argmin(0)
    for given in (None, masks, list(masks)):
        found = hmf.predict(model, x, given)
        assert torch.equal(found.task, entropy.argmin(0))  # ids, whichever masks are given
        assert torch.equal(found.label, model(x, found.task).argmax(-1))


def test_several_outputs_by_id():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 3)

        def forward(self, x):
            y = self.fc(x)
            return {"logits": y, "label": y.argmax(-1)}

    model = hmf.HyperMask(Two(), 3, heads="fc").eval()
    model.remove_task(0)
    outputs = model.forward_all_tasks(batch()[0])
    assert outputs["logits"][0].isnan().all() and (outputs["label"][0] == -1).all()
    assert (outputs["label"][1:] >= 0).all()


@pytest.mark.parametrize("hypernetwork", HYPERNETWORKS)
@pytest.mark.parametrize("fidelity", ["default", "official"])
def test_drifts_and_their_scale_count_what_is_left(hypernetwork, fidelity):
    """R over the tasks that are left, by autograd over the logits in float64; before and after the task begins."""
    settings = {} if hypernetwork is None else {"hypernetwork": hypernetwork}

    def expected(model, targets, previous):
        left = [j for j in model.tasks if j < 3]
        output = sum((model.hypernet([j])[0] - targets[j]).square().sum() for j in left)
        masks = model.mask(3).masks().values()
        weight = sum(((w - p) * m).abs().sum() for w, p, m in zip(model.weights(), previous, masks, strict=True))
        return 0.5 * output / len(left) ** (2 if fidelity == "official" else 1) + 0.1 * weight

    for early in (True, False):
        model = model_of(beta=0.5, fidelity=fidelity, **settings).double().eval()
        if early:
            model.remove_task(1)
        model.begin_task(3)
        if not early:
            model.remove_task(1)
        assert model.regularizer(3) < 1e-28  # the last bits of a product's rows depend on how many there are
        targets = [model.hypernet([j])[0].detach() for j in range(4)]
        previous = [weight.detach().clone() for weight in model.weights()]
        stir(model)
        by_hand = expected(model, targets, previous)
        found = model.regularizer(3)
        torch.testing.assert_close(found, by_hand)
        trained = [p for p in model.parameters() if p.requires_grad]
        for a, b in zip(*(torch.autograd.grad(r, trained, allow_unused=True) for r in (found, by_hand)), strict=True):
            torch.testing.assert_close(a, b)


def test_without_an_earlier_task_there_is_no_drift():
    for early in (True, False):
        model = model_of(2)
        if early:
            model.remove_task(0)
        model.begin_task(1)
        if not early:
            model.remove_task(0)
        stir(model)
        assert model.regularizer(1) == 0  # as in a first task
        train(model, 1)


@pytest.mark.parametrize("hypernetwork", HYPERNETWORKS)
def test_the_librarys_optimiser_goes_on(hypernetwork):
    model = model_of(**({} if hypernetwork is None else {"hypernetwork": hypernetwork})).double()
    ordinary = copy.deepcopy(model)
    for one in (model, ordinary):
        optimizer = hmf.optim.Adam(one, 1e-2) if one is model else torch.optim.Adam(one.parameters(), 1e-2)
        for removed in ((), (1,)):
            for task in removed:
                one.remove_task(task)
            for step in range(3):
                one.train()
                torch.manual_seed(step)
                mask = one.mask(2)
                x, y = batch(step)
                loss = F.cross_entropy(one(x.double(), mask), y) + one.regularizer(mask)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    torch.testing.assert_close(model.state_dict(), ordinary.state_dict())
    assert all((value == 0).all() for value in own_of(model, 1)[:-3])


def test_the_last_task_stays():
    model = model_of(2)
    model.remove_task(0)
    with pytest.raises(InputError, match="task 1 is the only one left"):
        model.remove_task(1)


def test_evaluation_has_nan_for_a_removed_task():
    model, scenario = blob_model(3), blob_scenario(3)
    before = entropy_accuracy(model, scenario, 50)
    assert before.task.isfinite().all()
    model.remove_task(1)
    found = entropy_accuracy(model, scenario, 50)
    assert found.task[1].isnan() and found.label[1].isnan()
    assert (found.task[[0, 2]] >= before.task[[0, 2]]).all()  # one wrong choice less
    with pytest.raises(InputError, match="has 3 tasks, of which the model lacks 1"):
        Trainer(model, scenario, TrainingConfig(iterations=2, batch_size=8))


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
