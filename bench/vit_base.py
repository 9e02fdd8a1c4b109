"""How much memory a ViT-Base takes to convert and to train on the CPU, in a process of its own.

    python -m bench.vit_base --json bench/results/vit-base.json

Per stage the peak of the process's resident set so far, PyTorch's own libraries included, and how long it took.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hypermask_fast as hmf

from . import machine

LIMIT = 4 * 10**9
# glibc keeps freed blocks of less than 32 MB, in pieces: with the second setting a layer's go back to the system.
ALLOCATORS = {"as shipped": {}, "given back": {"MALLOC_MMAP_THRESHOLD_": "1000000"}}


class VitBase(nn.Module):
    """ViT-Base/16 for images of 224 x 224 (Dosovitskiy et al. 2020), as far as its sizes go: 86 million parameters."""

    def __init__(self, classes: int = 1000, width: int = 768, depth: int = 12) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, 197, width))
        layer = nn.TransformerEncoderLayer(width, 12, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


def stages(budget: int, batch: int) -> dict[str, Any]:
    """Converts and trains here, and says what each stage took."""
    rows: list[dict[str, Any]] = []
    started = time.perf_counter()

    def stage(name: str) -> None:
        nonlocal started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        rows.append({"stage": name, "peak_bytes": peak, "seconds": round(time.perf_counter() - started, 2)})
        started = time.perf_counter()

    torch.manual_seed(0)
    net = VitBase()
    parameters = sum(p.numel() for p in net.parameters())
    stage("the network by itself")
    layout = hmf.MaskLayout.of(net, heads="head")
    config = hmf.HypernetConfig.auto(layout, budget)
    model = hmf.HyperMask(net, 2, 30, config, heads="head")
    stage("converted")
    optimizer = hmf.optim.Adam(model)
    losses = []
    for task in (0, 1):
        optimizer.zero_grad()
        model.begin_task(task)
        x, y = torch.randn(batch, 3, 224, 224), torch.randint(1000, (batch,))
        mask = model.mask(task)
        loss = F.cross_entropy(model(x, mask), y) + (model.regularizer(mask) if task else 0)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        del mask, loss
        stage(f"a step of task {task}")
    return {
        "network_parameters": parameters,
        "masked_entries": layout.size,
        "hypernetwork": str(config),
        "hypernetwork_parameters": sum(p.numel() for p in model.hypernet.parameters()),
        "batch": batch,
        "losses": losses,
        "stages": rows,
    }


def measure(budget: int, batch: int, environment: dict[str, str]) -> dict[str, Any]:
    """`stages` in a process of its own."""
    command = [sys.executable, "-m", "bench.vit_base", "--child", "--budget", str(budget), "--batch", str(batch)]
    folder, env = Path(__file__).parent.parent, {**os.environ, **environment}
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder, env=env)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=int, default=150_000_000, help="bytes that the hypernetwork may train in")
    parser.add_argument("--batch", type=int, default=2, help="images")
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(stages(arguments.budget, arguments.batch)))
        return 0
    runs = {name: measure(arguments.budget, arguments.batch, env) for name, env in ALLOCATORS.items()}
    found = {**machine.describe(torch.device("cpu")), "runs": runs}
    found |= {"date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    found |= {"command": " ".join(["python -m bench.vit_base", *sys.argv[1:]])}
    text = json.dumps(found, indent=1)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n", encoding="utf-8")
    peaks = {name: max(row["peak_bytes"] for row in run["stages"]) for name, run in runs.items()}
    print(", ".join(f"{name}: peak {peak / 1e9:.2f} GB" for name, peak in peaks.items()), file=sys.stderr)
    return 0 if min(peaks.values()) <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
