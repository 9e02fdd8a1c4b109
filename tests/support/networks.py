"""Small networks, models and scenarios."""

import torch
from torch import nn

import hypermask_fast as hmf
from hypermask_fast.data import Scenario, TaskData, TensorSplit


def small_convnet() -> nn.Module:
    """Everything a target network may hold: convolutions, batch norm, a layer without bias."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, stride=2, groups=2),
        nn.Flatten(),
        nn.Linear(6 * 3 * 3, 5),
    )


def convnet_model() -> hmf.HyperMask:
    torch.manual_seed(0)
    config = hmf.HypernetConfig(embedding=6, hidden=(8,))
    return hmf.HyperMask(small_convnet(), 3, 30, config)


def blob_scenario(tasks: int = 3, samples: int = 200, seed: int = 0) -> Scenario:
    """Two Gaussian blobs in 8 dimensions per task, each task with its own directions: learnt in a few steps."""
    generator = torch.Generator().manual_seed(seed)
    centres = 1.5 * torch.randn(tasks, 2, 8, generator=generator)

    def split(task: int, count: int) -> TensorSplit:
        labels = torch.arange(count) % 2
        noise = torch.randn(count, 8, generator=generator)
        return TensorSplit(centres[task][labels] + noise, labels)

    data = tuple(TaskData(f"blobs {t}", split(t, samples), split(t, 60), split(t, 100)) for t in range(tasks))
    return Scenario("blobs", data, (8,), 2)


def blob_model(tasks: int = 3, **settings) -> hmf.HyperMask:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 2))
    hypernetwork = hmf.HypernetConfig(embedding=8, hidden=(12,))
    settings = {"sparsity": 20, "beta": 0.01, "lam": 1e-3, "hypernetwork": hypernetwork} | settings
    return hmf.HyperMask(net, tasks, **settings)
