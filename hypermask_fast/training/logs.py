"""Where a run's progress goes: a CSV file, the terminal, TensorBoard. All of them are a `Logger`."""

import csv
import importlib.util
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from ..extras import needed_for
from ..files import write_atomic, writing

if TYPE_CHECKING:
    from rich.progress import Progress

COLUMNS: tuple[str, ...] = (
    "task",
    "iteration",
    "loss",
    "cross_entropy",
    "output_drift",
    "weight_drift",
    "validation_accuracy",
    "lr",
    "sparsity",
)


class Logger(Protocol):
    """Is told of a run's progress. Iterations count from 1 within each task: the number done."""

    def begin_task(self, task: int, iterations: int, start_iteration: int) -> None:
        """A task begins, or goes on after start_iteration of its iterations (0: from its beginning)."""

    def step(self, task: int, iteration: int, values: dict[str, float]) -> None:
        """Numbers after that iteration, some of COLUMNS; called at intervals, not for every iteration.

        With training.inspect once more after a task's last iteration, with names that begin with "inspect/".
        """

    def advance(self, iterations: int) -> None:
        """So many more iterations of the running task are done."""

    def message(self, text: str) -> None:
        """Something for people to read."""

    def close(self) -> None:
        """No more is coming."""


class CsvLog:
    """log.csv: one row per `step`, COLUMNS, empty where a value is missing; every row is on its way to disk at once.

    Args:
        path: the file.
        resume: keep the rows of an earlier part of this run. What lies after the position the run goes on from is
            dropped when its first task begins, a partly written last line with it. Otherwise the file starts anew.
    """

    def __init__(self, path: Path, resume: bool = False) -> None:
        self.path = path
        self._unsettled = resume and path.exists()
        self._file: TextIO | None = None
        if not self._unsettled:
            write_atomic(path, ",".join(COLUMNS) + "\n")

    def begin_task(self, task: int, iterations: int, start_iteration: int) -> None:
        if self._unsettled:
            self._drop_after((task, start_iteration))
            self._unsettled = False

    def step(self, task: int, iteration: int, values: dict[str, float]) -> None:
        if values.keys().isdisjoint(COLUMNS):  # those of an inspection, which has a file of its own
            return
        row = {"task": task, "iteration": iteration, **values}
        with writing(self.path):
            if self._file is None:
                self._file = self.path.open("a", encoding="utf-8", newline="")
            csv.DictWriter(self._file, COLUMNS, extrasaction="ignore", lineterminator="\n").writerow(row)
            self._file.flush()

    def advance(self, iterations: int) -> None:
        pass

    def message(self, text: str) -> None:
        pass

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with writing(self.path):  # what could not be written before is tried again
                file.close()

    def _drop_after(self, position: tuple[int, int]) -> None:
        text = self.path.read_text(encoding="utf-8", errors="replace")
        whole = [line for line in text.split("\n")[:-1] if _is_upto(line, position)]
        write_atomic(self.path, "".join(f"{line}\n" for line in [",".join(COLUMNS), *whole]))


def _is_upto(line: str, position: tuple[int, int]) -> bool:
    cells = line.split(",")
    if len(cells) != len(COLUMNS) or not (cells[0].isdecimal() and cells[1].isdecimal()):
        return False
    return (int(cells[0]), int(cells[1])) <= position


class DownloadProgress:
    """How far a download is, on standard error: a line that moves on a terminal, elsewhere a line every ten seconds."""

    def __init__(self) -> None:
        self.stream = sys.stderr
        self._moves = self.stream.isatty() and os.environ.get("TERM") != "dumb"
        self._told = time.monotonic()

    def message(self, text: str) -> None:
        with suppress(OSError):
            print(f"\r\x1b[K{text}" if self._moves else text, file=self.stream, flush=True)

    def progress(self, what: str, done: int, size: int) -> None:
        """So many bytes, or files, of so many are done."""
        now = time.monotonic()
        if now - self._told < (0.1 if self._moves else 10) and done < size:
            return
        self._told = now
        text = f"{what}: {100 * done // size} % of {size / 1e6:.1f} MB" if size > 1e6 else f"{what}: {done} of {size}"
        with suppress(OSError):
            print(
                f"\r\x1b[K{text}" if self._moves else text,
                end="" if self._moves else "\n",
                file=self.stream,
                flush=True,
            )


