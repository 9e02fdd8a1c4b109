"""Several runs of one command: `train` with --seeds or --grid, each run a process of its own."""

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from ..files import missing_folders, remove_empty
from ..training import comparison, own, plan, resume, study
from ..training.config import CONFIG, LENGTHS, RunConfig, stored_config
from ..training.interrupt import StopSignals
from ..training.plan import Planned
from ..training.run import build_model, check_free, holds_run, read_scenario, with_data_dir
from .command import EXIT_INPUT, PROGRAM, interrupted, tell

SUMMARY = "summary.json"
_POLL = 0.1  # seconds
_PATIENCE = 30.0  # seconds that a run has to end, once it has been told a second time
_PASSED_ON = ("data_dir", "device", "fidelity", "scenario", "network", "images", "classes_per_task")


@dataclass
class _Process:
    """One run while it trains. last: what it has said last on standard error."""

    run: Planned
    process: subprocess.Popen[str]
    reader: threading.Thread = field(init=False)
    last: str = ""

    def __post_init__(self) -> None:
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        """Passes on what the run says, a line at a time, after its name."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.last = line.rstrip("\n").removeprefix(f"{PROGRAM}: ")
            tell(self.last, self.run.name)


def asked(arguments: argparse.Namespace) -> bool:
    """Whether the command asks for several runs. Raises InputError: --jobs without them."""
    several = arguments.seeds is not None or bool(arguments.grid)
    if arguments.jobs is not None and not several:
        raise InputError("--jobs is for several runs: ask for them by --seeds or --grid")
    return several


def check_alone(processes: int) -> None:
    """Raises InputError where several processes, as torchrun has started them, would each start all runs."""
    if processes > 1:
        raise InputError("--seeds and --grid start processes of their own: leave torchrun out, or give one --seed")


def train(arguments: argparse.Namespace, preset: RunConfig, out: Path, settings: dict[str, Any]) -> int:
    """Trains all runs that the command asks for, in folders below `out`, and sums them up there; returns the exit code.

    Raises:
        InputError: before anything is started: what is asked for is wrong, or `out` is in use. Afterwards: every run
            that failed was refused its input; the message names them.
    """
    runs = _planned(arguments, preset, settings)
    jobs = _jobs(arguments.jobs, len(runs))
    unfinished = _unfinished(arguments, preset, out, settings, runs)
    if len(unfinished) < len(runs):
        tell(f"{len(runs) - len(unfinished)} of {len(runs)} runs are finished already")
    if not arguments.resume:
        _check_any_can_begin(arguments, runs)
    with StopSignals() as signals:
        signals()  # from now on they are remembered
        made = missing_folders(out)
        try:
            failed = _trained(arguments, out, unfinished, jobs, signals)
        except KeyboardInterrupt:  # a second one: the runs have been stopped at once
            failed = {}
        remove_empty(folder for run in runs for folder in (out / run.name).parents if out in folder.parents)
        remove_empty(made)
        if signals.number:
            finished = sum(_is_finished(out, run) for run in runs)
            detail = f": {finished} of {len(runs)} runs are finished{_resumable(out, runs, 'goes on')}"
            return interrupted(signals.number or signal.SIGINT, detail)
    _sum_up(out, [run for run in runs if run.name not in failed])
    if not failed:
        return 0
    by_words: dict[str, list[str]] = {}  # what fails for the same reason is told once
    for name, (_, last) in failed.items():
        by_words.setdefault(last, []).append(name)
    named = "; ".join(f"{', '.join(names)} ({last})" for last, names in by_words.items())
    message = f"{len(failed)} of {len(runs)} runs failed: {named}{_resumable(out, runs, 'tries them again')}"
    if all(code == EXIT_INPUT for code, _ in failed.values()):
        raise InputError(message)
    tell(f"error: {message}")
    return 1


def _resumable(out: Path, runs: list[Planned], words: str) -> str:
    """A hint at --resume, where there is a run to go on with."""
    begun = any((out / run.name / CONFIG).is_file() for run in runs)
    return f"; the same command with --resume {words}" if begun else ""


def _planned(arguments: argparse.Namespace, preset: RunConfig, settings: dict[str, Any]) -> list[Planned]:
    seeds = None if arguments.seeds is None else plan.seeds(arguments.seeds)
    if seeds is not None and "seed" in settings:
        raise InputError("--seeds says all seeds: leave --seed out")
    values = plan.grid(arguments.grid)
    for key in values:
        for other in LENGTHS if key in LENGTHS else (key,):
            if other in settings:
                raise InputError(f"--grid {key} and --set {other}: give one of them")
    return plan.planned(own.fingerprinted(preset.with_values(settings)), seeds, values)


def _jobs(asked_for: int | None, runs: int) -> int:
    if asked_for is not None and asked_for < 1:
        raise InputError(f"--jobs must be 1 or more, not {asked_for}")
    return min(asked_for or 1, runs)


def _unfinished(
    arguments: argparse.Namespace, preset: RunConfig, out: Path, settings: dict[str, Any], runs: list[Planned]
) -> list[Planned]:
    """The runs that are to be trained. Raises InputError unless all of them can be begun, or gone on with."""
    begun = [run for run in runs if (out / run.name / CONFIG).is_file()]
    if not arguments.resume:
        if any(holds_run(out / run.name) for run in begun):
            raise InputError(
                f"{out} already holds such runs: go on with them by --resume, or choose another folder (--out)"
            )
        check_free(out, {run.name.partition("/")[0] for run in begun})
        return runs
    if not begun:
        raise InputError(f"{out} holds none of these runs: leave --resume out, or give their folder (--out)")
    for run in runs:
        if run in begun:
            resume.resumed_config(out / run.name, preset, {**settings, **run.settings})
        else:
            check_free(out / run.name)
    return [run for run in runs if not _is_finished(out, run)]


def _check_any_can_begin(arguments: argparse.Namespace, runs: list[Planned]) -> None:
    """Raises InputError where all of them would be refused their data or network, each in a process of its own.

    One that can begin is enough: what stops another one is told when its turn comes, after which the others go on.
    """
    names: dict[str, list[str]] = {}
    for run in runs:
        config, folder = run.config, arguments.data_dir or arguments.images
        try:
            config = config if folder is None else with_data_dir(config, folder)
            build_model(config, read_scenario(config))
            return
        except InputError as error:
            names.setdefault(str(error), []).append(run.name)
    told = "; ".join(why if len(names) == 1 else f"{', '.join(each)} ({why})" for why, each in names.items())
    raise InputError(f"none of the {len(runs)} runs can begin: {told}")


def _is_finished(out: Path, run: Planned) -> bool:
    """Whether it has learned its last task, and its reports say so: a kill may come between the two."""
    folder = out / run.name
    if not ((folder / CONFIG).is_file() and resume.is_finished(folder, stored_config(folder))):
        return False
    try:
        return study.read_run(folder).is_finished
    except InputError:
        return False


def _trained(
    arguments: argparse.Namespace, out: Path, runs: list[Planned], jobs: int, signals: StopSignals
) -> dict[str, tuple[int, str]]:
    """Trains them, so many at once; returns the exit code and last words of those that failed, by name.

    A signal is passed on to those that run, and no other is begun.
    """
    waiting, running, failed, told = list(runs), [], {}, False
    try:
        while running or (waiting and not signals.number):
            while waiting and len(running) < jobs and not signals.number:
                running.append(_begin(arguments, out, waiting.pop(0), jobs))
            if signals.number and not told:
                told = True
                for each in running:
                    each.process.send_signal(signals.number)
            time.sleep(_POLL)
            for each in [each for each in running if each.process.poll() is not None]:
                running.remove(each)
                each.reader.join(1.0)
                code = each.process.returncode
                if code != 0 and not signals.number:
                    failed[each.run.name] = code, _last_words(code, each.last)
        return failed
    finally:
        _stop(running)


def _begin(arguments: argparse.Namespace, out: Path, run: Planned, jobs: int) -> _Process:
    """Starts one run: this command with its own seed and settings."""
    folder = out / run.name
    words = ["train", arguments.preset, "--out", str(folder)]
    for name in _PASSED_ON:
        if (value := getattr(arguments, name)) is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    for assignment in [*arguments.set, *(f"{key}={value}" for key, value in run.settings.items())]:
        words += ["--set", assignment]
    if arguments.resume and (folder / CONFIG).is_file():
        words.append("--resume")
    environment = os.environ.copy()
    if jobs > 1 and "OMP_NUM_THREADS" not in environment:
        environment["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // jobs))
    process = subprocess.Popen(
        [*_program(), *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,  # the run's own summary, which its folder has too
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=environment,
        start_new_session=True,  # a terminal's Control-C comes here alone, and is passed on once
    )
    return _Process(run, process)


def _program() -> list[str]:
    """This program, as it was called."""
    called = Path(sys.argv[0])
    return [sys.executable, str(called)] if called.name == PROGRAM else [sys.executable, "-m", "hypermask_fast"]


def _stop(running: list[_Process]) -> None:
    """Stops those that still run, at once."""
    for each in running:
        each.process.send_signal(signal.SIGINT)
    until = time.monotonic() + _PATIENCE
    for each in running:
        try:
            each.process.wait(max(0.1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            each.process.kill()
            each.process.wait()


def _last_words(code: int, last: str) -> str:
    """Why a run has ended: what it said last, or the signal that ended it."""
    if code < 0:
        return f"ended by signal {signal.Signals(-code).name}"
    return last.removeprefix("error: ") or f"exit code {code}"


def _sum_up(out: Path, runs: list[Planned]) -> None:
    """Prints and writes what the finished runs say together."""
    finished = [out / run.name for run in runs if _is_finished(out, run)]
    if not finished:
        return
    groups = study.grouped(study.read_runs(finished))
    print(comparison.tables(groups))
    files = comparison.write(out, SUMMARY, groups)
    count = "1 run" if len(finished) == 1 else f"{len(finished)} runs"
    print(f"\n{count} in {out}, summed up in {', '.join(file.name for file in files)}")
