"""Tasks that are removed, frozen and added while an optimiser trains: the numbers of torch.optim.Adam."""

import pytest
import torch
import torch.nn.functional as F
from support.networks import blob_model

import hypermask_fast as hmf


def trained(make_optimizer):
    """Parameters after three steps in each of two old tasks and a new one; a head of its own for each."""
    model = blob_model(4, beta=0.5, lam=0.0, sparsity=0, per_task=["4.*"]).double()
    model.remove_task(1)
    model.freeze_task(0)
    model.net[3].p = 0.0  # no dropout
    optimizer = make_optimizer(model)
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    torch.manual_seed(7)
    for task in (2, 3, 4):
        if task == 4:
            assert model.add_task(optimizer, like=2) == 4
        for _ in range(3):
            mask = model.mask(task)
            loss = F.cross_entropy(model(x, mask), torch.arange(16) % 2) + model.regularizer(mask)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize("in_backward", [False, True])
def test_an_optimiser_follows_the_life_of_tasks(in_backward):
    found = trained(lambda model: hmf.optim.Adam(model, lr=1e-3, step_in_backward=in_backward))
    expected = trained(lambda model: torch.optim.Adam(model.parameters(), lr=1e-3))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)
