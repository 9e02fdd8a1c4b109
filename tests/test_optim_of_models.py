"""Whose parameters an optimiser steps: those of one model, of its tasks, of copies, beside older optimisers."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from support.optimising import X, Y, small_model, train

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
