"""Finding the task where tasks differ in size: `python -m bench.unequal_tasks --to FILE.json`

Small MLPs on scikit-learn's digits, cut into tasks of different sizes; percent of all test samples whose task and class
were found. "plain" is a method's own score, "by size" the same compared with that of a uniform softmax, as `predict`
has it.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

import torch
from torch import Tensor

import hypermask_fast as hmf
from hypermask_fast.data import Scenario, split_by_class
from hypermask_fast.data.sources import read_digits
from hypermask_fast.files import write_atomic
from hypermask_fast.training.config import TrainingConfig
from hypermask_fast.training.report import versions
from hypermask_fast.training.targets import TargetConfig, build_target
from hypermask_fast.training.trainer import Trainer

SIZES = ((4, 2, 2, 2), (6, 2, 2), (2, 2, 6), (7, 2))
METHODS = ("entropy", "max_softmax", "energy")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.unequal_tasks", description=__doc__)
    parser.add_argument("--to", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=300, help="per task")
    arguments = parser.parse_args(argv)
    rows = []
    for sizes in SIZES:
        for seed in range(arguments.seeds):
            model, scenario = trained(sizes, seed, arguments.iterations)
            for method in METHODS:
                plain, by_size = (right(model, scenario, method, regarded) for regarded in (False, True))
                rows.append({"classes": sizes, "seed": seed, "method": method, "plain": plain, "by size": by_size})
                print(rows[-1], flush=True)
    found = {
        "runs": rows,
        "command": shlex.join(["python", "-m", "bench.unequal_tasks", *(sys.argv[1:] if argv is None else argv)]),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    if arguments.to is not None:
        write_atomic(arguments.to, json.dumps(found, indent=1) + "\n")


def trained(sizes: tuple[int, ...], seed: int, iterations: int) -> tuple[hmf.HyperMask, Scenario]:
    ends = torch.tensor(sizes).cumsum(0).tolist()
    groups = [range(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    scenario = split_by_class(*read_digits(), groups, unequal=True, name="digits")
    torch.manual_seed(seed)
    net = build_target(TargetConfig("mlp", (100, 100)), scenario.input_shape, scenario.num_classes)
    shape = hmf.HypernetConfig(24, (50, 50))
    model = hmf.HyperMask(net, len(sizes), 30, shape, beta=0.01, lam=0.01, classes=scenario.classes)
    Trainer(model, scenario, TrainingConfig(batch_size=64, iterations=iterations), seed=seed, progress=False).fit()
    return model.eval(), scenario


@torch.no_grad()
def right(model: hmf.HyperMask, scenario: Scenario, method: str, by_size: bool) -> float:
    """Percent of all test samples."""
    found, samples = 0, 0
    for t, task in enumerate(scenario.tasks):
        x, y = next(task.test.chunks(len(task.test)))
        if by_size:
            chosen, label, _ = hmf.predict(model, x, method=method)
        else:
            logits = model.forward_all_tasks(x)
            chosen = plain(logits, method).argmax(0)
            label = logits[chosen, torch.arange(len(x))].argmax(-1)
        found += int(((chosen == t) & (label == y)).sum())
        samples += len(x)
    return round(100 * found / samples, 2)


def plain(logits: Tensor, method: str) -> Tensor:
    if method == "energy":
        return logits.logsumexp(-1)
    log_p = logits.log_softmax(-1)
    return log_p.amax(-1) if method == "max_softmax" else (log_p.exp() * log_p).nan_to_num().sum(-1)


if __name__ == "__main__":
    main()
