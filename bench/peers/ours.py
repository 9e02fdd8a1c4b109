"""The library itself, in a loop as its users write one. (Its trainer begins the backward pass at the loss's parts.)"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hypermask_fast as hmf


class Library:
    """One training step after another, official scaling.

    Args:
        net: the target network, changed in place.
        num_tasks, sparsity, config, settings: of `hypermask_fast.HyperMask`.
        lr: of Adam, made afresh by `begin_task`; in_backward: its step_in_backward; moments: theirs.
        captured: make a step that a CUDA graph can hold: learning rate and step counts stay on the device.
    """

    def __init__(
        self,
        net: nn.Module,
        num_tasks: int,
        sparsity: float,
        config: hmf.HypernetConfig,
        *,
        lr: float = 1e-3,
        in_backward: bool = True,
        moments: str = "float32",
        captured: bool = False,
        device: torch.device | str = "cpu",
        **settings,
    ) -> None:
        with torch.device(device):
            self.model = hmf.HyperMask(net.to(device), num_tasks, sparsity, config, fidelity="official", **settings)
        self.captured, self.in_backward, self.moments = captured, in_backward, moments
        self.ranks = self.model.layout.ranks(sparsity, device)
        self.lr = torch.tensor(lr, device=device) if captured else lr

    def begin_task(self, task: int) -> None:
        self.task = task
        self.model.begin_task(task)
        settings = {"step_in_backward": self.in_backward, "moments": self.moments, "capturable": self.captured}
        self.optimizer = hmf.optim.Adam(self.model, lr=self.lr, **settings)

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """One step; returns the loss before it. The drift's value is there once backward has run."""
        model, optimizer = self.model, self.optimizer
        mask = model.mask(self.task, ranks=self.ranks)
        cross_entropy = F.cross_entropy(model(x, mask), y)
        drifts = model.drifts(mask)
        loss = cross_entropy + model.drift.loss(drifts, self.task)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        self.parts = cross_entropy.detach(), type(drifts)(*(drift.detach() for drift in drifts))
        return loss.detach()

    def last_loss(self) -> Tensor:
        """The last step's loss with the drift's value in it."""
        cross_entropy, drifts = self.parts
        return cross_entropy + self.model.drift.loss(drifts, self.task).detach()
