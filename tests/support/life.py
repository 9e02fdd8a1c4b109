"""Models whose tasks come and go, and their training."""

import torch
import torch.nn.functional as F

import hypermask_fast as hmf
from support.networks import blob_model

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
