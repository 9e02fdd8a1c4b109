"""HyperMask beside Avalanche's EWC, replay and naive strategies on split MNIST, with tasks told by task labels.

    python examples/with_avalanche.py --data-dir DIR      # MNIST's four IDX files, .gz or not
    python examples/with_avalanche.py                     # Avalanche downloads MNIST

Needs Avalanche: pip install "hypermask-fast[avalanche]". Takes about three minutes on two CPU cores.
"""

import argparse
from typing import Any

import torch
from avalanche.benchmarks import SplitMNIST, nc_benchmark
from avalanche.core import SupervisedPlugin
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.models import MTSimpleMLP
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.supervised import EWC, Naive, Replay
from torch import nn
from torch.utils.data import TensorDataset

import hypermask_fast as hmf
from hypermask_fast.data.sources import read_mnist
from hypermask_fast.integrations.avalanche import HyperMaskModule, HyperMaskStrategy

TASKS, HIDDEN, BATCH = 5, 200, 128


def benchmark(data_dir: str | None) -> Any:
    """Five experiences of two digits each, with labels 0 and 1 and a task label."""
    told = {"class_ids_from_zero_in_each_exp": True, "shuffle": False}
    if data_dir is None:
        return SplitMNIST(TASKS, return_task_id=True, **told)
    mnist, parts = read_mnist(data_dir), []
    for images, labels in ((mnist.inputs, mnist.labels), (mnist.test_inputs, mnist.test_labels)):
        parts.append(TensorDataset((images / 255 - 0.1307) / 0.3081, labels))
        parts[-1].targets = labels.tolist()  # where Avalanche looks for the classes
    return nc_benchmark(*parts, n_experiences=TASKS, task_labels=True, **told)


class StopAfter(SupervisedPlugin):
    """Ends an experience's training after so many iterations, however many epochs these are."""

    def __init__(self, iterations: int) -> None:
        super().__init__()
        self.iterations, self.done = iterations, 0

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        self.done = 0

    def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        self.done += 1
        if self.done == self.iterations:
            strategy.stop_training()


def strategies(iterations: int) -> dict[str, Any]:
    """Networks of one hidden layer. The others' have a head for each task, as HyperMask's has a mask for each."""

    def common() -> dict[str, Any]:
        return {
            "criterion": nn.CrossEntropyLoss(),
            "train_mb_size": BATCH,
            "eval_mb_size": 1000,
            "train_epochs": iterations,  # as many as that are never begun: an epoch has at least one iteration
            "plugins": [StopAfter(iterations)],
            "evaluator": EvaluationPlugin(accuracy_metrics(experience=True)),
        }

    def peer() -> dict[str, Any]:
        model = MTSimpleMLP(28 * 28, HIDDEN)
        return {"model": model, "optimizer": torch.optim.Adam(model.parameters(), lr=1e-3), **common()}

    net = nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2))
    hypernetwork = hmf.HypernetConfig(embedding=128, hidden=(25, 25))
    model = HyperMaskModule(hmf.HyperMask(net, num_tasks=TASKS, sparsity=30, hypernetwork=hypernetwork))
    return {
        "HyperMask": HyperMaskStrategy(model=model, optimizer=hmf.optim.Adam(model, lr=1e-3), **common()),
        "EWC": EWC(ewc_lambda=1000, **peer()),
        "replay of 200": Replay(mem_size=200, **peer()),
        "naive": Naive(**peer()),
    }


def accuracies(metrics: dict[str, float]) -> list[float]:
    """Percent, of each experience of the test stream, as Avalanche's evaluation has just found them."""
    found = {name: value for name, value in metrics.items() if name.startswith("Top1_Acc_Exp/eval_phase/test_stream")}
    return [100 * found[name] for name in sorted(found)]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--data-dir", help="of MNIST's IDX files; without it Avalanche downloads them")
    arguments.add_argument("--iterations", type=int, default=500, help="per task (default: 500)")
    chosen = arguments.parse_args()
    torch.manual_seed(0)
    stream = benchmark(chosen.data_dir)
    print(
        f"accuracy in percent on the test images of each task after all {TASKS}; forgetting: points lost since learned"
    )
    print(f"{'':14}" + "".join(f"{f'task {t}':>8}" for t in range(TASKS)) + f"{'average':>9}{'forgetting':>12}")
    for name, strategy in strategies(chosen.iterations).items():
        learned, last = [], []
        for task, experience in enumerate(stream.train_stream):
            strategy.train(experience, eval_streams=[])
            last = accuracies(strategy.eval(stream.test_stream))
            learned.append(last[task])
        forgotten = sum(before - now for before, now in zip(learned, last[:-1], strict=False)) / (TASKS - 1)
        print(
            f"{name:14}" + "".join(f"{a:8.1f}" for a in last) + f"{sum(last) / TASKS:9.1f}{forgotten:12.1f}", flush=True
        )


if __name__ == "__main__":
    main()
