"""state_dict: the anchor, and the settings that decide a model's numbers, go with it."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from support.networks import blob_model
from torch import nn

import hypermask_fast as hmf
from hypermask_fast import InputError

CHUNKED = hmf.HypernetConfig(6, (10,), 30, 4)
BY_TENSOR = hmf.HypernetConfig(6, (10,), 30, 4, by_tensor=True)
DENSE = hmf.HypernetConfig(8, (12,))


def by_torch(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def by_safetensors(state):
    return load(save(state))


def trained(task=2, **settings):
    """A model in the middle of a task."""
    model = blob_model(3, beta=0.5, lam=0.25, **settings)
    model.begin_task(task)
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


@pytest.mark.parametrize("through", [dict, copy.deepcopy, by_torch, by_safetensors])
@pytest.mark.parametrize("hypernetwork", [DENSE, CHUNKED, BY_TENSOR])
def test_within_a_task_and_back(through, hypernetwork):
    model = trained(hypernetwork=hypernetwork)
    expected = model.regularizer(2)
    assert expected > 0
    again = blob_model(3, beta=0.5, lam=0.25, hypernetwork=hypernetwork).eval()
    again.load_state_dict(through(model.state_dict()))
    assert again.anchor.task == 2
    torch.testing.assert_close(again.regularizer(2), expected, rtol=0, atol=0)
    x = torch.randn(5, 8)
    assert torch.equal(again(x, 2), model(x, 2))
    with torch.no_grad():  # nothing is shared
        model.anchor.weights.zero_()
        model.anchor.targets[0].zero_()
    torch.testing.assert_close(again.regularizer(2), expected, rtol=0, atol=0)


def test_training_goes_on_bit_for_bit():
    def step(model, optimizer):
        torch.manual_seed(len(optimizer.state))
        x, y = torch.randn(16, 8), torch.randint(2, (16,))
        loss = F.cross_entropy(model.train()(x, 2), y) + model.regularizer(2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    model = trained()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    step(model, optimizer)
    again = blob_model(3, beta=0.5, lam=0.25)
    other = torch.optim.Adam(again.parameters(), 1e-2)
    again.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(model, optimizer)
    step(again, other)
    for (name, a), (_, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_within_another_module():
    model = trained()
    outer = nn.ModuleDict({"model": model, "other": nn.Linear(2, 2)})
    again = nn.ModuleDict({"model": blob_model(3, beta=0.5, lam=0.25).eval(), "other": nn.Linear(2, 2)})
    again.load_state_dict(outer.state_dict())
    torch.testing.assert_close(again["model"].regularizer(2), model.regularizer(2))


def test_between_tasks_there_is_no_anchor():
    model = blob_model(3)
    again = trained()
    again.load_state_dict(model.state_dict())
    assert again.anchor is None


def test_a_state_dict_of_an_earlier_version():
    model = trained()
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("state.")}
    again = blob_model(3, beta=0.5, lam=0.25)
    again.begin_task(0)
    anchor = again.anchor
    again.load_state_dict(state)
    assert again.anchor is anchor
    assert torch.equal(again.net[0].weight, model.net[0].weight)


def test_removed_and_frozen_tasks_go_with_it():
    model = blob_model(4, per_task="norm")
    model.remove_task(1)
    model.freeze_task(2)
    again = blob_model(4, per_task="norm")
    again.freeze_task(0)
    again.load_state_dict(by_safetensors(model.state_dict()))
    assert again.tasks == (0, 2, 3) and again.frozen == (2,) and again.net[1].frozen == (2,)
    trains = [embedding.requires_grad for embedding in again.hypernet.embeddings]
    assert trains == [True, False, False, True]
    assert [value.requires_grad for value in again.own["1/weight"]] == trains
    with pytest.raises(InputError, match="task 1 was removed"):
        again(torch.randn(2, 8), 1)
    copied = copy.deepcopy(model)
    assert copied.tasks == (0, 2, 3) and copied.frozen == (2,)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: blob_model(3, sparsity=30), "the state is of a model of 20 % sparsity, this one has 30 %"),
        (lambda: blob_model(3, sparsity=20.5), "this one has 20.5 %"),
        (lambda: blob_model(4), r"the state is of 3 tasks, this model has 4 \(add_task adds one\)"),
        (lambda: blob_model(3, exclude="0.bias"), "the state is of another layout"),
        (lambda: blob_model(3, classes=[2, 2, 1]), r"with classes None, this one has \[2, 2, 1\]"),
        (lambda: blob_model(3, heads="0"), "its output layer's bias is 4.bias, this model's is 0.bias"),
    ],
)
@pytest.mark.parametrize("inside", [False, True])
def test_another_model_is_refused_before_anything_changes(make, message, inside):
    model = make()
    model.begin_task(1)
    before, anchor = {name: tensor.clone() for name, tensor in model.state_dict().items()}, model.anchor
    whole, state = model, trained().state_dict()
    if inside:
        whole, state = nn.ModuleDict({"model": model}), {f"model.{name}": tensor for name, tensor in state.items()}
    with pytest.raises(InputError, match=message) as caught:
        whole.load_state_dict(state)
    assert "\n" not in str(caught.value)
    assert model.anchor is anchor and all(
        torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items()
    )


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("make", [DENSE, CHUNKED, hmf.HypernetConfig(9, (12,)), hmf.HypernetConfig(8, (13,))], ids=str)
def test_another_hypernetwork_is_refused_before_anything_changes(make, strict):
    model = trained(1, hypernetwork=BY_TENSOR if make is not CHUNKED else DENSE)
    before, anchor = copy.deepcopy(model.state_dict()), model.anchor
    with pytest.raises(InputError, match="another model: size mismatch for hypernet") as caught:
        model.load_state_dict(trained(hypernetwork=make).state_dict(), strict=strict)
    assert "\n" not in str(caught.value) and model.anchor is anchor
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def cut(state):
    state["state.anchor.targets.0"] = state["state.anchor.targets.0"][:1]


def without(state):
    del state["state.anchor.targets.0"]


def of_no_task(state):
    state["state.anchor.task"] = torch.tensor(3)


@pytest.mark.parametrize("hypernetwork", [DENSE, CHUNKED, BY_TENSOR])
@pytest.mark.parametrize("change", [cut, without, of_no_task])
def test_an_anchor_that_can_t_be_the_models_is_refused(change, hypernetwork):
    model, state = trained(1, hypernetwork=hypernetwork), trained(hypernetwork=hypernetwork).state_dict()
    anchor = model.anchor
    change(state)
    with pytest.raises(InputError, match="the state is of another model: .*task"):
        model.load_state_dict(state)
    assert model.anchor is anchor


@pytest.mark.parametrize("hypernetwork", [DENSE, CHUNKED])
@pytest.mark.parametrize(("saved", "loaded"), [("double", "float"), ("float", "double")])
def test_a_state_in_another_dtype(saved, loaded, hypernetwork):
    """The anchor is converted as Parameters are."""
    model, other = (
        getattr(trained(hypernetwork=hypernetwork), saved)(),
        getattr(trained(1, hypernetwork=hypernetwork), loaded)(),
    )
    other.load_state_dict(model.state_dict())
    assert other.regularizer(2).item() == pytest.approx(model.regularizer(2).item(), rel=1e-4)


class TwoWays(nn.Module):
    """Its head is defined first, so that only a run shows which layer is the last."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 3)
        self.body = nn.Linear(8, 6)

    def forward(self, x):
        return self.head(self.body(x).relu())


