"""This checkout against another commit: the same cases in turns, `python -m bench NAME... --compare BASE`.

BASE gets a checkout of its own, build/compare/COMMIT, with its extension built. It is kept for the next time.
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from . import gate
from .case import Case
from .pool import ROOT, Failed, Process
from .runner import Plan, say

HERE, THERE = "here", "BASE"


@dataclass(frozen=True)
class Comparison:
    """The library's own contender of a case, here and in the other commit.

    Attributes:
        ms, base_ms: median over turns of each turn's median, per step or call.
        ratio: median over turns of here / BASE, so less than 1 is where this checkout is faster; low, high: its
            quartiles; least, most: its extremes.
        share: how far apart both results are, as a share of the case's tolerance.
    """

    case: str
    contender: str
    base: str
    turns: int
    ms: float
    base_ms: float
    ratio: float
    low: float
    high: float
    least: float
    most: float
    share: float

    def __str__(self) -> str:
        return (
            f"{self.case:32} {self.ms:9.3f} ms, BASE {self.base_ms:9.3f} ms, ratio {self.ratio:.3f} "
            f"(quartiles {self.low:.3f} to {self.high:.3f}, all {self.least:.3f} to {self.most:.3f})"
        )


def checkout(base: str, root: Path = ROOT) -> tuple[str, Path]:
    """The commit that a name stands for, and a checkout of it with its extension built.

    Raises:
        LookupError: there is no such commit, or it can't be checked out or built; one line says why.
    """
    commit = _done(
        ["git", "rev-parse", "--verify", "--quiet", f"{base}^{{commit}}"], root, f"no commit is called {base!r}"
    )
    commit = commit.strip()[:12]
    folder = root / "build" / "compare" / commit
    if not folder.exists():
        _done(["git", "worktree", "add", "--force", "--detach", str(folder), commit], root, f"{folder} can't be made")
    say(f"building {folder}")
    _done([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], folder, f"{folder} can't be built")
    return commit, folder


def _done(command: Sequence[str], folder: Path, otherwise: str) -> str:
    try:
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
    except OSError as error:
        raise LookupError(f"--compare: {otherwise}: {error}") from error
    except subprocess.CalledProcessError as error:
        told = error.stderr.strip().splitlines()
        raise LookupError(f"--compare: {': '.join([otherwise, *told[-1:]])}") from error


def compare(plan: Plan, cases: Sequence[Case], base: str, folder: Path) -> list[Comparison]:
    """Every case whose result is the same in both, printed as it comes. folder: BASE's checkout."""
    found = []
    for case in cases:
        with ExitStack() as stack:
            places = {HERE: ROOT, THERE: folder}
            sides = {
                name: stack.enter_context(Process(plan.device, plan.threads, plan.malloc[0], plan.patience, root=place))
                for name, place in places.items()
            }
            try:
                found.append(_compared(plan, case, base, sides))
                print(found[-1], flush=True)
            except Failed as problem:
                say(f"{case.name}: left out: {problem}")
    return found


def _compared(plan: Plan, case: Case, base: str, sides: dict[str, Process]) -> Comparison:
    contender = case.contenders[0]
    backends = [process.ask("describe")["backend"] for process in sides.values()]
    if backends[0] != backends[1]:
        raise Failed(f"other backends: {backends[0]} here, {backends[1]} in BASE")
    results = {}
    for name, process in sides.items():
        answer = process.ask("prepare", case=case.name, contender=contender, quick=plan.quick)
        if "unavailable" in answer:
            raise Failed(f"{name}: {answer['unavailable']}")
        results[name] = {key: gate.Sketch(**values) for key, values in answer["result"].items()}
    verdict = gate.compare(results[THERE], results[HERE], case.tolerance)
    if not verdict.ok:
        raise Failed(f"the results differ: {verdict.reason}")
    for process in sides.values():
        process.ask("warm", contender=contender)
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(plan.turns):
        order = list(sides.items())
        for name, process in (
            order if turn % 2 else reversed(order)
        ):  # who is second finds the machine as the first left it
            samples = process.ask("turn", contender=contender, seconds=plan.seconds, most=plan.most)["ms"]
            times[name].append(statistics.median(samples))
    ratios = [here / there for here, there in zip(times[HERE], times[THERE], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    medians = statistics.median(times[HERE]), statistics.median(times[THERE])
    ratio = statistics.median(ratios)
    return Comparison(
        case.name, contender, base, plan.turns, *medians, ratio, low, high, min(ratios), max(ratios), verdict.worst
    )


def write(found: Sequence[Comparison], path: Path) -> None:
    path.write_text(json.dumps([asdict(comparison) for comparison in found], indent=1) + "\n")
