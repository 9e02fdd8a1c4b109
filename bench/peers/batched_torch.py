"""Peer: the same method in clean, batched PyTorch: what one would write today without kernels of one's own.

One forward pass over all tasks' embeddings, one flat target weight, masks of all layers at once, no selection where
nothing is dropped, PyTorch's fastest exact selection where something is, fused Adam. `compiled=True` hands the loss,
forward and backward, to torch.compile.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from math import ceil, prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Forward = Callable[[list[Tensor], Tensor], Tensor]


class BatchedTorch:
    """One training step after another, official scaling: CE + beta / t * (R / t) + lam * D.

    Args:
        weights: target tensors W1, b1, ..., Wn, bn; their dtype and device are the peer's.
        forward: (effective weights, x) -> class logits.
        shared: Parameters that are trained but not masked, as `forward` uses them.
        compiled: run the loss through torch.compile.
        captured: keep Adam's step counts on the device, so that a CUDA graph can hold a step.
        others: as in `HypnettorchLoop`.
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
        compiled: bool = False,
        captured: bool = False,
    ) -> None:
        self.shapes, self.forward, self.shared = [tuple(w.shape) for w in weights], forward, list(shared)
        self.sizes = [prod(s) for s in self.shapes]
        self.offsets = [0, *accumulate(self.sizes)]
        self.size = self.offsets[-1]
        self.sparsity, self.beta, self.lam, self.lr = sparsity, beta, lam, lr
        self.drift_norm, self.drift_masked, self.captured = drift_norm, drift_masked, captured
        self.chunks = ceil(self.size / chunk_size) if chunk_size else 0
        self.weight = nn.Parameter(torch.cat([weight.detach().flatten() for weight in weights]))
        with self.weight.device:
            self._build(num_tasks, embedding, hidden, chunk_size, chunk_embedding)
        self._loss = torch.compile(self.loss, dynamic=False) if compiled else self.loss

    def _build(
        self,
        num_tasks: int,
        embedding: int,
        hidden: Sequence[int],
        chunk_size: int | None,
        chunk_embedding: int,
    ) -> None:
        dtype = self.weight.dtype
        inputs = embedding + (chunk_embedding if self.chunks else 0)
        self.embeddings = nn.Parameter(torch.randn(num_tasks, embedding, dtype=dtype))
        self.chunk_embeddings = nn.Parameter(torch.randn(self.chunks, chunk_embedding, dtype=dtype))
        self.layers = nn.ModuleList(
            nn.Linear(a, b, dtype=dtype) for a, b in pairwise((inputs, *hidden, chunk_size or self.size))
        )

    def parameters(self) -> list[nn.Parameter]:
        chunks = [self.chunk_embeddings] if self.chunks else []
        return [self.embeddings, *chunks, *self.layers.parameters(), self.weight, *self.shared]

    def begin_task(self, task: int) -> None:
        """Targets of the earlier tasks, weights as they stand, a new optimiser."""
        self.task = task
        with torch.no_grad():
            self.targets = self.logits(task)
        self.previous = self.weight.detach().clone()
        self.optimizer = torch.optim.Adam(self.parameters(), lr=self.lr, fused=True, capturable=self.captured)

    def logits(self, count: int) -> Tensor:
        """(count, N) mask logits of tasks 0 to count - 1 in one pass."""
        h = self.embeddings[:count]
        if self.chunks:
            parts = (
                self.chunk_embeddings.expand(count, -1, -1),
                h[:, None].expand(-1, self.chunks, -1),
            )
            h = torch.cat(parts, dim=-1)
        for layer in self.layers[:-1]:
            h = F.elu(layer(h))
        return self.layers[-1](h).flatten(1)[:, : self.size]

    def mask(self, logits: Tensor, sparsity: float) -> Tensor:
        """(N,) semi-binary mask of all layers; the output layer's bias keeps its own as it is."""
        mask = logits.tanh().abs()
        if sparsity == 0:
            return mask
        with torch.no_grad():
            magnitude = logits.abs()
            parts = magnitude.split(self.sizes)
            kept = [part >= self._threshold(part, sparsity) for part in parts[:-1]]
            kept = torch.cat([*kept, torch.ones_like(parts[-1], dtype=torch.bool)])
        return mask * kept

    @staticmethod
    def _threshold(magnitude: Tensor, sparsity: float) -> Tensor:
        """The magnitude of rank ceil(p (n - 1) / 100), by topk from the nearer end: much faster than a sort."""
        count = magnitude.numel()
        rank = ceil(sparsity * (count - 1) / 100)
        if rank + 1 <= count - rank:
            return magnitude.topk(rank + 1, largest=False, sorted=False).values.max()
        return magnitude.topk(count - rank, largest=True, sorted=False).values.min()

    def loss(self, x: Tensor, y: Tensor, sparsity: float) -> Tensor:
        logits = self.logits(self.task + 1)
        mask = self.mask(logits[-1], sparsity)
        effective = (self.weight * mask).split(self.sizes)[:-1]
        effective = [flat.view(shape) for flat, shape in zip(effective, self.shapes[:-1], strict=True)]
        effective.append(self.weight[self.offsets[-2] :].view(self.shapes[-1]))
        loss = F.cross_entropy(self.forward(effective, x), y)
        if self.task == 0:
            return loss
        output_drift = (logits[:-1] - self.targets).square().sum()
        return loss + self.beta / self.task**2 * output_drift + self.lam * self._weight_drift(mask)

    def _weight_drift(self, mask: Tensor) -> Tensor:
        change = self.weight - self.previous
        if self.drift_masked:
            change = change * mask
        if self.drift_norm == 1:
            return change.abs().sum()
        return torch.stack([part.norm() for part in change.split(self.sizes)]).sum()

    def step(self, x: Tensor, y: Tensor, sparsity: float | None = None) -> Tensor:
        """One step at `sparsity` percent (None: the final one); returns the loss before it."""
        loss = self._loss(x, y, self.sparsity if sparsity is None else sparsity)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()
