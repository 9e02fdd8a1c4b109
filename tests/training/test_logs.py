import csv
import io
import sys
import types
from pathlib import Path

import pytest

from hypermask_fast.training import logs
from hypermask_fast.training.logs import COLUMNS, CsvLog, Loggers, TensorBoardLog, TerminalLog

STEPS = [(task, iteration) for task in range(2) for iteration in (10, 20, 30)]


def values_at(task: int, iteration: int) -> dict[str, float]:
    return {"loss": 100.0 * task + iteration, "lr": 0.1, "sparsity": 12.5}


def write_log(path: Path, steps=STEPS) -> None:
    log = CsvLog(path)
    for task, iteration in steps:
        log.step(task, iteration, values_at(task, iteration))
    log.close()


def resumed_at(path: Path, task: int, iteration: int) -> None:
    """Opens the log as a run that goes on from there does, and writes what such a run writes."""
    log = CsvLog(path, resume=True)
    log.begin_task(task, 30, iteration)
    for step in STEPS:
        if step > (task, iteration):
            log.step(*step, values_at(*step))
    log.begin_task(task + 1, 30, 0)
    log.close()


def test_csv_rows_and_empty_cells(tmp_path):
    write_log(tmp_path / "log.csv")
    with (tmp_path / "log.csv").open() as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    assert tuple(reader.fieldnames) == COLUMNS
    assert [(int(row["task"]), int(row["iteration"])) for row in rows] == STEPS
    assert float(rows[-1]["loss"]) == 130.0
    assert rows[0]["validation_accuracy"] == ""


def test_csv_rows_can_be_read_while_the_run_goes_on(tmp_path):
    log = CsvLog(tmp_path / "log.csv")
    log.step(0, 10, {"loss": 0.5})
    assert (tmp_path / "log.csv").read_text().splitlines()[1] == "0,10,0.5,,,,,,"
    log.close()


