"""Search settings: with Optuna where it is installed (pip install optuna), else by a few random draws.

    python examples/tuning.py

Each trial is a run of split-digits with shorter tasks. Its score is the accuracy on validation data, never on test
data, which say afterwards how good the settings that were found are. Takes about half a minute on one CPU core.
"""

import math
import random
import tempfile
from pathlib import Path
from typing import Any

import torch

from hypermask_fast.training.config import load_preset
from hypermask_fast.training.evaluation import accuracy
from hypermask_fast.training.run import load_run, train

TRIALS = 4
SHORT = {"data.tasks": 3, "training.iterations": 60}


def score(settings: dict[str, Any], folder: Path) -> float:
    """Percent: mean accuracy on the tasks' validation samples after the last task, of a run with these settings."""
    config = load_preset("split-digits").with_values({**SHORT, **settings})
    train(config, folder, progress=False)  # its Result has the accuracies on the test samples
    _, model, scenario = load_run(folder)
    each = [accuracy(model, task.validation, t, batch_size=1000) for t, task in enumerate(scenario.tasks)]
    return sum(each) / len(each)


def objective(trial: Any, folder: Path) -> float:
    """What Optuna maximises; trial: an optuna.Trial."""
    settings = {
        "training.lr": trial.suggest_float("training.lr", 1e-4, 1e-2, log=True),
        "method.beta": trial.suggest_float("method.beta", 1e-3, 1.0, log=True),
    }
    found = score(settings, folder / f"trial-{trial.number}")
    words = ", ".join(f"{name}={value:.2g}" for name, value in settings.items())
    print(f"trial {trial.number}: {words}: validation accuracy {found:.2f} %", flush=True)
    return found


class Draws:
    """Stands for an optuna.Trial where Optuna is not installed: each value is drawn anew."""

    def __init__(self, number: int) -> None:
        self.number = number

    def suggest_float(self, name: str, low: float, high: float, log: bool = False) -> float:
        return math.exp(random.uniform(math.log(low), math.log(high))) if log else random.uniform(low, high)


def main() -> None:
    torch.set_num_threads(1)  # the network is small
    random.seed(0)
    with tempfile.TemporaryDirectory() as folder:
        try:
            import optuna
        except ModuleNotFoundError:
            print("searching with random draws: Optuna is not installed")
            best = max(objective(Draws(number), Path(folder)) for number in range(TRIALS))
        else:
            print("searching with Optuna")
            optuna.logging.set_verbosity(optuna.logging.WARNING)
            study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=0))
            study.optimize(lambda trial: objective(trial, Path(folder)), n_trials=TRIALS)
            best = study.best_value
    print(f"best trial: {best:.2f} %")


if __name__ == "__main__":
    main()
