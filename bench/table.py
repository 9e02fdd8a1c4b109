"""Results as a table for people: `python -m bench.table CSV...`, the newest rows of results files."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .results import latest, read

if TYPE_CHECKING:
    import pandas as pd

_COLUMNS = {"median_ms": "median ms", "p20_ms": "p20", "p80_ms": "p80", "ratio": "x ours", "floor_ratio": "x floor"}


def table(rows: "pd.DataFrame") -> str:
    """One line per row; "x ours": how many times as long as the library takes, "x floor": as the floor."""
    place = rows.groupby(["case", "malloc"], sort=False).ngroup().sort_values(kind="stable")
    shown = rows.loc[place.index].set_index(["case", "malloc", "contender"]).rename(columns=_COLUMNS)
    shown["peak GB"] = shown["peak_memory"].astype("float64") / 1e9
    formats = dict.fromkeys(_COLUMNS.values(), number) | {"peak GB": "{:.2f}".format}
    return shown.to_string(columns=list(formats), formatters=formats, na_rep="", index_names=False)


def number(value: float) -> str:
    """Three digits, without an exponent."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}" if value >= 0.001 else f"{value:.1e}"


def growth(rows: "pd.DataFrame") -> str:
    """Last task's step over the first task's, per experiment and contender: how the cost grows with tasks."""
    steps = rows.dropna(subset=["task_index"]).sort_values("task_index")
    by = steps.groupby(["experiment", "malloc", "contender"])
    several = by["task_index"].nunique() > 1
    if not several.any():
        return ""
    ratio = (by["median_ms"].last() / by["median_ms"].first())[several]
    text = ratio.rename("step at the last task / at the first").to_frame()
    return text.to_string(float_format="{:.2f}".format, index_names=False)


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
