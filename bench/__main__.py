"""Command line of the benchmarks; see README.md beside this file."""

import argparse
import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch

from . import machine, registry, results
from .runner import Plan, Runner
from .table import growth, table


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m bench", description="hypermask_fast against its peers")
    made.add_argument("names", nargs="*", metavar="NAME", help="an experiment, an op or a case; default: all")
    made.add_argument("--list", action="store_true", help="print the names there are")
    made.add_argument("--quick", action="store_true", help="tiny shapes: does everything run? Kept only with --csv")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    made.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores")
    made.add_argument(
        "--malloc", nargs="+", choices=tuple(machine.MALLOC), help="allocator settings; default: all (GPU: as shipped)"
    )
    made.add_argument("--without", nargs="+", default=[], metavar="CONTENDER", help="contenders to leave out")
    made.add_argument("--turns", type=int, help="turns per contender")
    made.add_argument("--seconds", type=float, help="length of a turn")
    made.add_argument("--patience", type=float, metavar="S", help="leave out a contender that takes longer to answer")
    made.add_argument("--json", type=Path, metavar="F", help="write this run's rows to F as well")
    made.add_argument("--csv", type=Path, metavar="F", help="append to F, not to the machine's file")
    return made


def plan_of(arguments: argparse.Namespace) -> Plan:
    device = torch.device(arguments.device)
    plan = Plan(device, arguments.threads, arguments.quick)
    if arguments.quick:
        plan = replace(plan, turns=2, seconds=0.02, most=5)
    if arguments.malloc:
        plan = replace(plan, malloc=tuple(arguments.malloc))
    elif device.type == "cuda":
        plan = replace(plan, malloc=("as shipped",))  # the GPU has an allocator of its own
    names = ("turns", "seconds", "patience")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    return replace(plan, **given)


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    plan = plan_of(arguments)
    try:
        cases = registry.select(arguments.names, plan.device, plan.quick)
    except KeyError as problem:
        print(problem.args[0], file=sys.stderr)
        return 2
    without = set(arguments.without)
    cases = [replace(case, contenders=tuple(c for c in case.contenders if c not in without)) for case in cases]
    if arguments.list:
        print("\n".join(f"{case.name:32} {case.shapes}" for case in cases))
        return 0
    if plan.device.type != "cuda":
        print("GPU benchmarks are left out: no CUDA device", file=sys.stderr)
    runner, rows = Runner(plan), []
    path = arguments.csv or (None if plan.quick else results.FOLDER / f"{runner.about['machine']}.csv")
    for row in runner.rows(cases):
        rows.append(row)
        if path:  # at once: a run that is stopped keeps what it has measured
            results.append([row], path)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    about = runner.about
    print(f"{about['device']}, {about['threads']} threads, torch {about['torch']}, backend {about['backend']}")
    rates = ", ".join(f"{name} {rate / 1e9:.4g} G/s" for name, rate in runner.rates.items())
    print("\n\n".join(filter(None, (f"measured rates: {rates}", table(rows), growth(rows)))))
    if path:
        print(f"\nappended to {path}")
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())
