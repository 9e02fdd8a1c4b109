"""Figures of several runs together, from what their folders hold: `python -m bench.study RUN... --to DIR`.

Runs of the same settings are one group, whatever their seeds. Written are learning.png (accuracy just after learning
against after all tasks), a mean matrix per group, study.txt (each metric's mean and 95 % interval, and the command),
and nothing else.
"""

import argparse
import shlex
import sys
from pathlib import Path

from hypermask_fast.drawing import png
from hypermask_fast.errors import InputError
from hypermask_fast.training import study
from hypermask_fast.training.study_pictures import learning_figure, mean_matrix_figure


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.study", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders with config.toml and metrics.json")
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="where the figures go")
    given = parser.parse_args(argv)
    try:
        groups = study.grouped(study.read_runs(given.runs))
        figures = {"learning.png": learning_figure(groups)}
        for number, group in enumerate(groups):
            name = "mean-matrix.png" if len(groups) == 1 else f"mean-matrix-{number}.png"
            figures[name] = mean_matrix_figure(group)
    except InputError as error:
        parser.error(str(error))
    given.to.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        (given.to / name).write_bytes(png(figure))
    command = shlex.join(["python", "-m", "bench.study", *given.runs, "--to", str(given.to)])
    table = study.metrics_table(groups)
    (given.to / "study.txt").write_text(f"{command}\n\n{table}\n", encoding="utf-8")
    print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
