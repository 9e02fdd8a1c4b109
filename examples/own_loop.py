"""Train your own network in your own loop: five tasks of handwritten digits, one after another.

    python examples/own_loop.py

Needs scikit-learn for the digits: pip install "hypermask-fast[train]". Takes a few seconds on one CPU core.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import hypermask_fast as hmf

TASKS, STEPS, BATCH = 5, 200, 32


def digit_tasks() -> list[tuple[torch.Tensor, ...]]:
    """Task t tells digit 2t from digit 2t + 1, with labels 0 and 1: x and y for training, x and y for testing."""
    digits = load_digits()
    x, digit = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    testing = torch.rand(len(x)) < 0.2
    splits = [(digit // 2 == t) & part for t in range(TASKS) for part in (~testing, testing)]
    pairs = [(x[rows], digit[rows] % 2) for rows in splits]
    return [(*pairs[2 * t], *pairs[2 * t + 1]) for t in range(TASKS)]


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the network is so small that a second thread costs more than it brings
    tasks = digit_tasks()
    net = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 2))  # any nn.Module
    model = hmf.HyperMask(
        net,
        num_tasks=TASKS,
        sparsity=30,  # percent of each weight tensor that a task's mask leaves out
        hypernetwork=hmf.HypernetConfig(embedding=24, hidden=(50,)),
        # Both hold what earlier tasks need. With neither of them the first task falls to about 75 % here.
        beta=0.01,  # holds the masks of earlier tasks where they were
        lam=0.01,  # holds the weights that all tasks share; at 0.1 later tasks learn a few percent less
    )
    print("accuracy in percent on the test images of each task, row after training a task")
    print("after task" + "".join(f"{t:>8}" for t in range(TASKS)))
    for task, (x, y, _, _) in enumerate(tasks):
        model.train()
        model.begin_task(task)  # from here on, the regulariser compares with the model as it is now
        optimizer = hmf.optim.Adam(model, lr=1e-3)  # a new one for each task, as in the paper
        for _ in range(STEPS):
            rows = torch.randint(len(x), (BATCH,))
            mask = model.mask(task)  # one mask serves the network and the regulariser
            loss = F.cross_entropy(model(x[rows], mask), y[rows]) + model.regularizer(mask)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            correct = [model(x, task=t).argmax(1) == y for t, (_, _, x, y) in enumerate(tasks[: task + 1])]
        print(f"{task:10}" + "".join(f"{100 * right.float().mean():8.1f}" for right in correct))


if __name__ == "__main__":
    main()
