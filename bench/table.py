"""Results as a table for people."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .results import Row, latest, read

_HEAD = ("case", "malloc", "contender", "median ms", "p20", "p80", "x ours", "x floor", "peak GB")


def table(rows: Sequence[Row]) -> str:
    """One line per row; "x ours": how many times as long as the library takes, "x floor": as the floor."""
    lines = [_HEAD]
    for row in rows:
        lines.append(
            (
                row.case,
                row.malloc,
                row.contender,
                *(_number(value) for value in (row.median_ms, row.p20_ms, row.p80_ms)),
                _number(row.ratio),
                _number(row.floor_ratio),
                f"{row.peak_memory / 1e9:.2f}" if row.peak_memory != "" else "",
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(_HEAD))]
    text, before = [], ""
    for number, line in enumerate(lines):
        if number > 0 and line[0] != before and before:
            text.append("")
        before = line[0] if number > 0 else ""
        cells = [
            cell.ljust(w) if i < 3 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ]
        text.append("  ".join(cells).rstrip())
    return "\n".join(text)


def _number(value: float | str) -> str:
    """Three digits, without an exponent."""
    if value == "":
        return ""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}" if value >= 0.001 else f"{value:.1e}"


def growth(rows: Sequence[Row]) -> str:
    """Last task's step over the first task's, per experiment and contender: how the cost grows with tasks."""
    lines = []
    steps = [row for row in rows if row.task_index != ""]
    for key in dict.fromkeys((row.experiment, row.malloc, row.contender) for row in steps):
        found = [row for row in steps if (row.experiment, row.malloc, row.contender) == key]
        first, last = min(found, key=_task), max(found, key=_task)
        if first.task_index != last.task_index:
            ratio = last.median_ms / first.median_ms
            lines.append(f"{key[0]:24} {key[1]:12} {key[2]:24} {ratio:6.2f}")
    return "\n".join(["step at the last task / at the first:", *lines]) if lines else ""


def _task(row: Row) -> int:
    return int(row.task_index)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.table", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="CSV", help="a results file: its newest rows")
    try:
        for path in parser.parse_args(argv).files:
            print(table(latest(read(path))))
    except OSError as error:
        parser.error(f"{error.filename}: {error.strerror}")
    except ValueError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
