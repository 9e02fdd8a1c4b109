"""Hugging Face accelerate trains a HyperMask model, with gradients clipped and accumulated, in one process or several.

    python examples/with_accelerate.py
    torchrun --nproc-per-node 2 examples/with_accelerate.py

Needs accelerate: pip install accelerate. Takes a few seconds on one CPU core.
"""

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import hypermask_fast as hmf

CLIP, ACCUMULATE, BATCH = 0.05, 2, 16


def train(model: hmf.HyperMask, task: int, x: Tensor, y: Tensor) -> list[float]:
    """The loss of each of this process's batches."""
    accelerator, losses = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATE), []
    if accelerator.num_processes > 1:
        hmf.distributed.replicate(model)
    batches = DataLoader(TensorDataset(x, y), BATCH)
    net, optimizer, batches = accelerator.prepare(model, hmf.optim.Adam(model, lr=1e-2), batches)
    for x, y in batches:
        with accelerator.accumulate(net):
            mask = model.mask(task)
            loss = F.cross_entropy(net(x, mask), y) + model.regularizer(mask)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(net.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 50), nn.ReLU(), nn.Linear(50, 2))
    model = hmf.HyperMask(net, num_tasks=2, sparsity=30, beta=1e-3, lam=1e-3)
    for task in range(2):
        x = torch.randn(1280, 20)
        losses = train(model, task, x, (x[:, task] > 0).long())
        print(f"task {task}: loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last")


if __name__ == "__main__":
    main()
