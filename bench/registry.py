"""All benchmarks. A new one is a `Case` in one of the lists below."""

from functools import cache

import torch

from . import experiments, growth, layer_ops, step_ops, steps, task_ops
from .case import Case


@cache
def cases(device: torch.device, quick: bool) -> tuple[Case, ...]:
    """Every case there is for this device; `quick`: the same with tiny shapes."""
    known = experiments.experiments()
    if quick:
        known = {name: experiments.quick(experiment) for name, experiment in known.items()}
    found = [case for experiment in known.values() for case in steps.cases(experiment, device)]
    found += step_ops.cases(known, device, quick)
    found += growth.cases(device, quick)
    if device.type == "cuda":
        found += [*layer_ops.cases(quick), *task_ops.cases(quick)]
    return tuple(found)


def find(name: str, device: torch.device, quick: bool) -> Case:
    return next(case for case in cases(device, quick) if case.name == name)


def select(names: list[str], device: torch.device, quick: bool) -> list[Case]:
    """Cases whose name or experiment is given, or begins with what is given up to a "/", in the order of the names; all
    but those on request where none is given.

    Raises:
        KeyError: a name that selects nothing; the message lists what there is.
    """
    there = cases(device, quick)
    if not names:
        return [case for case in there if not case.on_request]
    chosen = {}
    for name in names:
        found = {case.name: case for case in there if _matches(case, name)}
        if not found:
            known = ", ".join(dict.fromkeys([*(case.experiment for case in there), *(case.name for case in there)]))
            raise KeyError(f"no benchmark is called {name!r}; there are {known}")
        chosen |= found
    return list(chosen.values())


def _matches(case: Case, name: str) -> bool:
    return name in (case.name, case.experiment) or case.name.startswith(f"{name.rstrip('/')}/")
