"""Time of a training step by number of tasks, here and in another checkout, which take turns; appended to a CSV.

    python -m bench.many_tasks permuted-mnist split-mnist
    python -m bench.many_tasks permuted-mnist --against CHECKOUT --drift-tasks 8

Each contender is a process with one model of the preset, whose networks and settings are the preset's and whose inputs
are random. At T tasks the step is that of the last of T. "drawn" is this checkout with K drawn tasks in the output
drift. `targets_bytes` is what the earlier tasks' logits take, which are kept while a task trains.
"""

import argparse
import os
import shlex
import statistics
import subprocess
import sys
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

from . import machine, results

HERE = Path(__file__).parents[1]
INPUTS = {"permuted-mnist": ((1024,), 10), "split-mnist": ((784,), 2)}  # of a sample; classes
WARM_UP = 2
_WORKER = """
import sys, time
import torch
import torch.nn.functional as F
from hypermask_fast.training.memory import tune_allocator
tune_allocator()
import hypermask_fast as hmf
from hypermask_fast.training.config import load_preset
from hypermask_fast.training.targets import build_target
preset, tasks, shape, classes, threads, *drawn = eval(sys.argv[1])
torch.set_num_threads(threads)
torch.manual_seed(0)
config = load_preset(preset)
method = config.method
model = hmf.HyperMask(
    build_target(config.target, torch.Size(shape), classes), tasks, method.sparsity, config.hypernet,
    beta=method.beta, lam=method.lam, drift_norm=method.drift_norm, drift_masked=method.drift_masked,
).train()
how = {"drift_tasks": drawn[0]} if drawn else {}
x, y = torch.rand(config.training.batch_size, *shape), torch.randint(classes, (config.training.batch_size,))
task = optimizer = None
for line in sys.stdin:
    if int(line) != task:
        task = int(line)
        model.begin_task(task)
        optimizer = hmf.optim.Adam(model, config.training.lr, step_in_backward=True)
    start = time.perf_counter()
    mask = model.mask(task, **how)
    loss = F.cross_entropy(model(x, mask), y) + model.regularizer(mask)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(time.perf_counter() - start, flush=True)
"""


@dataclass
class Time:
    """Of one contender at one number of tasks: milliseconds a step, and the median over that of the first task."""

    date: str
    commit: str
    machine: str
    threads: int
    torch: str
    preset: str
    contender: str
    tasks: int
    drift_tasks: int | None
    steps: int
    median_ms: float
    p20_ms: float
    p80_ms: float
    of_first: float
    targets_bytes: int
    command: str


class Worker:
    """A process in one checkout, with one model."""

    def __init__(self, checkout: Path, preset: str, tasks: int, threads: int, drawn: int | None) -> None:
        settings = (preset, tasks, *INPUTS[preset], threads, *(() if drawn is None else (drawn,)))
        self._process = subprocess.Popen(
            [sys.executable, "-c", _WORKER, repr(settings)],
            cwd=checkout,
            env=os.environ | {"PYTHONPATH": str(checkout)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def step(self, task: int) -> float:
        """Milliseconds of one step of that task."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{task}\n")
        self._process.stdin.flush()
        return 1e3 * float(self._process.stdout.readline())

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


def measure(workers: dict[str, Worker], counts: list[int], steps: int) -> dict[tuple[str, int], list[float]]:
    """(contender, number of tasks) -> milliseconds of its steps; contenders take turns."""
    found: dict[tuple[str, int], list[float]] = {}
    for tasks in counts:
        for turn in range(WARM_UP + steps):
            for name, worker in workers.items():
                milliseconds = worker.step(tasks - 1)
                if turn >= WARM_UP:
                    found.setdefault((name, tasks), []).append(milliseconds)
    return found


def rows(preset: str, arguments: argparse.Namespace, threads: int, command: str) -> list[Time]:
    about, drawn, first = machine.describe(torch.device("cpu")), arguments.drift_tasks, min(arguments.tasks)
    checkouts = {"here": (HERE, None)}
    if arguments.against:
        checkouts["before"] = (arguments.against, None)
    if drawn:
        checkouts["drawn"] = (HERE, drawn)
    workers = {
        name: Worker(checkout, preset, max(arguments.tasks), threads, k) for name, (checkout, k) in checkouts.items()
    }
    try:
        found = measure(workers, arguments.tasks, arguments.steps)
    finally:
        for worker in workers.values():
            worker.end()
    said = {name: about[name] for name in ("commit", "machine", "torch")} | {"threads": threads, "command": command}
    said |= {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "preset": preset}
    medians = {key: statistics.median(samples) for key, samples in found.items()}
    entries = {"permuted-mnist": 2_036_010, "split-mnist": 475_202}[preset]
    made = []
    for (name, tasks), samples in found.items():
        ordered = sorted(samples)
        low, high = ordered[len(ordered) // 5], ordered[-1 - len(ordered) // 5]
        middle = medians[name, tasks]
        ratio, size = middle / medians[name, first], 4 * entries * (tasks - 1)
        k = checkouts[name][1]
        made.append(Time(contender=name, tasks=tasks, drift_tasks=k, steps=len(samples), median_ms=middle, p20_ms=low,
                         p80_ms=high, of_first=ratio, targets_bytes=size, **said))  # fmt: skip
    return made


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.many_tasks", description="Time of a training step by number of tasks."
    )
    parser.add_argument("presets", nargs="+", choices=tuple(INPUTS), metavar="PRESET", help=", ".join(INPUTS))
    parser.add_argument("--tasks", type=int, nargs="+", default=[1, 10, 40, 100], help="numbers of tasks")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--drift-tasks", type=int, metavar="K", help="besides, with K drawn tasks")
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="another checkout, its extension built")
    parser.add_argument("--csv", type=Path, metavar="F", help="append to F, not to the machine's file")
    arguments = parser.parse_args(argv)
    threads = len(os.sched_getaffinity(0))
    command = shlex.join(["python", "-m", "bench.many_tasks", *(sys.argv[1:] if argv is None else argv)])
    for preset in arguments.presets:
        found = rows(preset, arguments, threads, command)
        for t in found:
            print(
                f"{t.preset:15} {t.contender:7} {t.tasks:4} tasks {t.median_ms:8.1f} ms"
                f" ({t.p20_ms:.1f} to {t.p80_ms:.1f}) {t.of_first:5.2f}x  targets {t.targets_bytes / 1e6:.0f} MB",
                flush=True,
            )
        results.append(found, arguments.csv or results.FOLDER / "many-tasks" / f"{found[0].machine}.csv", Time)
    return 0


if __name__ == "__main__":
    sys.exit(main())
