"""Runs benchmarks: contenders take turns, A B C A B C ..., each result checked before anything is timed."""

import math
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from types import MappingProxyType
from typing import Any

import torch

from . import gate, machine
from .case import OURS, Case
from .machine import AS_SHIPPED
from .pool import Failed, Process, available_memory, busy
from .results import Row


@dataclass(frozen=True)
class Plan:
    """How much is measured: `turns` per contender of `seconds` each, no more than `most` samples a turn.

    patience: seconds after which a contender that does not answer is left out; None: for ever.
    limit: seconds after which no further case is begun; None: all are.
    beside: after every turn alone, another one beside so many busy processes.
    """

    device: torch.device
    threads: int
    quick: bool = False
    malloc: tuple[str, ...] = tuple(machine.MALLOC)
    turns: int = 7
    seconds: float = 1.0
    most: int = 30
    patience: float | None = None
    limit: float | None = None
    beside: int = 0
    command: str = field(default_factory=lambda: shlex.join(["python", "-m", "bench", *sys.argv[1:]]))


@dataclass
class Entry:
    """One contender in one process, and what was measured of it."""

    contender: str
    process: Process
    share: float | None = None
    nodes: int | None = None  # of its CUDA graph
    samples: list[float] = field(default_factory=list)
    beside: list[list[float]] = field(default_factory=list)  # the samples of each turn beside busy processes
    peak_memory: int | None = None


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Runner:
    """Measures cases one by one; `rows` yields their results as they come.

    Cases that are not isolated share one process per allocator setting, oracles included.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.end = math.inf if plan.limit is None else time.monotonic() + plan.limit
        self._shared: dict[str, Process] = {}
        process = self._shared_process(plan.malloc[0])
        self.about = process.ask("describe")
        self.rates = process.ask("rates", quick=plan.quick)

    def rows(self, cases: Sequence[Case]) -> Iterator[Row]:
        try:
            for case in cases:
                if time.monotonic() < self.end:
                    yield from self._rows(case)
                else:
                    say(f"{case.name}: not begun: {self.plan.limit:g} s are over")
        finally:
            for malloc in list(self._shared):
                self._end_shared(malloc)

    def _rows(self, case: Case) -> Iterator[Row]:
        try:
            oracles = self._oracles(case)
        except Failed as problem:
            say(f"{case.name}: not run, there is no reference to check against: {problem}")
            return
        for malloc in self.plan.malloc:
            yield from self._measure(case, malloc, oracles)

    def _process(self, malloc: str, own: Mapping[str, str] = MappingProxyType({})) -> Process:
        return Process(self.plan.device, self.plan.threads, malloc, self.plan.patience, own)

    @staticmethod
    def own_variables(case: Case, malloc: str, contender: str) -> dict[str, str]:
        """Variables of a contender's own process that its program sets by itself."""
        return case.environment(contender) if case.isolated and malloc == AS_SHIPPED else {}

    def _shared_process(self, malloc: str) -> Process:
        """The one that is there if it still answers, or a new one."""
        process = self._shared.get(malloc)
        if process is not None and not process.alive():
            self._end_shared(malloc)
            process = None
        if process is None:
            process = self._shared[malloc] = self._process(malloc)
        return process

    def _end_shared(self, malloc: str) -> None:
        self._shared.pop(malloc).close()

    # -- correctness --------------------------------------------------------------------------------------------------

    def _oracles(self, case: Case) -> dict[str, dict[str, gate.Sketch]]:
        """The results that contenders have to have, by the oracle's name; large ones leave nothing in memory."""
        names = [name for name in dict.fromkeys(map(case.reference, case.contenders)) if name]
        found = {}
        with ExitStack() as stack:
            if case.isolated and not self.plan.quick:
                process = stack.enter_context(self._process("tuned"))
            else:
                process = self._shared_process(self.plan.malloc[0])
            for name in names:
                process.send("prepare", case=case.name, contender=name, quick=self.plan.quick)
                found[name] = self._prepared(process)
        return found

    @staticmethod
    def _prepared(process: Process, entry: Entry | None = None) -> dict[str, gate.Sketch]:
        """The result of what was asked for last; an entry is told of its graph."""
        answer = process.answer()
        if "unavailable" in answer:
            raise Failed(answer["unavailable"])
        if entry is not None:
            entry.nodes = answer.get("nodes")
        return {name: gate.Sketch(**values) for name, values in answer["result"].items()}

    def _admit(self, case: Case, entry: Entry, oracles: dict) -> bool:
        """Whether a contender's result is right; says why if not."""
        try:
            result = self._prepared(entry.process, entry)
        except Failed as problem:
            say(f"{case.name}: {entry.contender} is left out: {problem}")
            return False
        name = case.reference(entry.contender)
        if not name:
            return True
        verdict = gate.compare(oracles[name], result, case.tolerance)
        entry.share = verdict.worst
        if not verdict.ok:
            say(f"{case.name}: {entry.contender} is WRONG and gets no time: {verdict.reason}")
        return verdict.ok

    # -- time ---------------------------------------------------------------------------------------------------------

    def _measure(self, case: Case, malloc: str, oracles: dict) -> Iterator[Row]:
        for number, group in enumerate(self._groups(case)):
            with ExitStack() as stack:
                entries = self._enter(case, group, malloc, oracles, stack)
                say(f"{case.name}, malloc {malloc}: {', '.join(entry.contender for entry in entries) or 'nothing'}")
                entries = self._take_turns(case, entries)
                ours = next((entry for entry in entries if entry.contender.startswith(OURS)), None)
                for entry in entries:
                    if entry.nodes and entry.samples:
                        say(f"{case.name}: {entry.contender}: {of_nodes(entry)}")
                    if entry is not ours or number == 0:  # ours is in every group, and one row is enough
                        yield self._row(case, malloc, entry, ours)
                        if entry.beside:
                            yield self._row_beside(case, malloc, entry, ours)

    def _groups(self, case: Case) -> list[tuple[str, ...]]:
        """Contenders that fit into memory together; where not all do, ours is measured anew with each group."""
        first, *others = case.contenders
        if not case.isolated or self.plan.device.type == "cuda":
            return [case.contenders]
        room = 0.8 * available_memory() - case.memory(first)
        groups: list[list[str]] = [[]]
        left = room
        for other in others:
            if groups[-1] and case.memory(other) > left:
                groups.append([])
                left = room
            groups[-1].append(other)
            left -= case.memory(other)
        return [(first, *group) for group in groups]

    def _enter(self, case: Case, group: Sequence[str], malloc: str, oracles: dict, stack: ExitStack) -> list[Entry]:
        """Starts the contenders, side by side, and keeps those whose result is right."""
        shared = None if case.isolated else self._shared_process(malloc)
        entries = [
            Entry(name, shared or stack.enter_context(self._process(malloc, self.own_variables(case, malloc, name))))
            for name in group
        ]
        for entry in entries:
            entry.process.send("prepare", case=case.name, contender=entry.contender, quick=self.plan.quick)
        kept = []
        for entry in entries:
            if self._admit(case, entry, oracles):
                kept.append(entry)
            elif case.isolated:
                entry.process.close()
        return kept

    def _take_turns(self, case: Case, entries: list[Entry]) -> list[Entry]:
        kept = self._each(case, entries, self._warm)
        for _ in range(self.plan.turns):
            kept = self._each(case, kept, self._alone)
            if self.plan.beside:
                with busy(self.plan.beside):
                    kept = self._each(case, kept, self._beside)
        for entry in kept if case.isolated else kept[:1]:
            peak = entry.process.ask("release")["peak_memory"]
            entry.peak_memory = peak if case.isolated else None
        return kept

    @staticmethod
    def _each(case: Case, entries: list[Entry], do: Callable[[Entry], None]) -> list[Entry]:
        """Something with each contender in turn; those that have done it."""
        kept = []
        for entry in entries:
            try:
                do(entry)
                kept.append(entry)
            except Failed as problem:
                say(f"{case.name}: {entry.contender} is left out: {problem}")
        return kept

    @staticmethod
    def _warm(entry: Entry) -> None:
        entry.process.ask("warm", contender=entry.contender)

    def _alone(self, entry: Entry) -> None:
        entry.samples += self._turn(entry)

    def _beside(self, entry: Entry) -> None:
        entry.beside.append(self._turn(entry))

    def _turn(self, entry: Entry) -> list[float]:
        plan = self.plan
        return entry.process.ask("turn", contender=entry.contender, seconds=plan.seconds, most=plan.most)["ms"]

    @staticmethod
    def setting(case: Case, malloc: str, contender: str) -> str:
        """What a contender runs under, as one would type it."""
        own = machine.typed(Runner.own_variables(case, malloc, contender))
        return machine.malloc_setting(malloc) or " ".join(filter(None, (own, case.allocator(contender))))

    # -- results ------------------------------------------------------------------------------------------------------

    def _row_beside(self, case: Case, malloc: str, entry: Entry, ours: Entry | None) -> Row:
        """A row of another case, whose name says beside how many."""
        suffix = f" beside {self.plan.beside}"
        say(f"{case.name}{suffix}: {entry.contender}: {of_alone(entry)}")
        case = replace(case, name=case.name + suffix, experiment=case.experiment + suffix)
        return self._row(case, malloc, busied(entry), busied(ours) if ours else None)

    def _row(self, case: Case, malloc: str, entry: Entry, ours: Entry | None) -> Row:
        moved, work = case.floor()
        bandwidth, rate = self.rates["bandwidth"], self.rates[case.dtype]
        floor = 1e3 * max(moved / bandwidth, work / rate)
        low, median, high = quantiles(entry.samples)
        measured: dict[str, Any] = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "malloc": malloc,
            "malloc_setting": self.setting(case, malloc, entry.contender),
            "experiment": case.experiment,
            "case": case.name,
            "task_index": case.task,
            "shapes": case.shapes,
            "contender": entry.contender,
            "median_ms": median,
            "p20_ms": low,
            "p80_ms": high,
            "repeats": len(entry.samples),
            "floor_ms": floor,
            "floor_ratio": median / floor,
            "bytes": moved,
            "flops": work,
            "dtype": case.dtype,
            "ratio": median / quantiles(ours.samples)[1] if ours else None,
            "peak_memory": entry.peak_memory,
            "bandwidth": bandwidth,
            "flop_rate": rate,
            "gate": entry.share,
            "command": self.plan.command,
        }
        return Row(**self.about, **measured)


def busied(entry: Entry) -> Entry:
    """The same contender with the samples beside busy processes as its samples."""
    return replace(entry, samples=[sample for turn in entry.beside for sample in turn])


def of_alone(entry: Entry) -> str:
    """Its time beside busy processes as a multiple of that alone: the median, and the mean of the slowest turn."""
    alone = statistics.median(entry.samples)
    slowest = max(map(statistics.fmean, entry.beside))
    return f"{statistics.median(busied(entry).samples) / alone:.2f} x alone, slowest turn {slowest / alone:.2f} x"


def of_nodes(entry: Entry) -> str:
    """How many nodes its graph has, and what one takes of the median."""
    return f"{entry.nodes} graph nodes, {1e3 * quantiles(entry.samples)[1] / entry.nodes:.2f} us per node"


def quantiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """20th percentile, median and 80th percentile."""
    if len(samples) == 1:
        return (samples[0],) * 3
    tenths = statistics.quantiles(samples, n=10, method="inclusive")
    return tenths[1], tenths[4], tenths[7]
