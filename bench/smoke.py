"""Does everything run here, and right? Every op once by every backend, and a training step of every experiment.

    python -m bench.smoke                on a GPU, in some 15 seconds; the steps are captured as CUDA graphs
    python -m bench.smoke --device cpu   the same on the CPU, without graphs

All of it at tiny shapes, against float64. The checks are shared out among processes, for compiling kernels is what
takes the time; one that dies, or loses the device, costs the check at which it did. What is wrong is printed as it is
found, in lines that begin with SMOKE. Exit status 0: all is right.
"""

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from hypermask_fast import ops
from hypermask_fast.ops import registry

from . import gate, machine, steps
from .case import OURS
from .experiments import experiments, quick
from .micro.shapes import cases
from .op_case import BOTH, FORWARD, calling
from .op_run import by_backend

_BACKENDS = {"cuda": ("cuda", "triton", "plain"), "cpu": ("cpu", "plain")}
_STEP = "step"  # in the place of a backend


def checks(device: torch.device) -> list[str]:
    """Names of all checks, "masked_linear/triton" or "split-mnist/step", those of one op apart from each other."""
    backends = [name for name in _BACKENDS[device.type] if not registry.problem(name)]
    offered = [f"{op}/{name}" for name in backends for op in cases("tiny") if name in ops.OPS[op].offers]
    return [*(f"{name}/{_STEP}" for name in experiments()), *offered]


def fault(check: str, device: torch.device) -> str:
    """What is wrong, "" if nothing is."""
    what, how = check.split("/")
    return _fault_of_step(what, device) if how == _STEP else _fault_of_op(what, how, device)


def _fault_of_op(op: str, backend: str, device: torch.device) -> str:
    case = cases("tiny")[op]
    direction = BOTH if BOTH in case.work else FORWARD
    if ops.OPS[op].refusal(backend, *case.inputs(direction, device, torch.float32)):
        return ""  # not a call that this backend has a kernel for
    expected = case.reference(direction, device).result()
    found = case.run(calling(by_backend(op, backend)), direction, device).result()
    return gate.compare(expected, found, case.tolerances(device)).reason


def _fault_of_step(name: str, device: torch.device) -> str:
    experiment = quick(experiments()[name])
    task = experiment.at[-1]
    expected = steps.build(experiment, task, "reference", device).result()
    found = steps.build(experiment, task, f"{OURS} captured" if device.type == "cuda" else OURS, device).result()
    return gate.compare(expected, found, steps.tolerance(experiment, device, task)).reason


# -- processes --------------------------------------------------------------------------------------------------------


def run_here(names: Sequence[str], device: torch.device) -> None:
    """In a process of its own: "NAME" as a check begins, then "NAME: what is wrong" or "NAME: "."""
    for name in names:
        print(name)
        try:
            why = fault(name, device)
        except Exception as error:
            why = machine.first_line(error)
        print(f"{name}: {why}", flush=True)
        if device.type == "cuda" and machine.device_lost():
            sys.exit(1)  # what follows would fail too: another process goes on


def found_by_processes(names: Sequence[str], device: torch.device) -> Iterator[tuple[str, str]]:
    """(check, what is wrong) of these, by one process after another until all have been begun."""
    left = list(names)
    while left:
        command = [sys.executable, "-u", "-m", "bench.smoke", "--device", str(device), "--only", *left]
        before = len(left)
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            begun = ""
            for line in process.stdout:
                name, colon, why = line.rstrip("\n").partition(": ")
                if name not in left and name != begun:
                    continue  # what a library prints
                if colon:
                    begun = ""
                    yield name, why
                else:
                    begun = name
                    left.remove(name)
        if process.returncode == -signal.SIGINT:  # the time is over, for all of them
            return
        if begun:
            yield begun, f"the process ended with code {process.returncode}"
        elif len(left) == before:
            yield left.pop(0), f"the process ended with code {process.returncode} before it began"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.smoke", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--only", nargs="+", metavar="CHECK", help="these alone, in this process")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    if arguments.only:
        run_here(arguments.only, device)
        return 0
    names = checks(device)
    count, left = min(len(os.sched_getaffinity(0)), 8), set(names)

    def look(share: Sequence[str]) -> int:
        wrong = 0
        for name, why in found_by_processes(share, device):
            left.discard(name)
            if why:
                wrong += 1
                print(f"SMOKE {name.replace('/', ' by ')}: {why}", flush=True)
        return wrong

    try:
        with ThreadPoolExecutor(count) as pool:
            wrong = sum(pool.map(look, [names[i::count] for i in range(count)]))
    except KeyboardInterrupt:
        print(f"SMOKE not done in time: {' '.join(sorted(left))}")
        return 1
    print(f"smoke: {len(names) - wrong} of {len(names)} checks are right")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
