"""PyTorch Lightning trains a HyperMask model, with gradients clipped and accumulated, in one process or several.

    python examples/with_lightning.py            # Lightning calls backward() and step()
    python examples/with_lightning.py --manual   # the module does, in manual optimisation
    torchrun --nproc-per-node 2 examples/with_lightning.py

Needs lightning: pip install lightning. Takes a few seconds on one CPU core.
"""

import os
import sys

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import hypermask_fast as hmf

CLIP, ACCUMULATE, BATCH = 0.05, 2, 16


class Task(lightning.LightningModule):
    """One task's training."""

    def __init__(self, model: hmf.HyperMask, task: int) -> None:
        super().__init__()
        self.model, self.task, self.losses = model, task, []

    def setup(self, stage: str) -> None:
        if self.trainer.world_size > 1:
            hmf.distributed.replicate(self)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return hmf.optim.Adam(self.model, lr=1e-2)

    def training_step(self, batch: list[Tensor], number: int) -> Tensor:
        mask = self.model.mask(self.task)
        loss = F.cross_entropy(self.model(batch[0], mask), batch[1]) + self.model.regularizer(mask)
        self.losses.append(loss.detach())
        return loss


class ManualTask(Task):
    """The same by hand."""

    automatic_optimization = False

    def training_step(self, batch: list[Tensor], number: int) -> None:
        self.manual_backward(super().training_step(batch, number) / ACCUMULATE)
        if (number + 1) % ACCUMULATE == 0:
            self.clip_gradients(self.optimizers(), gradient_clip_val=CLIP, gradient_clip_algorithm="norm")
            self.optimizers().step()
            self.optimizers().zero_grad()


def train(model: hmf.HyperMask, task: int, x: Tensor, y: Tensor, manual: bool = False) -> list[float]:
    """The loss of each batch."""
    module = (ManualTask if manual else Task)(model, task)
    told = {} if manual else {"gradient_clip_val": CLIP, "accumulate_grad_batches": ACCUMULATE}
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    ranks = {"devices": int(os.environ["WORLD_SIZE"]), "strategy": "ddp"} if "WORLD_SIZE" in os.environ else {}
    trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", **ranks, **told, **quiet)
    trainer.fit(module, DataLoader(TensorDataset(x, y), BATCH))
    return [loss.item() for loss in module.losses]


def main() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 50), nn.ReLU(), nn.Linear(50, 2))
    model = hmf.HyperMask(net, num_tasks=2, sparsity=30, beta=1e-3, lam=1e-3)
    for task in range(2):
        x = torch.randn(1280, 20)
        losses = train(model, task, x, (x[:, task] > 0).long(), "--manual" in sys.argv)
        print(f"task {task}: loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last")


if __name__ == "__main__":
    main()
