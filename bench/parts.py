"""Where a training step's time goes: the ops of one contender's step by PyTorch's profiler, appended to a CSV.

    python -m bench.parts split-mnist/task4 permuted-mnist-chunked/task9

An op's time is its own, without that of the ops it calls. "the rest" is the step less all ops: Python, autograd and
dispatch, and the profiler's own work. On a GPU times are the kernels', and the rest is what they do not hide.
"""

import argparse
import os
import shlex
import statistics
import sys
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from . import machine, registry, results
from .case import OURS, Case, Runnable

WARM_UP = 5
REST = "the rest"


@dataclass
class Part:
    """One op with one set of input shapes; ms and calls are per step, share is of the profiled step.

    step_ms: a step without the profiler, the median; profiled_ms: under it, the mean.
    """

    date: str
    commit: str
    machine: str
    threads: int
    torch: str
    backend: str
    case: str
    contender: str
    steps: int
    step_ms: float
    profiled_ms: float
    part: str
    shapes: str
    calls: float
    ms: float
    share: float
    command: str


def measure(run: Runnable, device: torch.device, steps: int) -> tuple[float, float, list[tuple]]:
    """(step_ms, profiled_ms, [(op, shapes, calls per step, ms per step)]), the longest first, the rest last."""
    for _ in range(WARM_UP):
        run.run()
    alone = statistics.median(_timed(run, device) for _ in range(steps))
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities, record_shapes=True) as profiler:
        profiled = statistics.mean(_timed(run, device) for _ in range(steps))
    parts = []
    for event in profiler.key_averages(group_by_input_shape=True):
        if "::" in event.key and not event.key.startswith(("autograd::", "torch::")):  # an op, not a range around ops
            own = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
            parts.append(
                (event.key.split("::")[1], _shapes(event.input_shapes), event.count / steps, own / steps / 1e3)
            )
    parts.sort(key=lambda part: -part[3])
    return alone, profiled, [*parts, (REST, "", 0.0, profiled - sum(part[3] for part in parts))]


def _timed(run: Runnable, device: torch.device) -> float:
    began = time.perf_counter()
    run.run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - began)


def _shapes(shapes: list) -> str:
    """Of the first three tensors: what tells a matrix product from another."""
    found = [shape for shape in shapes if shape and all(isinstance(size, int) for size in shape)]
    return ", ".join("x".join(map(str, shape)) for shape in found[:3])


def rows(case: Case, contender: str, steps: int, device: torch.device, command: str) -> list[Part]:
    about = machine.describe(device)
    step_ms, profiled_ms, found = measure(case.build(contender, device), device, steps)
    said = {name: about[name] for name in ("commit", "machine", "threads", "torch", "backend")}
    said |= {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "command": command}
    said |= {"case": case.name, "contender": contender, "steps": steps}
    said |= {"step_ms": step_ms, "profiled_ms": profiled_ms}
    return [
        Part(**said, part=name, shapes=shapes, calls=calls, ms=ms, share=ms / profiled_ms)
        for name, shapes, calls, ms in found
    ]


def text(parts: list[Part], least: float) -> str:
    """The parts of at least that share of the step, those smaller as one line, and the rest."""
    shown = [part for part in parts if part.share >= least or part.part == REST]
    small = [part for part in parts if part not in shown]
    first = parts[0]
    lines = [f"{first.case}, {first.contender}: {first.step_ms:.3g} ms a step, {first.profiled_ms:.3g} ms profiled"]
    lines += [f"{p.ms:9.3f} ms {p.share:6.1%} {p.calls:6.1f} x {p.part} {p.shapes}" for p in shown[:-1]]
    ms, calls = sum(part.ms for part in small), sum(part.calls for part in small)
    lines.append(f"{ms:9.3f} ms {ms / first.profiled_ms:6.1%} {calls:6.1f} x smaller ops")
    return "\n".join([*lines, f"{parts[-1].ms:9.3f} ms {parts[-1].share:6.1%}          {REST}"])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.parts", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", metavar="CASE", help="whole-step cases or experiments of `python -m bench`")
    parser.add_argument("--contender", default=OURS)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="tiny shapes; kept only with --csv")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--csv", type=Path, metavar="F", help="append to F, not to the machine's file")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    device = torch.device(arguments.device)
    try:
        cases = registry.select(arguments.names, device, arguments.quick)
    except KeyError as problem:
        parser.error(problem.args[0])
    for case in cases:
        if case.task is None or arguments.contender not in case.contenders:
            there = ", ".join(case.contenders) if case.task is not None else "none: it is an op, no step"
            parser.error(f"{case.name} has no steps of {arguments.contender!r}; there are {there}")
    command = shlex.join(["python", "-m", "bench.parts", *(sys.argv[1:] if argv is None else argv)])
    for case in cases:
        found = rows(case, arguments.contender, arguments.steps, device, command)
        print(text(found, least=0.01), end="\n\n")
        if arguments.csv or not arguments.quick:
            path = arguments.csv or results.FOLDER / "parts" / f"{found[0].machine}.csv"
            results.append(found, path, Part)
    return 0


if __name__ == "__main__":
    sys.exit(main())
