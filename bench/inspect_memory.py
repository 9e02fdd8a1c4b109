"""How much memory it takes to inspect many tasks' masks on the CPU: `python -m bench.inspect_memory [--tasks T]`.

Four linear layers like those of a ViT-Base block, 8.3 M masked entries, made by a chunked hypernetwork.
"""

import argparse
import resource
import time
from itertools import pairwise

import torch
from torch import nn

import hypermask_fast as hmf

WIDTHS = (768, 2304, 768, 3072, 768)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.inspect_memory", description=__doc__)
    parser.add_argument("--tasks", type=int, default=40)
    tasks = parser.parse_args(argv).tasks
    net = nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(WIDTHS)), nn.Linear(768, 5))
    config = hmf.HypernetConfig(embedding=48, hidden=(100,), chunk_size=50_000)
    model = hmf.HyperMask(net, tasks, 30, config)
    with torch.no_grad():
        model.mask(0)
    before, started = _peak(), time.perf_counter()
    found = hmf.analysis.inspect(model)
    all_at_once = 4 * tasks * found.whole.entries / 1e9
    print(f"{tasks} tasks, {found.whole.entries:,} entries: all masks at once would be {all_at_once:.2f} GB")
    print(f"peak resident memory {before:.2f} GB with one mask made, {_peak():.2f} GB after inspect")
    print(f"{time.perf_counter() - started:.0f} s, {torch.get_num_threads()} threads")
    return 0


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # kB on Linux


if __name__ == "__main__":
    raise SystemExit(main())