@pytest.mark.parametrize("position", [(0, 0), (0, 15), (0, 20), (0, 30), (1, 0), (1, 10), (1, 29)])
def test_csv_resumed_anywhere_is_as_if_never_stopped(tmp_path, position):
    write_log(tmp_path / "whole.csv")
    write_log(tmp_path / "log.csv")
    resumed_at(tmp_path / "log.csv", *position)
    assert (tmp_path / "log.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


@pytest.mark.parametrize("cut", [1, 5, 12])
def test_csv_resumed_after_a_kill_in_the_middle_of_a_line(tmp_path, cut):
    write_log(tmp_path / "whole.csv")
    write_log(tmp_path / "log.csv", STEPS[:5])
    content = (tmp_path / "log.csv").read_bytes()
    (tmp_path / "log.csv").write_bytes(content[:-cut])
    resumed_at(tmp_path / "log.csv", 1, 10)
    assert (tmp_path / "log.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_csv_resumed_drops_a_cut_line_even_before_the_position(tmp_path):
    write_log(tmp_path / "log.csv", STEPS[:2])
    whole = (tmp_path / "log.csv").read_text().splitlines()
    (tmp_path / "log.csv").write_bytes((tmp_path / "log.csv").read_bytes()[:-2])  # a cell cut short, none missing
    log = CsvLog(tmp_path / "log.csv", resume=True)
    log.begin_task(0, 30, 20)
    log.close()
    assert (tmp_path / "log.csv").read_text().splitlines() == whole[:2]


def test_csv_not_resumed_starts_anew_and_a_finished_one_stays(tmp_path):
    write_log(tmp_path / "log.csv")
    content = (tmp_path / "log.csv").read_bytes()
    CsvLog(tmp_path / "log.csv", resume=True).close()
    assert (tmp_path / "log.csv").read_bytes() == content, "resumed with nothing left to train"
    CsvLog(tmp_path / "log.csv").close()
    assert (tmp_path / "log.csv").read_text() == ",".join(COLUMNS) + "\n"


def test_csv_resumed_without_a_file(tmp_path):
    log = CsvLog(tmp_path / "log.csv", resume=True)
    log.begin_task(0, 30, 0)
    log.step(0, 10, {"loss": 1.0})
    log.close()
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 2


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run_through(log: TerminalLog, iterations: int, every: int) -> None:
    log.begin_task(1, iterations, 0)
    for i in range(1, iterations + 1):
        log.advance(1)
        if i % every == 0:
            log.step(1, i, {"loss": 1 / i, "lr": 1.0})
    log.message("done")
    log.close()


def test_plain_lines_are_few_and_name_their_task():
    stream = io.StringIO()
    run_through(TerminalLog(5, "a title", stream), iterations=1000, every=1)
    lines = stream.getvalue().splitlines()
    assert lines[:2] == ["a title", "task 1 of 0 to 4: iterations 1 to 1000"]
    assert lines[-1] == "done"
    assert lines[-2] == "task 1 of 0 to 4  iteration 1000 of 1000  loss 0.001"
    assert len(lines) == 3 + TerminalLog.LINES_PER_TASK


def test_tasks_have_their_names():
    stream = io.StringIO()
    run_through(TerminalLog(2, stream=stream, labels=["task 0 (cats)", "task 1 (dogs)"]), iterations=10, every=10)
    told = ["task 1 (dogs) of 0 to 1: iterations 1 to 10", "task 1 (dogs) of 0 to 1  iteration 10 of 10  loss 0.1"]
    assert stream.getvalue().splitlines() == [*told, "done"]


def test_a_bar_on_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    run_through(TerminalLog(5, stream=stream), iterations=50, every=10)
    assert "task 1 of 0 to 4" in stream.getvalue()
    assert "50/50" in stream.getvalue()
    assert "done" in stream.getvalue()


def test_no_control_characters_in_files_nor_on_dumb_terminals(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    streams = [io.StringIO(), Terminal()]
    for stream in streams:
        run_through(TerminalLog(5, "a [bold]title[/bold]", stream), iterations=20, every=5)
    assert streams[0].getvalue() == streams[1].getvalue()
    assert streams[0].getvalue().startswith("a [bold]title[/bold]\ntask 1 of 0 to 4: iterations 1 to 20\n")
    assert streams[0].getvalue().replace("\n", "").isprintable()


def test_a_bar_serves_task_after_task_and_leaves_the_stream_as_it_was(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stream, outputs = Terminal(), (sys.stdout, sys.stderr)
    log = TerminalLog(2, "a [bold]title[/bold]", stream)
    for task in range(2):
        log.begin_task(task, 30, 10 * task)
        log.step(task, 20, values_at(task, 20))
        log.advance(30 - 10 * task)
        log.message(f"after task {task}")
    log.close()
    log.close()
    shown = stream.getvalue()
    assert "a [bold]title[/bold]" in shown and "loss 120" in shown
    assert shown.index("task 0 of 0 to 1") < shown.index("after task 0") < shown.index("task 1 of 0 to 1")
    assert "10/30" in shown, "a task that is gone on with begins where it was"
    assert shown.rstrip().endswith("\x1b[?25h"), "the cursor is shown again"
    assert (sys.stdout, sys.stderr) == outputs


@pytest.mark.parametrize("term", ["dumb", "xterm"])
def test_a_terminal_that_is_gone_ends_no_run(monkeypatch, term):
    class Gone(Terminal):
        def write(self, text):
            raise OSError(5, "Input/output error")

    monkeypatch.setenv("TERM", term)
    monkeypatch.setattr("threading.excepthook", lambda _: None)  # of the thread that draws the bar
    run_through(TerminalLog(5, "a title", Gone()), iterations=50, every=10)


def test_loggers_tell_all(tmp_path):
    streams = [io.StringIO(), io.StringIO()]
    logs = Loggers([TerminalLog(1, stream=stream) for stream in streams])
    run_through(logs, 10, 5)
    assert streams[0].getvalue() == streams[1].getvalue() != ""


def test_tensorboard_gets_a_run_per_task(tmp_path, monkeypatch):
    """With a stand-in for the writer, so that the package need not be installed."""
    made = []

    class SummaryWriter:
        def __init__(self, log_dir, purge_step):
            self.log_dir, self.purge_step, self.scalars, self.open = log_dir, purge_step, [], True
            made.append(self)

        def add_scalar(self, name, value, step):
            self.scalars.append((name, value, step))

        def close(self):
            self.open = False

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    log = TensorBoardLog(tmp_path)
    log.begin_task(0, 30, 10)
    log.step(0, 20, {"loss": 1.5})
    log.begin_task(1, 30, 0)
    log.close()
    assert [Path(writer.log_dir).name for writer in made] == ["task-00", "task-01"]
    assert [writer.purge_step for writer in made] == [11, 1]
    assert made[0].scalars == [("loss", 1.5, 20)]
    assert not any(writer.open for writer in made)


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_of_a_download(monkeypatch, terminal):
    """A line that moves on a terminal; elsewhere lines, ten seconds apart, and the last one always."""
    stream, now = io.StringIO(), [0.0]
    stream.isatty = lambda: terminal
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(logs.sys, "stderr", stream)
    monkeypatch.setattr(logs.time, "monotonic", lambda: now[0])
    shown = logs.DownloadProgress()
    shown.message("downloading a")
    for second in range(21):
        now[0] = float(second)
        shown.progress("a", second * 10**6, 20 * 10**6)
    lines = ["downloading a", "a: 50 % of 20.0 MB", "a: 100 % of 20.0 MB"]
    if terminal:
        lines[1:1] = [f"a: {5 * second} % of 20.0 MB" for second in range(1, 10)]
        lines[-1:] = [f"a: {5 * second} % of 20.0 MB" for second in range(11, 21)]
        assert stream.getvalue() == "".join(f"\r\x1b[K{line}" for line in lines).replace("ng a", "ng a\n", 1)
    else:
        assert stream.getvalue() == "".join(f"{line}\n" for line in lines)
