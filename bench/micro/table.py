"""Tables in Markdown from a file of pytest-benchmark: `python -m bench.micro.table FILE.json [--out FILE.md]`."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

COLUMN = ("backend", "layer", "call")  # the parameter that is a table's columns, by what is measured
TITLES = {"backend": "Ops", "layer": "Layers", "call": "One call"}
RATIOS = {
    "backend": "in brackets how many times as long as the floor",
    "layer": "in brackets how many times as long as PyTorch's own layer",
    "call": "in brackets how many times as long as `F.linear`, or as the op's definition where that is beside it",
}


def tables(results: dict[str, Any]) -> str:
    """One table per kind of benchmark and shape: medians, and what `RATIOS` says."""
    text = [_about(results)]
    for column in COLUMN:
        chosen = [b for b in results["benchmarks"] if column in b["params"]]
        for shape in dict.fromkeys(b["params"].get("shape", "") for b in chosen):
            here = [b for b in chosen if b["params"].get("shape", "") == shape]
            title = f"{TITLES[column]}, {shape}" if shape else TITLES[column]
            text.append(f"### {title}\n\nMedians; {RATIOS[column]}.\n\n{_table(here, column)}")
    return "\n\n".join(text) + "\n"


def _about(results: dict[str, Any]) -> str:
    commit = results["commit_info"]
    text = f"Measured {results['datetime'][:10]} at commit {commit['id'][:7]}" + ("+" if commit["dirty"] else "")
    for name, about in results["machine_info"].items():
        if name.startswith("hypermask_fast"):
            text += f"; {about['device']}, {about['threads']} threads, torch {about['torch']}, {about['backend']}"
    return f"{text}. The machine's load average was {results['load_average_before']:.1f} before."


def _table(benchmarks: list[dict[str, Any]], column: str) -> str:
    columns = list(dict.fromkeys(b["params"][column] for b in benchmarks))
    labels = [name for name in benchmarks[0]["params"] if name not in (column, "shape")]
    with_floor = column == "backend"
    head = [*labels, *(["sizes", "floor"] if with_floor else []), *columns]
    rows: dict[tuple, dict[str, str]] = {}
    for b in benchmarks:
        extra = b["extra_info"]
        row = rows.setdefault(tuple(b["params"][name] for name in labels), {})
        row |= {name: b["params"][name] for name in labels} | {"sizes": extra["sizes"]}
        ratio = extra["floor_ratio"] if with_floor else extra.get("ratio")
        row[b["params"][column]] = duration(b["stats"]["median"]) + (f" ({ratio:.3g})" if ratio else "")
        if with_floor:
            row["floor"] = duration(extra["floor_seconds"])
    lines = [head, ["---"] * len(head), *([row.get(name, "") for name in head] for row in rows.values())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def duration(seconds: float) -> str:
    """Three digits, in ns, us, ms or s."""
    for unit, factor in (("ns", 1e9), ("us", 1e6), ("ms", 1e3)):
        if seconds * factor < 999.5:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds:.3g} s"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.micro.table", description=__doc__)
    parser.add_argument("file", type=Path, metavar="FILE.json", help="of pytest bench/micro --benchmark-json=FILE.json")
    parser.add_argument("--out", type=Path, metavar="FILE.md", help="default: print them")
    arguments = parser.parse_args(argv)
    try:
        text = tables(json.loads(arguments.file.read_text()))
    except OSError as error:
        parser.error(f"{error.filename}: {error.strerror}")
    except (KeyError, TypeError, ValueError) as error:
        parser.error(f"{arguments.file} is no file of bench/micro's results ({type(error).__name__}: {error})")
    if arguments.out:
        arguments.out.write_text(text)
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
