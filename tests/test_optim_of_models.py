"""Whose parameters an optimiser steps: those of one model, of its tasks, of copies, beside older optimisers."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from support.optimising import X, Y, ours, plain, refused_unchanged, small_model, train

import hypermask_fast as hmf
from hypermask_fast import InputError


def test_another_optimiser_takes_over_when_it_is_gone():
    model = small_model(1)
    optimizer = hmf.optim.Adam(model)
    del optimizer
    F.cross_entropy(model(X, 0), Y).backward()
    assert model.hypernet.output.weight.grad is not None


@pytest.mark.parametrize("newer", [{}, {"step_in_backward": True}], ids=str)
def test_an_older_optimiser_steps_no_part_of_the_model(newer):
    model = small_model(2)
    older = hmf.optim.Adam(model)
    optimizer = hmf.optim.Adam(model, **newer)
    optimizer.zero_grad()
    F.cross_entropy(model(X, model.mask(0)), Y).backward()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match="a newer hmf.optim.Adam has taken over"):
        older.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    optimizer.step()


def test_a_copy_has_no_optimiser_of_the_original():
    """The copy's masks come from its own output layer; it can be copied, pickled and trained."""
    model = small_model(2)
    optimizer = hmf.optim.Adam(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        model.hypernet.output.bias.add_(1)
    torch.testing.assert_close(copied.mask(0).logits + 1, model.mask(0).logits)
    assert pickle.loads(pickle.dumps(model)).num_tasks == 2
    F.cross_entropy(copied(X, 0), Y).backward()
    assert type(copied.hypernet.output.weight.grad) is torch.Tensor
    optimizer.step()


def test_what_adam_takes_is_the_model():
    with pytest.raises(InputError, match="the HyperMask model itself, .* not generator"):
        hmf.optim.Adam(small_model(2).parameters())


def test_a_task_that_the_optimiser_was_not_told_of_is_not_trained_in_silence():
    model = small_model(1)
    optimizer = hmf.optim.Adam(model)
    task = model.add_task()
    before = copy.deepcopy(model.state_dict())
    loss = F.cross_entropy(model(X, model.mask(task)), Y)
    with pytest.raises(InputError, match=r"would not train task 1, which is newer: .* model.add_task\(optimizer\)"):
        loss.backward()
    after = model.state_dict()  # it has the anchor too now, which the mask has captured
    for name, value in before.items():
        assert torch.equal(value, after[name]), name
    optimizer.add_param_group({"params": [model.hypernet.embeddings[task]]})
    F.cross_entropy(model(X, model.mask(task)), Y).backward()
    optimizer.step()
    assert not torch.equal(model.hypernet.embeddings[task], before["hypernet.embeddings.1"])


def test_a_copied_optimiser_steps_the_copied_model():
    model = small_model(2)
    optimizer = hmf.optim.Adam(model, 1e-2)
    train(model, lambda _: optimizer, 2, tasks=1)
    before = copy.deepcopy(model.state_dict())
    for again in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        theirs = again._model
        assert theirs is not model and again.state_dict().keys() == optimizer.state_dict().keys()
        loss = F.cross_entropy(theirs(X, theirs.mask(0)), Y)
        again.zero_grad()
        loss.backward()
        again.step()
        assert theirs.hypernet.output.weight.grad.factors is not None
        assert not torch.equal(theirs.hypernet.output.weight, model.hypernet.output.weight)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_task_is_entered_where_a_new_optimiser_would_have_it():
    """So that state_dicts, which count parameters, fit; and the number of groups stays."""
    model = small_model(2)
    optimizer = torch.optim.Adam(model.named_parameters())
    model.add_task(optimizer)
    (group,) = optimizer.param_groups
    names, parameters = zip(*model.named_parameters(), strict=True)
    assert group["param_names"] == list(names)
    assert all(a is b for a, b in zip(group["params"], parameters, strict=True))
    rest = torch.optim.Adam(model.net.parameters())
    model.add_task(rest)
    assert len(rest.param_groups) == 2 and rest.param_groups[1]["params"] == [model.hypernet.embeddings[3]]


def test_one_model_in_a_module():
    model = small_model(1)
    wrapped = torch.nn.Sequential(model, torch.nn.Linear(2, 2))
    assert len(hmf.optim.Adam(wrapped).param_groups[0]["params"]) == len(list(wrapped.parameters()))
    with pytest.raises(InputError, match="one HyperMask model in it; Sequential has 0"):
        hmf.optim.Adam(torch.nn.Sequential())


def test_groups_as_torch_takes_them():
    """And a layer that is in none of them is left alone."""
    model = small_model(1)
    optimizer = hmf.optim.Adam(model, 1e-2, params=[{"params": model.net.parameters(), "lr": 1e-3}])
    before = model.hypernet.output.weight.detach().clone()
    F.cross_entropy(model(X, 0), Y).backward()
    optimizer.step()
    assert torch.equal(model.hypernet.output.weight, before) and optimizer.param_groups[0]["lr"] == 1e-3
    assert type(model.hypernet.output.weight.grad) is torch.Tensor


@pytest.mark.parametrize("settings", [{}, {"step_in_backward": True}], ids=str)
@pytest.mark.parametrize("first", [0, 1])
def test_two_optimisers_share_a_model(first, settings):
    """One for the hypernetwork and one for the network, made in either order: torch.optim.Adam's numbers."""
    own, theirs = small_model(2), small_model(2)
    kinds = lambda model: [model.hypernet.parameters(), model.net.parameters()]  # noqa: E731
    both = [None, None]
    for i in (first, 1 - first):
        both[i] = hmf.optim.Adam(own, 1e-2, params=kinds(own)[i], **settings)
    separate = [torch.optim.Adam(parameters, 1e-2) for parameters in kinds(theirs)]
    for model, optimizers in ((own, both), (theirs, separate)):
        for task in (0, 0, 1, 1):
            for optimizer in optimizers:
                optimizer.zero_grad()
            mask = model.mask(task)
            (F.cross_entropy(model(X, mask), Y) + model.regularizer(mask)).backward()
            for optimizer in optimizers:
                optimizer.step()
    for (name, a), b in zip(own.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


def test_an_optimiser_of_a_part_takes_the_place_of_an_older_one_of_all():
    model = small_model(2)
    older = hmf.optim.Adam(model, step_in_backward=True)
    optimizer = hmf.optim.Adam(model, params=[*model.net.parameters(), *model.hypernet.embeddings])
    before = model.hypernet.output.weight.detach().clone()
    F.cross_entropy(model(X, 0), Y).backward()
    optimizer.step()
    assert torch.equal(model.hypernet.output.weight, before)
    with pytest.raises(InputError, match="a newer hmf.optim.Adam has taken over"):
        older.step()


@pytest.mark.parametrize("settings", [None, {}, {"step_in_backward": True}], ids=str)
def test_a_look_at_a_later_task_begins_nothing(settings):
    """In training mode too: it moves no anchor, whichever optimiser there is."""
    looking, other = small_model(4, beta=0.5), small_model(4, beta=0.5)
    losses = []
    for model in (looking, other):
        optimizer = (plain if settings is None else ours(**settings))(model)
        for task in (0, 0, 1, 1, 2):
            if model is looking:
                model(X, 3), model(X, task + 1), model.mask(task + 1)
            optimizer.zero_grad()
            mask = model.mask(task)
            loss = F.cross_entropy(model(X, mask), Y) + model.regularizer(mask)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert model.anchor.task == 2
    assert losses[:5] == losses[5:]


@pytest.mark.parametrize("drift_masked", [True, False])
def test_a_drift_beside_the_mask_is_refused_where_backward_steps(drift_masked):
    """R by itself gives the output layer a gradient that a step within backward would miss."""
    model = small_model(2, beta=0.5, drift_masked=drift_masked)
    model.begin_task(1)
    optimizer = hmf.optim.Adam(model, step_in_backward=True)
    optimizer.zero_grad()
    loss = F.cross_entropy(model(X, 1), Y) + model.regularizer(1)
    refused_unchanged(model, "make one mask per step", loss.backward)


class Sparse(torch.nn.Module):
    """A sparse gradient that no module announces."""

    def __init__(self):
        super().__init__()
        self.table, self.head = torch.nn.Parameter(torch.randn(6, 8)), torch.nn.Linear(8, 2)

    def forward(self, x):
        return self.head(x + F.embedding((10 * x[:, 0].abs()).long() % 6, self.table, sparse=True))


def test_what_torchs_adam_refuses_leaves_the_output_layer_as_it_was():
    model = hmf.HyperMask(Sparse(), 2, exclude="table", heads="head")
    optimizer = hmf.optim.Adam(model)
    F.cross_entropy(model(X, 0), Y).backward()
    before, grad = copy.deepcopy(model.state_dict()), model.hypernet.output.weight.grad
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert model.hypernet.output.weight.grad is grad is not None


class Complex(torch.nn.Module):
    """A parameter that PyTorch's fused Adam can't step, and one that nobody steps."""

    def __init__(self):
        super().__init__()
        self.turn = torch.nn.Parameter(torch.randn(8, dtype=torch.complex64))
        self.steps = torch.nn.Parameter(torch.arange(8), requires_grad=False)
        self.head = torch.nn.Linear(8, 2)

    def forward(self, x):
        return self.head((x * self.turn).abs() + self.steps)


def test_parameters_of_any_kind_beside_the_masked_ones():
    torch.manual_seed(0)
    theirs = hmf.HyperMask(Complex(), 2, hypernetwork=hmf.HypernetConfig(4, (6,)), heads="head")
    own = copy.deepcopy(theirs)
    train(theirs, plain, 3, tasks=2)
    train(own, ours(), 3, tasks=2)
    for (name, a), b in zip(own.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(a, b[1], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("settings", [{}, {"foreach": True}, {"amsgrad": True}], ids=str)
def test_parameters_of_another_dtype_than_their_moments(settings):
    model = small_model(1)
    optimizer = hmf.optim.Adam(model, **settings)
    for dtype in (torch.float32, torch.float64):
        model.to(dtype)
        optimizer.zero_grad()
        F.cross_entropy(model(X.to(dtype), 0), Y).backward()
        if dtype is torch.float32:
            optimizer.step()
    refused_unchanged(model, "is float64 of .*its exp_avg is float32 of", optimizer.step)


def test_a_state_of_another_models_optimiser():
    """PyTorch's fused Adam would write beyond the moments."""
    model, other = small_model(1), hmf.HyperMask(torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 2)), 1)
    optimizers = [hmf.optim.Adam(each) for each in (model, other)]
    for each, optimizer in zip((model, other), optimizers, strict=True):
        F.cross_entropy(each(X, 0), Y).backward()
        optimizer.step()
    before = optimizers[0].state_dict()
    with pytest.raises(InputError, match=r"another model: parameter 0 is \(16, 8\) here, and its exp_avg is \(4, 8\)"):
        optimizers[0].load_state_dict(optimizers[1].state_dict())
    assert str(optimizers[0].state_dict()) == str(before)
