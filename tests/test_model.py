"""HyperMask as its user sees it."""

import copy
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.networks import blob_model, small_convnet
from torch import nn

import hypermask_fast as hmf
from hypermask_fast import InputError


def images(n=6, seed=0):
    return torch.randn(n, 2, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_forward_is_the_plain_network_with_masked_weights(convnet_model):
    model = convnet_model.eval()
    masks = model.mask(1).masks()
    plain = small_convnet().eval()
    state = {k: v for k, v in model.net.state_dict().items() if "running" not in k and "tracked" not in k}
    for name, mask in masks.items():
        if name != "5.bias":  # the output layer's bias is used as it is
            state[name] = state[name] * mask
    plain.load_state_dict(state, strict=False)
    torch.testing.assert_close(model(images(), 1), plain(images()))
    assert model.mask(1).sparsity().item() == pytest.approx(30, abs=1)


def test_parameters_are_shared_and_keep_their_names():
    net = small_convnet()
    state = copy.deepcopy(net.state_dict())
    before = dict(net.named_parameters())
    model = hmf.HyperMask(net, 4, 50)
    assert all(parameter is before[name] for name, parameter in model.net.named_parameters())
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    model.net.load_state_dict(state)  # of the plain network, statistics included
    assert torch.equal(model.net[5].weight, state["5.weight"])
    assert torch.equal(model.net[1].running_var[3], state["1.running_var"])


def test_ramp_sparsity_in_place_of_the_models_own(convnet_model):
    for sparsity in (0, 10, 90):
        zeros = [
            (m == 0).sum().item() for name, m in convnet_model.mask(0, sparsity).masks().items() if name != "5.bias"
        ]
        sizes = [segment.size for segment in convnet_model.layout.segments[:-1]]
        assert zeros == [hmf.functional.kept_rank(sparsity, size) for size in sizes]


def test_no_mask_is_left_behind(convnet_model):
    def plain():
        with convnet_model.disabled():
            return convnet_model.net(images())

    before, weight = plain(), convnet_model.net[0].weight
    convnet_model.eval()(images(), 1)
    assert convnet_model.net[0].weight is weight
    convnet_model.train()
    assert torch.equal(plain(), before)
    with pytest.raises(InputError):
        convnet_model(torch.randn(1, 2, 3, 3), 1)  # too small for the flattening: fails inside the network
    assert convnet_model.net[0].weight is weight
    assert torch.equal(plain(), before)


def test_two_threads_two_tasks(convnet_model):
    model = convnet_model.eval()
    expected = [model(images(), task) for task in range(3)]
    failures = []

    def work(task):
        for _ in range(30):
            if not torch.equal(model(images(), task), expected[task]):
                failures.append(task)

    threads = [threading.Thread(target=work, args=(task,)) for task in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_one_task_per_sample(convnet_model):
    model = convnet_model.eval()
    tasks = torch.tensor([2, 0, 0, 2, 1, 0])
    by_hand = torch.cat([model(images()[i : i + 1], task) for i, task in enumerate(tasks.tolist())])
    torch.testing.assert_close(model(images(), tasks), by_hand)
    torch.testing.assert_close(model(images(), torch.tensor(2)), model(images(), 2))
    assert model(images(0), torch.empty(0, dtype=torch.int64)).shape == (0, 5)
    gradients = [
        torch.autograd.grad(output.square().sum(), model.hypernet.output.weight)[0]
        for output in (model(images(), tasks), by_hand)
    ]
    torch.testing.assert_close(*gradients)


def test_all_tasks_and_task_inference(convnet_model):
    model = convnet_model.eval()
    outputs = model.forward_all_tasks(images())
    torch.testing.assert_close(outputs, torch.stack([model(images(), task) for task in range(3)]))
    p = outputs.softmax(-1)
    assert torch.equal(model.infer_task(images()), (p * p.log()).sum(-1).argmax(0))
    x = 3 * images(40, seed=1)
    found = hmf.predict(model, x)
    assert len(found.task.unique()) > 1
    assert torch.equal(found.task, model.infer_task(x))
    assert torch.equal(found.label, model(x, found.task).argmax(-1))
    assert torch.equal(found.absolute(5), 5 * found.task + found.label)


@pytest.mark.parametrize("fidelity", ["default", "official"])
def test_export_gives_the_same_outputs(fidelity):
    torch.manual_seed(0)
    model = hmf.HyperMask(small_convnet(), 3, 30, fidelity=fidelity)
    for task in range(3):
        model((task + 1.0) * images(seed=task), task)
    model.eval()
    plain = model.export(2)
    assert [type(m) for m in plain] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Conv2d, nn.Flatten, nn.Linear]
    assert torch.equal(plain(images()), model(images(), 2))
    assert not any("mask" in key for module in plain for key in vars(module))
    reloaded = small_convnet() if fidelity == "default" else copy.deepcopy(plain)
    reloaded.load_state_dict(plain.state_dict())  # an ordinary state_dict
    assert torch.equal(reloaded.eval()(images()), model(images(), 2))
    assert isinstance(model.net[0], hmf.MaskedConv2d)  # the model is untouched


def test_add_task_while_training():
    model = blob_model(2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    x, y = torch.randn(32, 8), torch.randint(2, (32,))
    step(model, optimizer, x, y, 0)
    assert model.add_task(optimizer) == 2
    before = model.hypernet.embeddings[2].clone()
    loss = step(model, optimizer, x, y, 2)
    assert step(model, optimizer, x, y, 2) < loss
    assert not torch.equal(model.hypernet.embeddings[2], before)
    assert model.net[1].running_mean.shape == (3, 16)


def step(model, optimizer, x, y, task):
    loss = F.cross_entropy(model(x, task), y) + model.regularizer(task)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize("fidelity", ["default", "official"])
@pytest.mark.parametrize("masked", [True, False])
def test_regularizer(fidelity, masked):
    model = blob_model(3, beta=0.5, lam=0.25, drift_masked=masked, fidelity=fidelity)
    assert model.regularizer(2).item() == pytest.approx(0, abs=1e-12)  # the task begins here
    targets = [model.hypernet([j])[0].detach() for j in range(2)]
    previous = [weight.detach().clone() for weight in model.weights()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    masks = model.mask(2).masks().values()
    output = sum((model.hypernet([j])[0] - targets[j]).square().sum() for j in range(2))
    weight = sum(
        ((w - p) * (m if masked else 1)).abs().sum() for w, p, m in zip(model.weights(), previous, masks, strict=True)
    )
    expected = 0.5 * output / (4 if fidelity == "official" else 2) + 0.25 * weight
    torch.testing.assert_close(model.regularizer(2), expected)
    torch.testing.assert_close(model.regularizer(model.mask(2)), expected)
    expected.backward()
    touched = {name for name, p in model.named_parameters() if p.grad is not None}
    assert {"hypernet.embeddings.0", "hypernet.embeddings.1", "net.0.weight"} <= touched
    assert ("hypernet.embeddings.2" in touched) == masked  # the current task's mask is not detached


@pytest.mark.parametrize("fidelity", ["default", "official"])
def test_weight_drift_does_not_count_in_the_first_task(fidelity):
    model = blob_model(2, lam=0.25, fidelity=fidelity)
    for task in (0, 1):
        model.begin_task(task)
        with torch.no_grad():
            for weight in model.weights():
                weight += 0.1
        drift = model.drifts(task).weight
        assert drift > 0
        torch.testing.assert_close(model.regularizer(task), task * 0.25 * drift)
        gradients = torch.autograd.grad(
            model.regularizer(task) + 0 * model(torch.ones(4, 8), task).sum(), model.weights()
        )
        assert all((grad != 0).any() for grad in gradients) == (task > 0)


@pytest.mark.parametrize("norm", [1, 2])
def test_weight_drift_comes_with_the_masked_weights(norm):
    """In a training step one pass makes both; the numbers are those of two."""
    model = blob_model(2, lam=0.25, drift_norm=norm).eval()
    model.begin_task(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    x = torch.randn(4, 8)

    def step(apart):
        mask = model.mask(1)
        drift = model.drifts(mask).weight if apart else None
        y = model(x, mask)
        assert mask.weight_drift(model.anchor.weights) is not None
        drift = drift if apart else model.drifts(mask).weight
        return [y, drift, *torch.autograd.grad(y.square().sum() + drift, model.parameters(), allow_unused=True)]

    for one, two in zip(step(apart=False), step(apart=True), strict=True):
        assert (one is None) == (two is None)
        if one is not None:
            torch.testing.assert_close(one, two)


@pytest.mark.parametrize("chunk_size", [None, 30])
def test_a_training_steps_mask_and_drift_share_one_pass_of_the_trunk(chunk_size, monkeypatch):
    """The numbers are those of a pass each."""
    hypernetwork = hmf.HypernetConfig(6, (10, 10), chunk_size, 4)
    model = blob_model(3, beta=0.5, hypernetwork=hypernetwork).double().eval()
    model.begin_task(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    x = torch.randn(4, 8, dtype=torch.float64)
    passes = []
    generating = model.hypernet.generating
    monkeypatch.setattr(model.hypernet, "generating", lambda tasks: passes.append(tasks) or generating(tasks))

    def step(mask_for_drift):
        mask = model.mask(2)
        y = model(x, mask)
        loss = y.square().sum() + model.regularizer(mask if mask_for_drift else 2)
        return [y, *torch.autograd.grad(loss, model.parameters())]

    torch.testing.assert_close(step(mask_for_drift=True), step(mask_for_drift=False))
    assert passes == [range(3)] * 3


@pytest.mark.parametrize("chunk_size", [None, 30])
def test_autocast_around_a_whole_forward_pass_is_for_the_network_alone(chunk_size):
    model = blob_model(2, hypernetwork=hmf.HypernetConfig(6, (10, 10), chunk_size, 4)).eval()
    model.begin_task(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1
    x = torch.randn(4, 8)
    expected = model.mask(1)
    drifts = model.drifts(1)
    with torch.autocast("cpu", torch.bfloat16):
        mask = model.mask(1)
        y = model(x, mask)
        found = model.drifts(mask)
        everyone = model.forward_all_tasks(x)
        loss = y.square().sum() + model.regularizer(mask)
    loss.backward()
    assert y.dtype == everyone.dtype == torch.bfloat16
    assert torch.equal(mask.logits, expected.logits)
    assert torch.equal(mask.thresholds, expected.thresholds)
    torch.testing.assert_close(found, drifts)
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("chunk_size", [None, 30])
def test_autocast_around_the_backward_pass(chunk_size):
    """PyTorch advises against it, but it works; PyTorch's own products are then bfloat16."""
    model = blob_model(2, hypernetwork=hmf.HypernetConfig(6, (10, 10), chunk_size, 4))
    model.begin_task(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1

    def gradients(autocast):
        mask = model.mask(1)
        loss = mask.logits.square().sum() + model.regularizer(mask)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            layer = model.hypernet.output
            return torch.autograd.grad(loss, [layer.weight, layer.bias, *model.weights()])

    torch.testing.assert_close(gradients(True), gradients(False), rtol=2e-2, atol=2e-2)


def test_a_mask_answers_for_its_own_anchor_only():
    model = blob_model(2, lam=0.25)
    model.begin_task(1)
    with torch.no_grad():
        for weight in model.weights():
            weight += 0.1
    mask = model.mask(1)
    model(torch.randn(4, 8), mask)
    assert model.drifts(mask).weight > 0
    model.begin_task(1)
    assert model.drifts(mask).weight == 0


@pytest.mark.parametrize("how", ["another", "a copy", "before an exchange"])
def test_a_mask_of_other_weights_is_refused(how):
    """It would have this model's network run with the other's weights."""
    model = blob_model(2)
    mask, masks = model.mask(1), model.all_masks()
    if how == "another":
        model = blob_model(2)
    elif how == "a copy":
        model = copy.deepcopy(model)
    else:
        model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    x = torch.randn(4, 8)
    calls = [
        lambda: model(x, mask),
        lambda: model.use_task(mask).__enter__(),
        lambda: model.regularizer(mask),
        lambda: model.drifts(mask),
        lambda: model.forward_all_tasks(x, masks=masks),
        lambda: model.forward_all_tasks(x, [model.mask(0), mask]),
    ]
    for call in calls:
        with pytest.raises(InputError, match="made by another model, or of other weights"):
            call()
    assert model.anchor is None


@pytest.mark.parametrize("task", [-1, 3])
@pytest.mark.parametrize("chunk_size", [None, 30])
def test_a_task_tensor_that_is_not_looked_at(task, chunk_size, monkeypatch):
    """As on a GPU: NaN for a task that does not exist, batch norm with statistics per task included."""
    model = hmf.HyperMask(
        nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)),
        num_tasks=3,
        sparsity=40,
        hypernetwork=hmf.HypernetConfig(6, (10,), chunk_size, 4),
    ).eval()
    x = torch.randn(4, 8)
    expected = model(x, 2)
    monkeypatch.setattr("hypermask_fast.mask_making.values_at_hand", lambda tensor: False)
    assert torch.equal(model(x, torch.tensor(2)), expected)
    assert model(x, torch.tensor(task)).isnan().all()


def test_drift_targets_of_the_first_task_are_none():
    model = blob_model(2)
    model.begin_task(0)
    assert model.anchor.targets == ()
    assert model.drifts(0).output.item() == 0


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (3, "task 3 does not exist: this model has tasks 0 to 2"),
        (-1, "task -1 does not exist"),
        (1.0, "a task is an integer from 0 to 2, not 1.0"),
        (True, "a task is an integer"),
        (torch.tensor(5), "task 5 does not exist"),
        (torch.tensor([0, 1, 2, 3, 0, 0]), "task 3 does not exist"),
        (torch.tensor([0, 1]), r"int64 tensor \(6,\)"),
        (torch.tensor([0.0] * 6), r"int64 tensor \(6,\), not torch.float32"),
        (torch.tensor(1.0), "a task tensor is int64"),
        (torch.zeros(6, 1, dtype=torch.int64), r"a task tensor is int64, 0-dim \(or, for a forward pass, one id"),
    ],
)
def test_tasks_that_do_not_exist(convnet_model, task, message):
    with pytest.raises(InputError, match=message):
        convnet_model(images(), task)


def test_no_task_at_all_is_refused(convnet_model):
    with pytest.raises(InputError, match=r"no task to make a mask of: all_masks\(\) makes all"):
        convnet_model.all_masks([])
    with pytest.raises(InputError, match="masks must be those of a task or more, and there are none"):
        convnet_model.forward_all_tasks(torch.randn(2, 2, 8, 8), masks=[])


def test_numpy_integers_are_tasks(convnet_model):
    model = convnet_model.eval()
    torch.testing.assert_close(model(images(), np.int64(1)), model(images(), 1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 101}, "sparsity is a percentage from 0 to 100, not 101"),
        ({"sparsity": float("nan")}, "sparsity is a percentage"),
        ({"beta": -1}, "beta must be a finite number >= 0, not -1"),
        ({"lam": float("inf")}, "lam must be a finite number >= 0, not inf"),
        ({"lam": "1"}, "lam must be a finite number"),
        ({"hypernetwork": {"embedding": 3}}, "a HypernetConfig, not dict"),
        ({"drift_norm": 3}, "norm must be 1 or 2, not 3"),
        ({"fidelity": "exact"}, "fidelity must be one of default, official, not 'exact'"),
        ({"num_tasks": 0}, "num_tasks must be a whole number, 1 or more, not 0"),
    ],
)
def test_bad_arguments(settings, message):
    with pytest.raises(InputError, match=message):
        hmf.HyperMask(small_convnet(), **({"num_tasks": 2} | settings))


def test_wrong_ramp_sparsity(convnet_model):
    with pytest.raises(InputError, match="percentage"):
        convnet_model.mask(0, sparsity=-3)


def test_a_fraction_for_sparsity_is_warned_of():
    with pytest.warns(UserWarning, match="percent"):
        hmf.HyperMask(small_convnet(), 2, sparsity=0.3)
