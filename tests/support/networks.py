"""Small networks, models and scenarios."""

import torch
from torch import Tensor, nn

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


class TiedDecoder(nn.Module):
    """A language model whose decoder has the embedding's weight, and is defined first."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Linear(6, 9, bias=False)
        self.embedding = nn.Embedding(9, 6)
        self.norm = nn.LayerNorm(6)
        self.body = nn.Linear(6, 6)
        self.decoder.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.norm(self.body(self.embedding(x))))


class TiedHead(nn.Module):
    """Words to words, by a head with a bias and the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.embedding(x)).relu())


class TiedLayers(nn.Module):
    """Two layers of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).relu()).relu())


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
