"""Results files: one CSV per machine, one row per contender and case, appended to by every run.

Rows are written with Python's own csv module, so that a machine with nothing but PyTorch can measure; whoever reads
them needs pandas.
"""

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

if TYPE_CHECKING:
    import pandas as pd

FOLDER = Path(__file__).parent / "results"


@dataclass
class Row:
    """One contender's times on one case.

    Attributes:
        date: UTC, ISO 8601; command: what was typed.
        malloc: name of the allocator's setting; malloc_setting: the environment that makes it, or what the contender
            sets by itself without one.
        task_index: of a whole-step case, None for an op.
        median_ms, p20_ms, p80_ms: per step or call; repeats: samples.
        floor_ms: the larger of bytes over measured bandwidth and flops over the measured rate of `dtype`.
        bytes, flops: what cannot be done without.
        floor_ratio: median over floor; ratio: this median over that of ours (the first one listed) under the same
            allocator setting.
        peak_memory: bytes, of a process of its own; None where contenders share one.
        bandwidth, flop_rate: the machine's, per second, measured in this run.
        gate: largest error of this contender as a share of the tolerance; None where it is not compared.
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
    task_index: int | None
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
    ratio: float | None
    peak_memory: int | None
    bandwidth: float
    flop_rate: float
    gate: float | None
    command: str


def append(rows: Sequence[Any], path: Path, kind: type = Row) -> None:
    """Adds rows, dataclasses of one kind, to the file, which gets its header before the first. No rows: sees that some
    can be added later.

    Raises:
        ValueError: the file has other columns, so that rows would not line up with those before.
        OSError: it can't be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists() or path.stat().st_size == 0
    if not new:
        with path.open(newline="") as file:
            _check_header(path, next(csv.reader(file)), kind)
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new and rows:
            writer.writerow(columns(kind))
        for row in rows:
            writer.writerow(f"{x:.6g}" if isinstance(x, float) else x for x in asdict(row).values())


def columns(kind: type = Row) -> list[str]:
    return [field.name for field in fields(kind)]


def _check_header(path: Path, header: Sequence[str], kind: type) -> None:
    if list(header) != columns(kind):
        raise ValueError(f"{path} is no results file of this version: its columns are {', '.join(header)[:200]}")


def read(path: Path) -> "pd.DataFrame":
    """All rows of a results file. Raises ValueError where its columns are others."""
    import pandas as pd

    types = _types()
    numbers = {name: [""] for name, kind in types.items() if kind != "str"}
    frame = pd.read_csv(path, dtype=types, keep_default_na=False, na_values=numbers)
    _check_header(path, list(frame.columns), Row)
    return frame


def frame(rows: Sequence[Row]) -> "pd.DataFrame":
    """Rows as `read` gives them."""
    import pandas as pd

    return pd.DataFrame([asdict(row) for row in rows], columns=columns()).astype(_types())


def _types() -> dict[str, str]:
    """Column -> pandas' type, from what `Row` says."""
    names = {str: "str", int: "Int64", float: "float64"}
    return {field.name: names[(get_args(field.type) or (field.type,))[0]] for field in fields(Row)}


def latest(rows: "pd.DataFrame") -> "pd.DataFrame":
    """Of every case, contender, allocator setting and thread count the newest row, in order of first appearance."""
    key = ["case", "contender", "malloc", "threads"]
    placed = rows.assign(place=rows.groupby(key, sort=False).ngroup()).sort_values("date", kind="stable")
    newest = placed.drop_duplicates(key, keep="last")
    return newest.sort_values("place").drop(columns="place").reset_index(drop=True)
