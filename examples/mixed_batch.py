"""Many tasks in one batch: each sample under its own task's mask, all tasks over one batch, and the task unknown.

    python examples/mixed_batch.py

The data is made up: each task has three classes, and each class is a cloud of points around a centre of its own. Needs
nothing but hypermask_fast. Takes a few seconds on one CPU core.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hypermask_fast as hmf

TASKS, CLASSES, SIZE, STEPS = 4, 3, 32, 200


def train(model: hmf.HyperMask, centres: Tensor) -> None:
    for task in range(TASKS):
        optimizer = hmf.optim.Adam(model, lr=1e-3)
        for _ in range(STEPS):
            x, y = samples(centres, torch.full((64,), task))
            mask = model.mask(task)
            loss = F.cross_entropy(model(x, mask), y) + model.regularizer(mask)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def samples(centres: Tensor, tasks: Tensor) -> tuple[Tensor, Tensor]:
    """One random sample of each given task: x (n, SIZE), and y (n,), its class within the task."""
    y = torch.randint(CLASSES, tasks.shape)
    return centres[tasks, y] + torch.randn(len(tasks), SIZE), y


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the network is so small that a second thread costs more than it brings
    centres = torch.randn(TASKS, CLASSES, SIZE)
    net = nn.Sequential(nn.Linear(SIZE, 64), nn.ReLU(), nn.Linear(64, CLASSES))
    model = hmf.HyperMask(net, TASKS, sparsity=30, hypernetwork=hmf.HypernetConfig(embedding=16, hidden=(32,)))
    train(model, centres)
    model.eval()

    ids = torch.randint(TASKS, (1000,))  # the tasks of one batch, in any order
    x, y = samples(centres, ids)
    with torch.no_grad():
        own = model(x, task=ids)  # (1000, CLASSES): each sample under its own task's mask
        other = model(x, task=(ids + 1) % TASKS)
        masks = model.all_masks()  # every task's mask, made once for as many batches as you like
        every = model.forward_all_tasks(x, masks)  # (TASKS, 1000, CLASSES): each sample under every task's mask
        tasks = model.infer_task(x)  # (1000,): the task whose network is the most certain, by its entropy

    def report(what: str, right: Tensor, by_chance: float) -> None:
        print(f"{what}: {100 * right.float().mean():.1f} % (by chance {by_chance:.1f} %)")

    report("class found under the mask of the sample's own task", own.argmax(1) == y, 100 / CLASSES)
    report("class found under the mask of another task", other.argmax(1) == y, 100 / CLASSES)
    report("task found without being told", tasks == ids, 100 / TASKS)
    same = torch.allclose(every[ids, torch.arange(1000)], own, atol=1e-5)
    print(f"all tasks over the batch give the same outputs as the mixed batch: {same}")


if __name__ == "__main__":
    main()
