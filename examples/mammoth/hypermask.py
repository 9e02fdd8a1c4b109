"""HyperMask as a model of Mammoth, registered from outside of it.

    python examples/mammoth/hypermask.py --dataset seq-mnist --lr 0.001 --n_epochs 1 --batch_size 128

Needs Mammoth 0.2 where Python finds it (`import mammoth`); docs/mammoth.md says how, and what has been tried. Importing
it changes the working directory and takes top-level names such as `datasets`: give it a process of its own.
"""

import argparse
from typing import Any

import torch
from torch import Tensor, nn

import hypermask_fast as hmf

from mammoth import ContinualModel, load_runner, register_model, train  # isort: skip  # changes the working directory


@register_model("hypermask")
class HyperMask(ContinualModel):
    """Each task under the mask that a hypernetwork makes for it; loss = loss(y, labels) + beta R / t + lam D.

    The model is `net`, which Mammoth trains, evaluates, moves and saves. Labels are absolute: a task uses those of the
    backbone's N_CLASSES outputs that are of its own classes.
    """

    NAME = "hypermask"
    COMPATIBILITY = ("task-il", "domain-il")  # without class-il, evaluation tells the task: model(x, task)

    @staticmethod
    def get_parser(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser.set_defaults(optimizer="adam")
        parser.add_argument("--sparsity", type=float, default=30.0, help="percent of each tensor that a mask sets to 0")
        parser.add_argument("--beta", type=float, default=0.01, help="weight of the output drift")
        parser.add_argument("--lam", type=float, default=0.01, help="weight of the weight drift")
        parser.add_argument("--embedding", type=int, default=128, help="size of a task's embedding")
        parser.add_argument(
            "--hidden", type=int, nargs="*", default=[25, 25], help="widths of the hypernetwork's trunk"
        )
        return parser

    def __init__(self, backbone: nn.Module, loss: Any, args: Any, transform: Any, dataset: Any = None) -> None:
        shape = hmf.HypernetConfig(embedding=args.embedding, hidden=tuple(args.hidden))
        model = hmf.HyperMask(backbone, 1, args.sparsity, shape, beta=args.beta, lam=args.lam)
        super().__init__(model, loss, args, transform, dataset=dataset)
        for _ in range(1, self.dataset.N_TASKS):  # all at once: a checkpoint then fits a new model
            self.net.add_task()
        self.register_buffer("begun", torch.tensor(1))  # how many tasks; Mammoth counts on as a task ends
        self.opt = self.get_optimizer()

    def get_optimizer(self) -> torch.optim.Optimizer:
        """Mammoth asks for one per task. Adam is this library's; any other is Mammoth's own."""
        kinds = {"adam": hmf.optim.Adam, "adamw": hmf.optim.AdamW}
        if self.args.optimizer not in kinds:
            return super().get_optimizer()
        return kinds[self.args.optimizer](self.net, lr=self.args.lr, weight_decay=self.args.optim_wd)

    def begin_task(self, dataset: Any) -> None:
        self.begun.fill_(self.current_task + 1)
        self.net.begin_task(self.current_task)  # the regulariser compares with the model as it is now

    def end_task(self, dataset: Any) -> None:
        self.net.anchor = None  # the next task begins with one of its own; a checkpoint needs none

    def observe(self, inputs: Tensor, labels: Tensor, not_aug_inputs: Tensor, epoch: int | None = None) -> float:
        if self.net.heads() is None:
            self.net.output_layers((inputs,), {})  # a mask that was made before the first pass would not do
        first, end = self.classes_of(self.current_task)
        self.opt.zero_grad()
        mask = self.net.mask(self.current_task)  # serves the network and the regulariser
        loss = self.loss(self.net(inputs, mask)[:, first:end], labels - first) + self.net.regularizer(mask)
        loss.backward()
        self.opt.step()
        return loss.item()

    def forward(self, x: Tensor, task_label: int | None = None) -> Tensor:
        """(batch, N_CLASSES) logits, -inf outside of the task's classes. Where no task is told, each sample's is found
        among those that have begun, as the one of lowest entropy."""
        if task_label is None:
            task = hmf.predict(self.net, x, self.net.all_masks(range(int(self.begun))), method="entropy").task
        else:
            task = torch.full((len(x),), task_label, device=x.device)
        outputs = self.net(x, task if task_label is None else task_label)
        bounds = torch.tensor([self.classes_of(t) for t in range(self.dataset.N_TASKS)], device=x.device)[task]
        column = torch.arange(outputs.shape[1], device=x.device)
        return outputs.masked_fill((column < bounds[:, :1]) | (column >= bounds[:, 1:]), -torch.inf)

    def classes_of(self, task: int) -> tuple[int, int]:
        """Of a task's classes the first, and the one after the last; in domain-il all tasks have all of them."""
        if self.dataset.SETTING == "domain-il":
            return 0, self.dataset.N_CLASSES
        counts = self.dataset.N_CLASSES_PER_TASK
        counts = [counts] * self.dataset.N_TASKS if isinstance(counts, int) else list(counts)
        return sum(counts[:task]), sum(counts[: task + 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="seq-mnist", help="of Mammoth's (default: seq-mnist)")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--n_epochs", type=int, default=1)
    parser.add_argument("--batch_size", type=int, default=128)
    settings = vars(HyperMask.get_parser(parser).parse_args())
    model, dataset = load_runner("hypermask", settings.pop("dataset"), settings)
    train(model, dataset)


if __name__ == "__main__":
    main()
