"""`python -m bench.micro.against CHECKOUT`: a small MLP's forward pass here and in another checkout, which take turns.

Each checkout has a process of its own (the extension of both must be built). The mask is at hand, so that a pass is the
network's own work and what reaching the masked parameters costs.
"""

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

ROUNDS, CALLS = 60, 300
_HERE = Path(__file__).parents[2]
_WORKER = """
import sys, time
import torch
from torch import nn
import hypermask_fast as hmf
torch.set_num_threads(1)
torch.manual_seed(0)
def net():
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
model = hmf.HyperMask(net(), 3, 30, hmf.HypernetConfig(8, (16,))).eval()
plain, x = net().eval(), torch.randn(8, 16)
mask = model.mask(1)
calls = {
    "no gradients": lambda: model(x, mask),
    "recorded": lambda: model(x, mask),
    "nn.Module": lambda: plain(x),
}
for line in sys.stdin:
    name, count = line.split(":")
    with torch.set_grad_enabled(name == "recorded"):
        call = calls[name]
        for _ in range(20):
            call()
        start = time.perf_counter()
        for _ in range(int(count)):
            call()
        print((time.perf_counter() - start) / int(count), flush=True)
"""


class Worker:
    """A process in one checkout."""

    def __init__(self, checkout: Path) -> None:
        command = [sys.executable, "-c", _WORKER]
        self._process = subprocess.Popen(
            command, cwd=checkout, env={"PYTHONPATH": str(checkout), "PATH": "", "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def seconds(self, name: str) -> float:
        """Of one call."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{name}:{CALLS}\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.micro.against", description=__doc__)
    parser.add_argument("checkout", type=Path, help="the other checkout")
    arguments = parser.parse_args(argv)
    workers = {"here": Worker(_HERE), "there": Worker(arguments.checkout.resolve())}
    try:
        for name in ("nn.Module", "no gradients", "recorded"):
            times: dict[str, list[float]] = {where: [] for where in workers}
            for _ in range(ROUNDS):
                for where, worker in workers.items():
                    times[where].append(worker.seconds(name))
            here, there = (statistics.median(times[where]) for where in workers)
            ratios = sorted(a / b for a, b in zip(*times.values(), strict=True))
            low, high = ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]
            print(
                f"{name:13}  here {here * 1e6:6.1f} us  there {there * 1e6:6.1f} us  "
                f"ratio {statistics.median(ratios):.3f} (quartiles {low:.3f} to {high:.3f})"
            )
    finally:
        for worker in workers.values():
            worker.end()
    return 0


if __name__ == "__main__":
    sys.exit(main())
