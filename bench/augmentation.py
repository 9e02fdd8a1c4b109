"""What the presets' training batches cost to make: `python -m bench.augmentation --to FILE.json`

Batches of 32 and 256 of CIFAR-100's images with every augmentation there is of them, on the CPU or a GPU; the settings
take turns, medians.
"""

import argparse
import json
import shlex
import statistics
import sys
import time
from pathlib import Path

import torch

from hypermask_fast.data import AutoAugment, BrightnessJitter, Compose, HorizontalFlip, Normalize, PadCrop, TensorSplit
from hypermask_fast.files import write_atomic
from hypermask_fast.training.report import device_name, versions

_MOVED = (PadCrop(32, 4), HorizontalFlip())
AUGMENTED = {
    "normalised": None,
    "crop and flip": Compose(*_MOVED),
    "crop, flip, brightness, AutoAugment": Compose(*_MOVED, BrightnessJitter(63 / 255), AutoAugment(32)),
}
_WARM_UP = 5


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.augmentation", description=__doc__)
    parser.add_argument("--to", type=Path)
    parser.add_argument("--turns", type=int, default=50)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    images = torch.randint(256, (1000, 3, 32, 32), dtype=torch.uint8)
    prepare = Normalize((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
    rows = []
    splits = {
        name: TensorSplit(images, torch.zeros(1000, dtype=torch.int64), prepare, augment).to(device)
        for name, augment in AUGMENTED.items()
    }
    for size in (32, 256):
        times: dict[str, list[float]] = {name: [] for name in splits}
        for _ in range(_WARM_UP + arguments.turns):
            for name, split in splits.items():
                index = torch.randint(1000, (size,), device=device)
                _wait(device)
                started = time.perf_counter()
                split.batch(index, train=True)
                _wait(device)
                times[name].append(time.perf_counter() - started)
        for name, each in times.items():
            seconds = statistics.median(each[_WARM_UP:])
            rows.append({"batch": size, "images": name, "ms": 1e3 * seconds, "images_per_second": size / seconds})
    found = {
        "batches": rows,
        "device": device_name(device),
        "command": shlex.join(["python", "-m", "bench.augmentation", *(sys.argv[1:] if argv is None else argv)]),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    print(json.dumps(found, indent=1))
    if arguments.to is not None:
        write_atomic(arguments.to, json.dumps(found, indent=1) + "\n")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