class TerminalLog:
    """A progress bar of the running task where `stream` is a terminal, otherwise about ten plain lines per task.

    Args:
        tasks: how many the run has, to say "task 1 of 0 to 4".
        title: a line shown when the first task begins, so when all that can be wrong with a run has been checked.
        stream: standard error by default, so that standard output holds results only.
        labels: what the tasks are called, "task 1 (digits 2, 3)", one for each; by default their numbers.

    A stream that can't be written any more, such as a terminal that was closed, is left alone: it ends no run.

    Raises:
        InputError: `stream` is a terminal and the package rich is missing.
    """

    LINES_PER_TASK = 10
    _SHOWN = ("loss", "cross_entropy", "validation_accuracy")

    def __init__(
        self, tasks: int, title: str = "", stream: TextIO | None = None, labels: Sequence[str] | None = None
    ) -> None:
        self.tasks, self.title = tasks, title
        self.labels = labels or []
        self.stream = stream or sys.stderr
        moves = _is_terminal(self.stream) and os.environ.get("TERM") != "dumb"
        self._progress = _progress(self.stream) if moves else None
        self._total = self._reported = 0

    def begin_task(self, task: int, iterations: int, start_iteration: int) -> None:
        if self.title:
            self.message(self.title)
            self.title = ""
        self._total, self._reported = iterations, self._tenth(start_iteration, iterations)
        name = self._name(task)
        if self._progress is None:
            self.message(f"{name}: iterations {start_iteration + 1} to {iterations}")
            return
        bar = self._progress.task_ids[0]
        self._progress.reset(bar, total=iterations, completed=start_iteration, description=name, numbers="")
        with suppress(OSError):
            self._progress.start()

    def step(self, task: int, iteration: int, values: dict[str, float]) -> None:
        shown = [f"{name.replace('_', ' ')} {values[name]:.4g}" for name in self._SHOWN if name in values]
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], numbers="  ".join(shown))
            return
        tenth = self._tenth(iteration, self._total)
        if tenth > self._reported:
            self._reported = tenth
            place = f"{self._name(task)}  iteration {iteration} of {self._total}"
            self.message("  ".join([place, *shown]))

    def advance(self, iterations: int) -> None:
        if self._progress is not None:
            self._progress.advance(self._progress.task_ids[0], iterations)

    def message(self, text: str) -> None:
        with suppress(OSError):
            if self._progress is not None:
                self._progress.console.print(text, soft_wrap=True)
            else:
                print(text, file=self.stream, flush=True)

    def close(self) -> None:
        if self._progress is not None:
            with suppress(OSError):
                self._progress.stop()

    def _name(self, task: int) -> str:
        label = self.labels[task] if task < len(self.labels) else f"task {task}"
        return f"{label} of 0 to {self.tasks - 1}"

    def _tenth(self, iteration: int, iterations: int) -> int:
        return self.LINES_PER_TASK * iteration // max(iterations, 1)


def on_terminal() -> bool:
    """Whether a progress bar can be shown unasked: standard error is a terminal, and rich is installed."""
    return _is_terminal(sys.stderr) and importlib.util.find_spec("rich") is not None


def _is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and stream.isatty()  # None: it was closed before Python began


def _progress(stream: TextIO) -> "Progress":
    """rich's progress display with one bar, which serves task after task."""
    with needed_for("the progress bar"):
        from rich import progress
        from rich.console import Console
    console = Console(file=stream, markup=False, emoji=False, highlight=False)
    display = progress.Progress(
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[numbers]}", markup=False),
        console=console,
        refresh_per_second=4,
    )
    display.add_task("", total=None, numbers="")
    return display


class TensorBoardLog:
    """Scalars for TensorBoard, each task a run of its own (task-00, task-01, ...) so that their curves overlay.

    Args:
        folder: of the event files. Needs the package tensorboard; see `available`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer: Any = None

    @staticmethod
    def available() -> bool:
        return importlib.util.find_spec("tensorboard") is not None

    def begin_task(self, task: int, iterations: int, start_iteration: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.close()
        # purge_step hides what an interrupted run wrote after the position this one goes on from.
        self._writer = SummaryWriter(str(self.folder / f"task-{task:02d}"), purge_step=start_iteration + 1)

    def step(self, task: int, iteration: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, iteration)

    def advance(self, iterations: int) -> None:
        pass

    def message(self, text: str) -> None:
        pass

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class Loggers:
    """Tells several loggers, in order."""

    def __init__(self, loggers: Sequence[Logger]) -> None:
        self.loggers = tuple(loggers)

    def begin_task(self, task: int, iterations: int, start_iteration: int) -> None:
        for logger in self.loggers:
            logger.begin_task(task, iterations, start_iteration)

    def step(self, task: int, iteration: int, values: dict[str, float]) -> None:
        for logger in self.loggers:
            logger.step(task, iteration, values)

    def advance(self, iterations: int) -> None:
        for logger in self.loggers:
            logger.advance(iterations)

    def message(self, text: str) -> None:
        for logger in self.loggers:
            logger.message(text)

    def close(self) -> None:
        for logger in self.loggers:
            logger.close()
