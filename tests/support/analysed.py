"""Models whose masks are known, and small ones to inspect."""

from itertools import pairwise

import torch
from torch import nn

import hypermask_fast as hmf

SMALL = hmf.HypernetConfig(embedding=5, hidden=(7,))


def with_logits(logits: torch.Tensor, sparsity: float, layers: tuple[int, ...] = (4, 2)) -> hmf.HyperMask:
    """A model whose hypernetwork makes just these (T, N) logits: each task's hidden layer is a one-hot row."""
    tasks = len(logits)
    net = nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(layers)))
    model = hmf.HyperMask(net, tasks, sparsity, hmf.HypernetConfig(embedding=tasks, hidden=(tasks,)))
    with torch.no_grad():
        for task, row in enumerate(torch.eye(tasks)):
            model.hypernet.embeddings[task].copy_(row)
        (layer,) = model.hypernet.trunk
        layer.weight.copy_(torch.eye(tasks))
        layer.bias.zero_()
        model.hypernet.output.weight.copy_(logits.t())
        model.hypernet.output.bias.zero_()
    return model


def small_model(sparsity: float = 30, tasks: int = 3, **settings) -> hmf.HyperMask:
    """Sizes that are no multiples of 8, logits of some size."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(9, 11), nn.ReLU(), nn.Linear(11, 3))
    model = hmf.HyperMask(net, tasks, sparsity, **{"hypernetwork": SMALL} | settings).double()
    with torch.no_grad():
        model.hypernet.output.weight.mul_(4)
    return model