def test_a_state_tells_which_layer_is_the_output_layer():
    model = hmf.HyperMask(TwoWays(), 2, 50).eval()
    x = torch.randn(4, 8)
    y = model(x, 1)
    again = hmf.HyperMask(TwoWays(), 2, 50).eval()
    again.load_state_dict(model.state_dict())
    assert not again.layout.segments[1].selected and again.layout == model.layout
    assert torch.equal(again.mask(1).thresholds, model.mask(1).thresholds)  # before any pass
    assert torch.equal(again(x, 1), y)
    unknown = hmf.HyperMask(TwoWays(), 2, 50).eval()
    again.load_state_dict(unknown.state_dict())  # knows less: what is known stays
    assert not again.layout.segments[1].selected


# -- the reference of the running task --------------------------------------------------------------------------------


@pytest.mark.parametrize("hypernetwork", [DENSE, CHUNKED, BY_TENSOR])
@pytest.mark.parametrize("ours", [False, True])
def test_an_earlier_task_does_not_replace_the_reference(hypernetwork, ours):
    model = trained(hypernetwork=hypernetwork).train()
    optimizer = hmf.optim.Adam(model) if ours else None
    expected, anchor = model.eval().regularizer(2).item(), model.anchor
    model.train()
    for ask in (model.regularizer, model.drifts, lambda task: model.regularizer(model.mask(task))):
        with pytest.raises(InputError, match="which is gone since task 2 began"):
            ask(1)
    x = torch.randn(6, 8)
    calls = [
        lambda: model(x, 0),
        lambda: model(x, torch.tensor([0, 1, 2] * 2)),
        lambda: model(x, torch.tensor(1)),
        lambda: model.forward_all_tasks(x),
        lambda: model.export(0),
    ]
    for call in calls:
        try:
            call()
        except InputError as error:  # an optimiser that steps within the backward pass
            assert ours and "task 2 began" in str(error)
    assert model.anchor is anchor
    assert model.eval().regularizer(2).item() == pytest.approx(expected)
    del optimizer
