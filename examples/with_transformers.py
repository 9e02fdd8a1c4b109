"""Hugging Face's Trainer trains a HyperMask model, with gradients clipped and accumulated.

    python examples/with_transformers.py

Needs transformers and accelerate: pip install transformers accelerate. Takes a few seconds on one CPU core.
"""

import tempfile

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import hypermask_fast as hmf

CLIP, ACCUMULATE, BATCH = 0.05, 2, 16


class Task(nn.Module):
    """What the Trainer wants: a module whose call returns the loss."""

    def __init__(self, model: hmf.HyperMask, task: int) -> None:
        super().__init__()
        self.model, self.task, self.losses = model, task, []

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        mask = self.model.mask(self.task)
        logits = self.model(x, mask)
        loss = F.cross_entropy(logits, labels) + self.model.regularizer(mask)
        self.losses.append(loss.item())
        return {"loss": loss, "logits": logits}


class Samples(torch.utils.data.IterableDataset):
    """In the order that they come in."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.samples = [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]

    def __iter__(self):
        return iter(self.samples)


def train(model: hmf.HyperMask, task: int, x: Tensor, y: Tensor) -> list[float]:
    """The loss of each batch."""
    net = Task(model, task)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=len(x) // BATCH // ACCUMULATE, per_device_train_batch_size=BATCH,
            gradient_accumulation_steps=ACCUMULATE, max_grad_norm=CLIP, lr_scheduler_type="constant", use_cpu=True,
            save_strategy="no", report_to=[], disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        optimizer = hmf.optim.Adam(model, lr=1e-2)
        Trainer(net, arguments, train_dataset=Samples(x, y), optimizers=(optimizer, None)).train()
    return net.losses


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
