"""A benchmark of three small tasks and a strategy for it. As a script: one run, which saves its state and goes on.

    python avalanche_runs.py FILE    trains all three tasks, or from the task on at which FILE, a checkpoint, was saved

prints the first task that it trains, and then the losses, accuracies and parameters as they are in the end.
"""

import hashlib
import sys

import torch
from avalanche.benchmarks import nc_benchmark
from avalanche.checkpointing import maybe_load_checkpoint, save_checkpoint
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.training.plugins import EvaluationPlugin
from torch import nn
from torch.utils.data import TensorDataset

import hypermask_fast as hmf
from hypermask_fast.integrations.avalanche import HyperMaskModule, HyperMaskStrategy

TASKS, SAMPLES, WIDTH = 3, 192, 12


def benchmark(task_labels=True, from_zero=True):
    """Class c has feature c raised; experience t has classes 2t and 2t + 1."""
    drawn = torch.Generator().manual_seed(0)
    parts = []
    for _ in range(2):
        y = torch.arange(SAMPLES) % (2 * TASKS)
        x = torch.randn(SAMPLES, WIDTH, generator=drawn)
        x[torch.arange(SAMPLES), y] += 3
        parts.append(TensorDataset(x, y))
        parts[-1].targets = y.tolist()
    return nc_benchmark(
        *parts,
        n_experiences=TASKS,
        task_labels=task_labels,
        shuffle=False,
        class_ids_from_zero_in_each_exp=from_zero,
    )


def module(tasks=TASKS, outputs=2, **settings):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(WIDTH, 20), nn.Tanh(), nn.Linear(20, outputs))
    return HyperMaskModule(hmf.HyperMask(net, tasks, 30, hmf.HypernetConfig(8, (10,)), **settings))


def strategy(model=None, epochs=3, **settings):
    model = module() if model is None else model
    evaluator = EvaluationPlugin(accuracy_metrics(experience=True))
    told = {"train_mb_size": 16, "eval_mb_size": 16, "train_epochs": epochs, "evaluator": evaluator} | settings
    return HyperMaskStrategy(model=model, optimizer=hmf.optim.Adam(model, lr=1e-2), **told)


def accuracies(metrics):
    return [value for name, value in sorted(metrics.items()) if "Exp/eval_phase/test" in name]


def main(file: str) -> None:
    training, first = maybe_load_checkpoint(strategy(), file)
    stream = benchmark()
    print(f"from task {first}")
    for experience in stream.train_stream[first:]:
        training.train(experience)
        if first == 0 and experience.current_experience == 1:
            save_checkpoint(training, file)
    print(accuracies(training.eval(stream.test_stream)))
    for name, parameter in training.model.named_parameters():
        print(name, hashlib.sha256(parameter.detach().numpy().tobytes()).hexdigest())


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
