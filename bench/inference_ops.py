"""How long finding the task takes, as ratios within one run: `python -m bench.inference_ops --to FILE.json`

- gradient: the permuted-mnist MLP, 1,000 samples, masks kept, 100 tasks against 10, and entropy beside it;
- distances: 100 classes, 1,000 samples of 400 and of 64 features, from covariances to distances, and with factors kept,
  against a pseudo-inverse and a B x B product per class, of all samples at once and of batches of 128;
- fingerprints: whether statistics are still of these weights, the look that every prediction takes, and the whole.

Contenders take turns; medians.
"""

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import hypermask_fast as hmf
from hypermask_fast.files import write_atomic
from hypermask_fast.inference import Mahalanobis, predict
from hypermask_fast.inference.fingerprint import fingerprints, glance
from hypermask_fast.inference.fitted import TaskGaussians
from hypermask_fast.training.report import versions


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.inference_ops", description=__doc__)
    parser.add_argument("--to", type=Path)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that everything runs")
    arguments = parser.parse_args(argv)
    torch.manual_seed(0)
    found = {
        "gradient": gradient(arguments),
        "distances": [distances(arguments, width) for width in ((20,) if arguments.quick else (400, 64))],
        "command": shlex.join(["python", "-m", "bench.inference_ops", *(sys.argv[1:] if argv is None else argv)]),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    print(json.dumps(found, indent=1))
    if arguments.to is not None:
        write_atomic(arguments.to, json.dumps(found, indent=1) + "\n")


def turns(contenders: dict[str, Callable[[], object]], count: int) -> dict[str, float]:
    """Median milliseconds of each, after one call that is not counted."""
    for call in contenders.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(count):
        for name, call in contenders.items():
            started = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - started))
    return {name: round(statistics.median(values), 3) for name, values in times.items()}


def gradient(arguments: argparse.Namespace) -> dict:
    width, samples, many = (20, 10, 20) if arguments.quick else (1000, 1000, 100)
    net = nn.Sequential(nn.Linear(1024, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))
    model = hmf.HyperMask(net, many, 0, hmf.HypernetConfig(24, (10,))).eval()
    x = torch.randn(samples, 1024)
    with torch.no_grad():
        few, all_of_them = model.all_masks(range(10)), model.all_masks()
    found = turns(
        {
            "gradient, 10 tasks": lambda: predict(model, x, few, method="gradient"),
            f"gradient, {many} tasks": lambda: predict(model, x, all_of_them, method="gradient"),
            "entropy, 10 tasks": lambda: predict(model, x, few, method="entropy"),
            "glance": lambda: glance(model),
            "fingerprints": lambda: fingerprints(model, range(10)),
        },
        arguments.turns,
    )
    return {
        "ms": found,
        f"{many} tasks by 10": round(found[f"gradient, {many} tasks"] / found["gradient, 10 tasks"], 3),
    }


def distances(arguments: argparse.Namespace, width: int) -> dict:
    classes, samples, batch = (5, 30, 10) if arguments.quick else (100, 1000, 128)
    features = torch.randn(samples, width)
    roots = torch.randn(classes, width, width, dtype=torch.float64) / width**0.5
    covariances = roots @ roots.mT / width + 1e-3 * torch.eye(width, dtype=torch.float64)
    means = 0.1 * torch.randn(classes, width, dtype=torch.float64)
    labels = torch.arange(classes)
    fitted = Mahalanobis()
    fitted.of_task = {0: TaskGaussians(labels, labels + 2, means, covariances, b"")}
    inverted = [fitted.metric(covariance).float() for covariance in covariances]
    z = fitted.compared(features)

    def published(count: int, batch: int = samples) -> torch.Tensor:
        rows = []
        for matrix, mean in zip(inverted[:count], means.float(), strict=False):
            deltas = (z - mean).split(batch)
            rows.append(torch.cat([torch.diagonal(each @ torch.linalg.pinv(matrix) @ each.T) for each in deltas]))
        return torch.stack(rows)

    def afresh() -> torch.Tensor:
        fitted._roots.clear()  # noqa: SLF001
        return fitted.distances(features, 0)

    few = min(classes, 5)  # of the published way: the others would take minutes
    torch.testing.assert_close(fitted.distances(features, 0)[:few], published(few), rtol=1e-3, atol=1e-2)
    found = turns(
        {
            "factors kept": lambda: fitted.distances(features, 0),
            "factors made": afresh,
            "published": lambda: published(few),
            f"published, batches of {batch}": lambda: published(few, batch),
        },
        arguments.turns,
    )
    for name in found:
        if name.startswith("published"):
            found[name] = round(found[name] * classes / few, 1)
    return {
        "classes": classes,
        "samples": samples,
        "features": width,
        "ms": found,
        f"the published way was timed for {few} classes and multiplied by": classes / few,
        "times faster, factors kept": round(found["published"] / found["factors kept"], 1),
        f"times faster, factors kept, batches of {batch}": round(
            found[f"published, batches of {batch}"] / found["factors kept"], 1
        ),
        "times faster, factors made": round(found["published"] / found["factors made"], 1),
    }


if __name__ == "__main__":
    main()
