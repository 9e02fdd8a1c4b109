"""Peer: the method as a user of hypnettorch (PyPI) writes it, with its HMLP and its regulariser, task by task.

It follows the method's description to the letter and shares no code with the library: the parity test holds the
library against it, and the benchmarks time it.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from hypnettorch.hnets import HMLP
from hypnettorch.hnets.chunked_mlp_hnet import ChunkedHMLP
from hypnettorch.utils.hnet_regularizer import calc_fix_target_reg, get_current_targets
from torch import Tensor, nn

Forward = Callable[[list[Tensor], Tensor], Tensor]


class HypnettorchLoop:
    """One training step after another, official scaling: CE + beta / t * (R / t) + lam * D.

    Args:
        weights: target tensors W1, b1, ..., Wn, bn, cloned into new leaves.
        forward: (effective weights, x) -> class logits.
        num_tasks, embedding, hidden: the hypernetwork; chunk_size None: dense.
        sparsity (percent), beta, lam, drift_norm, drift_masked: as `hypermask_fast.HyperMask` has them.
        lr: of Adam, made afresh by `begin_task`.
        shared: Parameters that are trained but not masked (batch norm's), as `forward` uses them.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        forward: Forward,
        *,
        num_tasks: int,
        embedding: int,
        hidden: Sequence[int],
        chunk_size: int | None = None,
        chunk_embedding: int = 8,
        sparsity: float = 0.0,
        beta: float = 0.01,
        lam: float = 0.01,
        drift_norm: int = 1,
        drift_masked: bool = True,
        lr: float = 1e-3,
        shared: Sequence[nn.Parameter] = (),
    ) -> None:
        self.shared = list(shared)
        self.weights = [nn.Parameter(weight.detach().clone()) for weight in weights]
        self.forward = forward
        shapes = [list(weight.shape) for weight in weights]
        common = {
            "cond_in_size": embedding,
            "layers": list(hidden),
            "activation_fn": nn.ELU(),
            "num_cond_embs": num_tasks,
            "verbose": False,
        }
        if chunk_size is None:
            self.hypernet = HMLP(shapes, **common)
        else:
            self.hypernet = ChunkedHMLP(shapes, chunk_size, chunk_emb_size=chunk_embedding, **common)
        self.hypernet.to(weights[0].device)
        self.sparsity, self.beta, self.lam, self.lr = sparsity, beta, lam, lr
        self.drift_norm, self.drift_masked = drift_norm, drift_masked

    def begin_task(self, task: int) -> None:
        """Targets of the earlier tasks, weights as they stand, a new optimiser."""
        self.task = task
        self.targets = get_current_targets(task, self.hypernet) if task > 0 else []
        self.previous = [weight.detach().clone() for weight in self.weights]
        self.optimizer = torch.optim.Adam([*self.hypernet.parameters(), *self.weights, *self.shared], lr=self.lr)

    def masks(self, sparsity: float) -> list[Tensor]:
        logits = self.hypernet.forward(cond_id=self.task)
        masks = [torch.tanh(tensor).abs() for tensor in logits]
        return [_above_percentile(mask, sparsity) for mask in masks[:-1]] + [masks[-1]]

    def step(self, x: Tensor, y: Tensor, sparsity: float | None = None) -> Tensor:
        """One step at `sparsity` percent (None: the final one); returns the loss before it."""
        masks = self.masks(self.sparsity if sparsity is None else sparsity)
        effective = [w * m for w, m in zip(self.weights[:-1], masks[:-1], strict=True)] + [self.weights[-1]]
        loss = F.cross_entropy(self.forward(effective, x), y)
        if self.task > 0:
            drift = calc_fix_target_reg(self.hypernet, self.task, targets=self.targets)
            loss = loss + self.beta * drift / self.task + self.lam * self._weight_drift(masks)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def _weight_drift(self, masks: list[Tensor]) -> Tensor:
        total = 0.0
        for weight, previous, mask in zip(self.weights, self.previous, masks, strict=True):
            change = (weight - previous) * mask if self.drift_masked else weight - previous
            total = total + torch.norm(change, p=self.drift_norm)
        return total


def _above_percentile(mask: Tensor, sparsity: float) -> Tensor:
    """Zeroes what lies below the percentile, found as the authors' code finds it: by np.percentile, a partition.

    Nothing is done at 0 percent, where the authors' code pays for a percentile too.
    """
    if sparsity == 0:
        return mask
    threshold = float(np.percentile(mask.detach().cpu().numpy(), sparsity))
    return mask * (mask >= threshold)


def mlp_forward(weights: list[Tensor], x: Tensor) -> Tensor:
    """A ReLU MLP over W1, b1, ..., Wn, bn."""
    h = x.flatten(1)
    for i in range(0, len(weights) - 2, 2):
        h = F.relu(F.linear(h, weights[i], weights[i + 1]))
    return F.linear(h, weights[-2], weights[-1])
