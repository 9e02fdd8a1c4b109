"""Command line of the benchmarks; see README.md beside this file."""

import argparse
import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch

from . import compare, machine, registry, results
from .case import Case
from .runner import Plan, Runner
from .table import growth, table


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m bench", description="hypermask_fast against its peers")
    made.add_argument("names", nargs="*", metavar="NAME", help="an experiment, an op or a case; default: all")
    made.add_argument("--list", action="store_true", help="print the names there are")
    made.add_argument("--quick", action="store_true", help="tiny shapes: does everything run? Kept only with --csv")
    made.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    made.add_argument("--threads", type=_count, default=len(os.sched_getaffinity(0)), help="default: all cores")
    made.add_argument(
        "--malloc",
        nargs="+",
        choices=tuple(machine.MALLOC),
        help="allocator settings; default: all (GPU: as shipped; --quick: tuned)",
    )
    made.add_argument("--without", nargs="+", default=[], metavar="CONTENDER", help="contenders to leave out")
    made.add_argument("--turns", type=_count, help="turns per contender")
    made.add_argument("--seconds", type=float, help="length of a turn")
    made.add_argument("--patience", type=float, metavar="S", help="leave out a contender that takes longer to answer")
    made.add_argument("--limit", type=float, metavar="S", help="begin no further case after S seconds")
    made.add_argument("--beside", type=_count, metavar="N", help="also beside N busy processes, in rows of their own")
    made.add_argument("--compare", metavar="BASE", help="ours against another commit, in turns; kept only with --json")
    made.add_argument("--json", type=Path, metavar="F", help="write this run's rows to F as well")
    made.add_argument("--csv", type=Path, metavar="F", help="append to F, not to the machine's file")
    return made


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {text}")
    return int(text)


def plan_of(arguments: argparse.Namespace) -> Plan:
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    plan = Plan(device, arguments.threads, arguments.quick)
    if arguments.quick:
        plan = replace(plan, turns=2, seconds=0.02, most=5, malloc=("tuned",))
    if arguments.malloc:
        plan = replace(plan, malloc=tuple(arguments.malloc))
    elif device.type == "cuda":
        plan = replace(plan, malloc=("as shipped",))  # the GPU has an allocator of its own
    names = ("turns", "seconds", "patience", "limit", "beside")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    return replace(plan, **given)


def main(argv: list[str] | None = None) -> int:
    """0: something was measured; 1: nothing; 2: what was asked for cannot be done, said before anything is measured."""
    arguments = parser().parse_args(argv)
    plan = plan_of(arguments)
    try:
        cases = cases_of(arguments, plan)
        if arguments.list:
            print("\n".join(f"{case.name:32} {case.shapes}" for case in cases))
            return 0
        if arguments.json:
            arguments.json.touch()
        if arguments.csv:
            results.append([], arguments.csv)
        if arguments.compare:
            return compare_with(arguments, plan, cases)
    except (LookupError, ValueError) as problem:
        return _refuse(problem.args[0])
    except OSError as problem:
        return _refuse(f"{problem.filename}: {problem.strerror}")
    rows = measure(arguments, plan, cases)
    return 0 if rows else 1


def compare_with(arguments: argparse.Namespace, plan: Plan, cases: list[Case]) -> int:
    """Of the same cases, the library here and in another commit. Raises LookupError where that can't be had."""
    if arguments.csv or arguments.beside:
        raise LookupError("--compare gives ratios, which --json keeps: leave out --csv and --beside")
    plan = plan if arguments.malloc else replace(plan, malloc=plan.malloc[-1:])
    found = compare.compare(plan, cases, *compare.checkout(arguments.compare))
    if arguments.json:
        compare.write(found, arguments.json)
    return 0 if found else 1


def _refuse(message: str) -> int:
    print(f"bench: {message}", file=sys.stderr)
    return 2


def cases_of(arguments: argparse.Namespace, plan: Plan) -> list[Case]:
    """What was asked for. Raises LookupError where there is no such thing."""
    if plan.device.type == "cuda" and not torch.cuda.is_available():
        raise LookupError("--device cuda: PyTorch sees no GPU")
    cases = registry.select(arguments.names, plan.device, plan.quick)
    known = dict.fromkeys(contender for case in cases for contender in case.contenders)
    for name in arguments.without:
        if name not in known:
            raise LookupError(f"--without {name!r}: no contender here is called so; there are {', '.join(known)}")
    without = set(arguments.without)
    return [replace(case, contenders=tuple(c for c in case.contenders if c not in without)) for case in cases]


def measure(arguments: argparse.Namespace, plan: Plan, cases: list[Case]) -> list[results.Row]:
    """Runs the cases, keeps each row as it comes and prints all of them as a table."""
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
    print(f"measured rates: {rates}\n\n{_tables(rows)}")
    if plan.quick:
        print("\ntiny shapes: these times only show that everything runs")
    if path:
        print(f"\nappended to {path}")
    return rows


def _tables(rows: list[results.Row]) -> str:
    try:
        frame = results.frame(rows)
    except ImportError:
        return "no table: pandas is not installed here; python -m bench.table prints that of a results file anywhere"
    return "\n\n".join(filter(None, (table(frame), growth(frame))))


if __name__ == "__main__":
    sys.exit(main())
