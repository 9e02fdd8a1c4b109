"""Whole training steps with moments in float32 and in bfloat16, which take turns: `python -m bench.moments`.

Each has a process of its own, whose peak memory is told too. The numbers go to a CSV, one row per case and dtype.
"""

import argparse
import csv
import json
import resource
import statistics
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import torch

from . import machine, results, steps
from .experiments import experiments

MOMENTS = ("float32", "bfloat16")
FIELDS = ("date", "commit", "machine", "threads", "case", "moments", "ms", "quickest_ms", "ratio", "peak_gb", "command")
WARM_UP = 3


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.moments", description=__doc__)
    parser.add_argument("--experiment", default="permuted-mnist", help="permuted-mnist, or another one of bench")
    parser.add_argument("--tasks", type=int, nargs="+", help="task indices; the first and the last by default")
    parser.add_argument("--rounds", type=int, default=15, help="steps of each, in turns")
    parser.add_argument("--out", type=Path, default=results.FOLDER / "moments", help="folder of the CSV")
    parser.add_argument("--worker", nargs=2, metavar=("MOMENTS", "TASK"), help=argparse.SUPPRESS)
    asked = parser.parse_args(argv)
    experiment = experiments()[asked.experiment]
    if asked.worker:
        return work(asked.experiment, asked.worker[0], int(asked.worker[1]))
    about = machine.describe(torch.device("cpu"))
    words = sys.argv[1:] if argv is None else argv
    same = {
        "commit": about["commit"],
        "machine": about["machine"],
        "threads": torch.get_num_threads(),
        "command": " ".join(["python -m bench.moments", *words]),
    }
    rows = []
    for task in asked.tasks or (experiment.at[0], experiment.at[-1]):
        times, peaks = measure(asked.experiment, task, asked.rounds)
        middle = {moments: statistics.median(values) for moments, values in times.items()}
        for moments in MOMENTS:
            own = {
                "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "case": f"{experiment.name}/task{task}",
                "moments": moments,
                "ms": round(middle[moments], 2),
                "quickest_ms": round(min(times[moments]), 2),
                "ratio": round(middle["float32"] / middle[moments], 3),
                "peak_gb": round(peaks[moments], 3),
            }
            rows.append(same | own)
            print("{case} {moments}: {ms} ms, {ratio} x, {peak_gb} GB".format(**own), flush=True)
    write(asked.out / f"{about['machine']}.csv", rows)
    return 0


def measure(experiment: str, task: int, rounds: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Milliseconds of every step after the warm-up, and gigabytes of resident memory at most, by dtype."""
    command = [sys.executable, "-m", "bench.moments", "--experiment", experiment, "--worker"]
    workers = {
        moments: subprocess.Popen(
            [*command, moments, str(task)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for moments in MOMENTS
    }
    found: dict[str, list[dict[str, float]]] = {moments: [] for moments in MOMENTS}
    for turn in range(WARM_UP + rounds):
        for moments in MOMENTS if turn % 2 else reversed(MOMENTS):
            found[moments].append(_step(workers[moments]))
    for worker in workers.values():
        worker.communicate()
    times = {moments: [one["ms"] for one in all_of[WARM_UP:]] for moments, all_of in found.items()}
    return times, {moments: all_of[-1]["peak_gb"] for moments, all_of in found.items()}


def _step(worker: subprocess.Popen) -> dict[str, float]:
    assert worker.stdin is not None and worker.stdout is not None
    worker.stdin.write("step\n")
    worker.stdin.flush()
    return json.loads(worker.stdout.readline())


def work(name: str, moments: str, task: int) -> int:
    """A step for every line of standard input."""
    experiment, device = experiments()[name], torch.device("cpu")
    run = steps.StepRun(experiment, task, device, *steps.library(experiment, device, captured=False, moments=moments))
    for _ in sys.stdin:
        begun = time.perf_counter()
        run.run()
        taken = 1e3 * (time.perf_counter() - begun)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # kB on Linux
        print(json.dumps({"ms": taken, "peak_gb": peak}), flush=True)
    return 0


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if new:
            writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    raise SystemExit(main())
