"""Peer: the bare target network, without masks or regularisers. What is above its time is the price of the method."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Plain:
    """Cross-entropy and fused Adam on `net`."""

    def __init__(self, net: nn.Module, lr: float = 1e-3) -> None:
        self.net, self.lr = net, lr

    def begin_task(self, task: int) -> None:
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=self.lr, fused=True)

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """One step; returns the loss before it."""
        loss = F.cross_entropy(self.net(x), y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()
