"""Steps of runs by the command line, alone and beside busy processes: `python -m bench.runs_beside split-mnist`.

Runs alone and beside busy processes, as many as there are processors, take turns. Each is a process of its own that
trains the preset from its start, so that waiting and threads are what the command line chooses by itself. Its time is
that of the steps between two of its logged ones, for which its log is watched; loading the data is not part of it.
"""

import argparse
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

from . import machine, results
from .pool import busy

HERE = Path(__file__).parents[1]
LOG_EVERY = 10


@dataclass
class Run:
    """One run: milliseconds a step, and that over the median of the runs alone."""

    date: str
    commit: str
    machine: str
    torch: str
    preset: str
    beside: int
    run: int
    steps: int
    step_ms: float
    of_alone: float
    command: str


def step_ms(preset: str, data: Path, steps: int, checkout: Path) -> float:
    """Milliseconds a step of a run of the preset's first task, its first LOG_EVERY steps not counted.

    Raises:
        RuntimeError: the run ended before that many steps.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        words = [sys.executable, "-m", "hypermask_fast", "train", preset, "--out", str(out), "--data-dir", str(data)]
        for setting in (f"log_every={LOG_EVERY}", "validate_every=1000000", "checkpoint_every=1000000"):
            words += ["--set", f"training.{setting}"]
        process = subprocess.Popen(
            words,
            cwd=checkout,
            env=os.environ | {"PYTHONPATH": str(checkout)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            first = when_logged(out / "log.csv", LOG_EVERY, process)
            last = when_logged(out / "log.csv", LOG_EVERY + steps, process)
        finally:
            process.kill()
            process.wait()
    return 1e3 * (last - first) / steps


def when_logged(log: Path, iteration: int, process: subprocess.Popen[bytes]) -> float:
    """The time at which the log has that iteration. It is looked at once a millisecond."""
    rows = 1 + iteration // LOG_EVERY
    while not (log.exists() and log.read_bytes().count(b"\n") >= rows):
        if process.poll() is not None:
            raise RuntimeError(f"the run ended before iteration {iteration}; `hypermask-fast train` says why")
        time.sleep(1e-3)
    return time.perf_counter()


def measure(preset: str, data: Path, steps: int, runs: int, beside: int, checkout: Path) -> dict[int, list[float]]:
    """Number of busy processes -> milliseconds a step of each run; runs alone and beside take turns."""
    times: dict[int, list[float]] = {0: [], beside: []}
    for _ in range(runs):
        for count, found in times.items():
            with busy(count):
                found.append(step_ms(preset, data, steps, checkout))
    return times


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.runs_beside", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("preset")
    parser.add_argument("--data-dir", type=Path, required=True, metavar="D", help="as `hypermask-fast train` has it")
    parser.add_argument("--steps", type=int, default=100, help=f"of a run, a multiple of {LOG_EVERY} (default: 100)")
    parser.add_argument("--runs", type=int, default=5, help="alone, and beside (default: 5)")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--beside", type=int, default=cores, metavar="N", help="busy processes (default: the cores)")
    parser.add_argument("--checkout", type=Path, default=HERE, help="another checkout to measure, its extension built")
    parser.add_argument("--csv", type=Path, metavar="F", help="append to F, not to the machine's file")
    asked = parser.parse_args(argv)
    times = measure(
        asked.preset, asked.data_dir.resolve(), asked.steps, asked.runs, asked.beside, asked.checkout.resolve()
    )
    about = machine.describe(torch.device("cpu"))
    same = {name: about[name] for name in ("commit", "machine", "torch")} | {"preset": asked.preset}
    same["date"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    words = sys.argv[1:] if argv is None else argv
    same["command"] = shlex.join(["python", "-m", "bench.runs_beside", *words])
    alone = statistics.median(times[0])
    rows = [
        Run(beside=count, run=i, steps=asked.steps, step_ms=value, of_alone=value / alone, **same)
        for count, found in times.items()
        for i, value in enumerate(found)
    ]
    for row in rows:
        print(f"{row.preset} beside {row.beside}: {row.step_ms:.1f} ms a step, {row.of_alone:.2f}x")
    results.append(rows, asked.csv or results.FOLDER / "beside" / f"{rows[0].machine}.csv", Run)
    return 0


if __name__ == "__main__":
    sys.exit(main())
