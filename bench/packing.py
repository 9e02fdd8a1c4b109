"""How large packed tasks are, and how far rounding moves their logits: `python -m bench.packing --to FILE.json`

Ten tasks of ResNet-20 (k = 2) with random weights, at sparsity 0 and 50, in every dtype. The error is the norm of the
difference to the model's own logits over their norm, of all tasks on 64 random images.
"""

import argparse
import json
import shlex
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

import hypermask_fast as hmf
from hypermask_fast.files import write_atomic
from hypermask_fast.training.report import versions
from hypermask_fast.training.targets import TargetConfig, build_target

TASKS, WIDTH, IMAGES = 10, 32, 64


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.packing", description=__doc__)
    parser.add_argument("--to", type=Path)
    parser.add_argument("--width", type=int, default=WIDTH, help="of the ResNet-20")
    arguments = parser.parse_args(argv)
    rows = [row for sparsity in (0, 50) for row in measured(sparsity, arguments.width)]
    command = shlex.join(["python", "-m", "bench.packing", *(sys.argv[1:] if argv is None else argv)])
    found = {"packed": rows, "tasks": TASKS, "images": IMAGES, "command": command, "versions": versions()}
    print(json.dumps(found, indent=1))
    if arguments.to is not None:
        write_atomic(arguments.to, json.dumps(found, indent=1) + "\n")


@torch.no_grad()
def measured(sparsity: float, width: int) -> list[dict[str, float | str]]:
    """A row for each dtype: bytes of the file, bytes of what it consists of, relative error of the logits."""
    torch.manual_seed(0)
    target = TargetConfig("resnet20", width=width)
    config = hmf.HypernetConfig(embedding=4, hidden=(4,))
    model = hmf.HyperMask(build_target(target, (3, 32, 32), 10), TASKS, sparsity, config)
    images = torch.randn(IMAGES, 3, 32, 32)
    for task in range(TASKS):  # batch norm has statistics of each task
        model(images, task)
    model.eval()
    own = _logits(model, images)
    rows: list[dict[str, float | str]] = []
    for dtype in ("float32", "bfloat16", "int8"):
        packed = model.pack(dtype=dtype)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "tasks.safetensors"
            packed.save(file)
            served = hmf.inference.load_packed(file, build_target(target, (3, 32, 32), 10))
            error = float((_logits(served, images) - own).norm() / own.norm())
            size = file.stat().st_size
        rows.append({"sparsity": sparsity, "dtype": dtype, "file_bytes": size, **packed.sizes(), "logits_error": error})
    return rows


def _logits(model: hmf.HyperMask | hmf.inference.PackedModel, images: Tensor) -> Tensor:
    return torch.stack([model(images, task=task) for task in range(TASKS)])


if __name__ == "__main__":
    main()
