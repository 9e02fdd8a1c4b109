"""How fast masks that are kept serve, against plain passes: permuted-mnist's MLP, 10 tasks, in one process.

    python -m bench.serving --json bench/results/serving.json

All contenders of a case take turns; a ratio is the median over turns of a contender's time over the plain passes' of
the same turn, so that a machine with other work slows both. Each result is compared with the reference way first.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import hypermask_fast as hmf

from . import machine

TASKS = 10
SERVED, CHECKED, MADE, PLAIN = "kept, in serving()", "kept, by checksums", "all made", "plain passes"


def mlp(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(1024, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


def uncached(model: hmf.HyperMask, run: Callable[[], Tensor]) -> Tensor:
    limit, model.cache.limit = model.cache.limit, 0
    try:
        return run()
    finally:
        model.cache.limit = limit


def served(model: hmf.HyperMask, run: Callable[[], Tensor]) -> Tensor:
    """As within `serving`, whose checksum at the block's end is not part of a pass."""
    model.cache.serving += 1
    try:
        return run()
    finally:
        model.cache.serving -= 1


def contenders(model: hmf.HyperMask, run: Callable[[], Tensor], plain: Callable[[], Any]) -> dict[str, Callable]:
    """What is timed, each compared with the masks made for it."""
    expected = uncached(model, run)
    every = {
        PLAIN: plain,
        SERVED: lambda: served(model, run),
        CHECKED: run,
        MADE: lambda: uncached(model, run),
    }
    for name, contender in every.items():
        if name != PLAIN:
            for _ in range(3):
                torch.testing.assert_close(contender(), expected, msg=f"{name} is wrong")
    return every


def timed(every: dict[str, Callable], turns: int) -> dict[str, dict[str, float]]:
    """Medians of milliseconds, and of ratios to the plain passes of the same turn."""
    times: dict[str, list[float]] = {name: [] for name in every}
    for _ in range(turns):
        for name, contender in every.items():
            started = time.perf_counter()
            contender()
            times[name].append(1e3 * (time.perf_counter() - started))
    rows = {}
    for name, values in times.items():
        ratios = [value / plain for value, plain in zip(values, times[PLAIN], strict=True)]
        rows[name] = {
            "ms": round(statistics.median(values), 2),
            "least_ms": round(min(values), 2),
            "ratio": round(statistics.median(ratios), 3),
            "ratio_of_least": round(min(values) / min(times[PLAIN]), 3),
        }
    return rows


@torch.no_grad()
def measured(turns: int, quick: bool = False) -> dict[str, Any]:
    """Times of every case, and what the cache says of itself; `quick`: of tiny shapes."""
    rows, mixed, width = (40, 20, 8) if quick else (1000, 256, 1000)
    torch.manual_seed(0)
    plain, config = mlp(width), hmf.HypernetConfig(embedding=24, hidden=(100, 100))
    model = hmf.HyperMask(mlp(width), TASKS, 0.0, config).eval()
    x, ids = torch.rand(rows, 1024), torch.arange(mixed) % TASKS
    some = [x[:mixed][ids == task] for task in range(TASKS)]
    cases = {
        f"{TASKS} tasks x {rows} inputs": (lambda: model.forward_all_tasks(x), lambda: [plain(x) for _ in ids[:TASKS]]),
        f"a mixed batch of {mixed} rows": (lambda: model(x[:mixed], ids), lambda: [plain(part) for part in some]),
        f"one task, {mixed} rows": (lambda: model(x[:mixed], 3), lambda: plain(x[:mixed])),
    }
    found = {name: timed(contenders(model, *case), turns) for name, case in cases.items()}
    return {"cases": found, "cache": str(model.cache)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does everything run, and right?")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    result = {
        **machine.describe(torch.device("cpu")),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": f"python -m bench.serving --turns {options.turns}" + " --quick" * options.quick,
        "load": os.getloadavg()[0],
        **measured(options.turns, options.quick),
    }
    for case, rows in result["cases"].items():
        print(case)
        for name, row in rows.items():
            ratios = f"{row['ratio']:6.3f} of plain passes, {row['ratio_of_least']:.3f} of least"
            print(f"  {name:20} {row['ms']:9.2f} ms, {ratios}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
