"""How a step grows with the number of tasks and with the hypernetwork: cases that are measured when asked for by name.

    python -m bench growth --malloc tuned --csv bench/results/growth/MACHINE.csv
    python -m bench.plots bench/results/growth/MACHINE.csv

permuted-mnist's preset with a target network of such a width that the hypernetwork's output layer has 1, 10, 100 and
500 million weights. A contender that does not fit into memory beside ours is left out. Results are not compared with
float64 here: those of the same contenders are, in the presets' own cases.
"""

from dataclasses import replace

import torch

from hypermask_fast.training.config import load_preset

from . import experiments, steps
from .case import OURS, Case
from .experiments import Experiment
from .pool import available_memory

WIDTHS = {
    "1M": 9,
    "10M": 88,
    "100M": 604,
    "500M": 1768,
}  # of the target's hidden layers, by weights of the output layer
TASKS = (1, 4, 10, 40, 100)
CONTENDERS = (OURS, "hypnettorch", "batched torch", "plain network")


def experiment(size: str) -> Experiment:
    config = load_preset("permuted-mnist")
    config = replace(config, target=replace(config.target, hidden=(WIDTHS[size], WIDTHS[size])))
    return Experiment(f"growth/{size}", config, max(TASKS), tuple(tasks - 1 for tasks in TASKS), (1024,), 10)


def cases(device: torch.device, quick: bool) -> list[Case]:
    known = [experiments.quick(experiment("1M"))] if quick else [experiment(size) for size in WIDTHS]
    room = 0.8 * available_memory() if device.type == "cpu" else float("inf")
    return [_case(each, case, room) for each in known for case in steps.cases(each, device)]


def _case(of: Experiment, case: Case, room: float) -> Case:
    def memory(contender: str) -> float:
        return steps.memory(replace(of, tasks=(case.task or 0) + 1), contender)

    fits = tuple(c for c in CONTENDERS if c == OURS or memory(OURS) + memory(c) < room)
    return replace(case, contenders=fits, reference=lambda contender: "", memory=memory, on_request=True)


def memory_floor(name: str, tasks: int) -> float:
    """Bytes that training cannot do without: the layer and its moments, earlier tasks' targets, the target network."""
    of = experiment(name.removeprefix("growth/"))
    size, width = of.layout().size, of.config.hypernet.hidden[-1]
    return 4.0 * (3 * size * (width + 1) + (tasks - 1) * size + 4 * size)
