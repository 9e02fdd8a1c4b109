"""The results file: one CSV per machine, one row per contender and case, appended to by every run."""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

FOLDER = Path(__file__).parent / "results"


@dataclass
class Row:
    """One contender's times on one case.

    Attributes:
        date: UTC, ISO 8601; command: what was typed.
        malloc: name of the allocator's setting; malloc_setting: the environment that makes it, or what the contender
            sets by itself without one.
        task_index: of a whole-step case, "" for an op.
        median_ms, p20_ms, p80_ms: per step or call; repeats: samples.
        floor_ms: the larger of bytes over measured bandwidth and flops over the measured rate of `dtype`.
        bytes, flops: what cannot be done without.
        floor_ratio: median over floor; ratio: this median over that of ours (the first one listed) under the same
            allocator setting.
        peak_memory: bytes, of a process of its own; "" where contenders share one.
        bandwidth, flop_rate: the machine's, per second, measured in this run.
        gate: largest error of this contender as a share of the tolerance; "" where it is not compared.
    """

    date: str
    commit: str
    machine: str
    device: str
    cores: int
    threads: int
    python: str
    torch: str
    library: str
    triton: str
    hypnettorch: str
    backend: str
    malloc: str
    malloc_setting: str
    experiment: str
    case: str
    task_index: int | str
    shapes: str
    contender: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    repeats: int
    floor_ms: float
    floor_ratio: float
    bytes: float
    flops: float
    dtype: str
    ratio: float | str
    peak_memory: int | str
    bandwidth: float
    flop_rate: float
    gate: float | str
    command: str


COLUMNS = [field.name for field in fields(Row)]


def append(rows: Sequence[Row], path: Path) -> None:
    """Adds rows to the file, which gets its header before the first. No rows: sees that some can be added later.

    Raises:
        ValueError: the file has other columns, so that rows would not line up with those before.
        OSError: it can't be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists() or path.stat().st_size == 0
    if not new:
        with path.open(newline="") as file:
            _check_header(path, next(csv.reader(file)))
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new and rows:
            writer.writeheader()
        writer.writerows({name: _text(value) for name, value in asdict(row).items()} for row in rows)


def _check_header(path: Path, header: Sequence[str] | None) -> None:
    if list(header or ()) != COLUMNS:
        raise ValueError(f"{path} is no results file of this version: its columns are {', '.join(header or ())[:200]}")


def _text(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value


def read(path: Path) -> list[Row]:
    """All rows of a results file, numbers as numbers. Raises ValueError where its columns are others."""
    with path.open(newline="") as file:
        lines = csv.DictReader(file)
        _check_header(path, lines.fieldnames)
        return [Row(**{name: _parsed(name, text) for name, text in line.items()}) for line in lines]


_INTEGERS = {"cores", "threads", "task_index", "repeats", "peak_memory"}
_NUMBERS = {"median_ms", "p20_ms", "p80_ms", "floor_ms", "floor_ratio", "bytes", "flops", "ratio", "bandwidth"}
_NUMBERS |= {"flop_rate", "gate"}


def _parsed(name: str, text: str) -> object:
    if text and name in _INTEGERS:
        return int(text)
    return float(text) if text and name in _NUMBERS else text


def latest(rows: Iterable[Row]) -> list[Row]:
    """Of every case, contender, allocator setting and thread count the newest row, in order of first appearance."""
    newest: dict[tuple, Row] = {}
    for row in rows:
        key = (row.case, row.contender, row.malloc, row.threads)
        if key not in newest or row.date >= newest[key].date:
            newest[key] = row
    return list(newest.values())
