"""Small models that Adam trains, torch's and the library's."""

import copy

import pytest
import torch
import torch.nn.functional as F

import hypermask_fast as hmf
from hypermask_fast import InputError


def small_model(tasks, **settings):
    """Without batch norm, which gives a bias before it a gradient of nothing but rounding, and without dropout."""
    torch.manual_seed(1)
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
    config = hmf.HypernetConfig(embedding=8, hidden=(12,))
    return hmf.HyperMask(net, tasks, 20, config, **({"beta": 0.01, "lam": 1e-3} | settings))


X, Y = torch.randn(32, 8, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 2


def train(model, make_optimizer, steps, tasks=3, x=X):
    """Losses of some steps in each task, as a user writes them."""
    losses = []
    for task in range(tasks):
        optimizer = make_optimizer(model)
        for _ in range(steps):
            mask = model.mask(task)
            loss = F.cross_entropy(model(x, mask), Y) + model.regularizer(mask)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    return torch.stack(losses), optimizer


def plain(model):
    return torch.optim.Adam(model.parameters(), lr=1e-2)


def ours(**settings):
    return lambda model: hmf.optim.Adam(model, 1e-2, **settings)


def refused_unchanged(model, match, do):
    """`do` raises InputError and leaves the model's entries as they are."""
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=match) as caught:
        do()
    assert "\n" not in str(caught.value)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
