"""The command line `hypermask-fast`: data, train, evaluate, export, presets, settings, env."""

import argparse
import errno
import io
import os
import signal
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from . import __version__, env, exporting, startup
from .data import SCENARIOS
from .data.download import DOWNLOADS, download
from .errors import InputError
from .extras import needed_for
from .regularizers import FIDELITIES
from .training import describe, evaluation, explain, report, resume, run
from .training.config import CONFIG, RunConfig, load_preset, presets
from .training.interrupt import Stopped, StopSignals
from .training.logs import DownloadProgress
from .training.memory import tune_allocator
from .training.tables import text_table

PROGRAM = "hypermask-fast"
EXIT_INPUT, EXIT_UNREAD = 2, 141


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns its exit code.

    0: done. 2: what was given is wrong, said in one line on standard error. 130: interrupted (by another signal than
    Control-C: 128 and its number). 141: nobody reads the output any more. Any other failure is a bug and keeps its
    traceback.
    """
    startup.ready()
    _open_streams()
    arguments = _parser().parse_args(argv)
    tune_allocator()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            if arguments.run is not _env:
                _check_packages()
            code = arguments.run(arguments)
            sys.stdout.flush()  # here, where a failure is told
            return code
    except InputError as error:
        return _refuse(str(error))
    except OSError as error:
        if error.filename is not None:
            return _refuse(f"{error.filename}: {error.strerror}")  # a folder without permission, ...
        if error.errno not in (errno.EPIPE, errno.ENOSPC, errno.EIO, errno.EBADF):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python fails once more as it ends
        return EXIT_UNREAD if error.errno == errno.EPIPE else _refuse(f"standard output: {error.strerror}")
    except KeyboardInterrupt:
        return _interrupted(signal.SIGINT)


def _open_streams() -> None:
    """Output that was closed goes nowhere; characters that the terminal's encoding lacks are shown as escapes."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (for the process's life)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _check_packages() -> None:
    """Refuses a command that could not show what it has done, before it does anything."""
    with needed_for("the command line"):
        import rich  # noqa: F401


def _refuse(message: str) -> int:
    _tell("error: " + message.replace("\n", "\\n"))  # of a path
    return EXIT_INPUT


def _interrupted(number: int, detail: str = "") -> int:
    if sys.stderr.isatty():
        print(file=sys.stderr)  # below the terminal's ^C
    _tell(f"interrupted{detail}")
    return 128 + number


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    _tell(f"warning: {message}")


def _tell(message: str) -> None:
    """One line on standard error, where that can still be written."""
    with suppress(OSError):
        print(f"{PROGRAM}: {message}", file=sys.stderr, flush=True)


# -- commands ---------------------------------------------------------------------------------------------------------


def _train(arguments: argparse.Namespace) -> int:
    preset = _preset(arguments.preset)
    run_dir = arguments.out or Path("runs") / Path(arguments.preset).stem
    asked = _asked_settings(arguments)
    config = resume.resumed_config(run_dir, preset, asked) if arguments.resume else preset.with_values(asked)
    if arguments.data_dir is not None:
        config = run.with_data_dir(config, arguments.data_dir)
    device = run.pick_device(arguments.device)
    finished = arguments.resume and resume.is_finished(run_dir, config)
    with StopSignals() as signals:
        try:
            result = run.train(config, run_dir, device, arguments.resume, stop=signals, progress=not finished)
        except KeyboardInterrupt as error:
            where = f": {error}" if isinstance(error, Stopped) else ""
            hint = "; the same command with --resume goes on" if (run_dir / CONFIG).is_file() else ""
            return _interrupted(signals.number or signal.SIGINT, where + hint)
    if finished:
        average = report.summarize(result.matrix, result.baseline).average_accuracy
        print(f"{run_dir} is finished, with an average accuracy of {average:.2f} %: {run_dir / report.METRICS}")
        return 0
    print(result)
    rate = f", {_rate(result.steps / result.seconds)} steps per second" if result.seconds else ""
    print(f"\ntrained for {result.seconds:.1f} s{rate}\nresults in {run_dir} (picture: {report.MATRIX_PICTURE})")
    return 0


def _rate(value: float) -> str:
    """Two digits at least, however slow."""
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def _evaluate(arguments: argparse.Namespace) -> int:
    device = run.pick_device(arguments.device)
    config, model, scenario = run.load_run(arguments.dir, arguments.data_dir, device)
    batch = config.training.evaluation_batch
    if arguments.task_id == "known":
        columns = {
            "accuracy %": [evaluation.accuracy(model, task.test, t, batch) for t, task in enumerate(scenario.tasks)]
        }
    else:
        measured = evaluation.entropy_accuracy(model, scenario, batch)
        columns = {"task found %": measured.task.tolist(), "class found %": measured.label.tolist()}
    print(_table([scenario.label(t) for t in range(len(scenario.tasks))], columns))
    return 0


_LOADING = {
    "safetensors": "    from hypermask_fast.training.run import load_exported\n    net = load_exported({})",
    "pt2": "    import torch\n    net = torch.export.load({}).module()",
    "onnx": "    import onnxruntime\n    session = onnxruntime.InferenceSession({})",
}


def _export(arguments: argparse.Namespace) -> int:
    run.export_task(arguments.dir, arguments.task, arguments.to, arguments.data_dir, arguments.format)
    print(f"{arguments.to}: task {arguments.task}'s network; load it in Python with")
    print(_LOADING[arguments.format].format(repr(str(arguments.to))))
    return 0


def _presets(arguments: argparse.Namespace) -> int:
    if arguments.name is not None:
        print(explain.commented_toml(load_preset(arguments.name)), end="")
        return 0
    print(text_table([(name, describe.title(config)) for name, config in presets().items()], "<<", gap=2))
    return 0


def _settings(arguments: argparse.Namespace) -> int:
    print(explain.listing(arguments.key))
    return 0


def _data(arguments: argparse.Namespace) -> int:
    name = arguments.dataset
    if name in SCENARIOS:
        name = SCENARIOS[name].dataset
        if name is None:
            print(f"{arguments.dataset} needs no files")
            return 0
    elif name not in DOWNLOADS:
        raise InputError(f"no data set {name!r}: there are {', '.join(DOWNLOADS)}, and the names of scenarios")
    shown = DownloadProgress()
    if not download(name, arguments.to, arguments.mirror, shown.message, shown.progress):
        print(f"{name} is in {arguments.to} already: nothing to download")
    else:
        print(f"train with --data-dir {arguments.to}")
    return 0


def _env(arguments: argparse.Namespace) -> int:
    print(env.report())
    return 0


# -- settings ---------------------------------------------------------------------------------------------------------


def _preset(name: str) -> RunConfig:
    """A preset by name, or a configuration file by path."""
    return RunConfig.load(Path(name)) if name.endswith(".toml") else load_preset(name)


def _asked_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Dotted settings that the command line gives; --seed and --fidelity are short for two of them."""
    asked: dict[str, Any] = {}
    for assignment in arguments.set:
        key, equals, value = assignment.partition("=")
        if not equals or not key.strip():
            raise InputError(f"--set takes key=value, such as training.lr=0.01, not {assignment!r}")
        asked[key.strip()] = value.strip()
    for key in ("seed", "fidelity"):
        value = getattr(arguments, key)
        if value is not None:
            asked[key] = value
    return asked


def _table(names: list[str], columns: dict[str, list[float]]) -> str:
    """Names and percentages side by side, with the columns' means."""
    rows = [*zip(names, *columns.values(), strict=True)]
    rows.append(("mean", *(sum(values) / len(values) for values in columns.values())))
    texts = [(name, *(f"{value:.2f}" for value in values)) for name, *values in rows]
    return text_table([("", *columns), *texts], "<" + ">" * len(columns), gap=3)


# -- arguments --------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_INPUT, f"{PROGRAM}: error: {message}; `{self.prog} --help` says more\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog=PROGRAM, description="Continual learning with hypernetwork-made masks.")
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_train(commands)

    command = _command(commands, "data", _data, "download a data set, with checksums")
    command.add_argument("dataset", metavar="DATASET", help=f"{', '.join(DOWNLOADS)}, or what is trained on it")
    command.add_argument("--to", type=Path, required=True, metavar="DIR", help="where it goes: for train's --data-dir")
    command.add_argument("--mirror", metavar="URL", help="download from here, files of the same names and checksums")

    command = _command(commands, "evaluate", _evaluate, "accuracy of a run's model on the tasks it has learned")
    command.add_argument("dir", type=Path, metavar="DIR", help="the run's folder")
    command.add_argument(
        "--task-id",
        choices=("known", "entropy"),
        default="known",
        help="known: each sample's task is given (default); entropy: it is inferred, by the lowest softmax entropy",
    )
    _add_data_dir(command)
    _add_device(command)

    command = _command(commands, "export", _export, "the plain network of one task, mask baked in")
    command.add_argument("dir", type=Path, metavar="DIR", help="the run's folder")
    command.add_argument("--task", type=int, required=True, metavar="K", help="a task the run has learned, from 0")
    command.add_argument("--to", type=Path, required=True, metavar="FILE", help="a new file")
    command.add_argument(
        "--format",
        choices=exporting.FILES,
        default="safetensors",
        help="safetensors: its weights (default); pt2: a program for torch.export.load; onnx: for any ONNX runtime",
    )
    _add_data_dir(command)

    command = _command(commands, "presets", _presets, "what there is to train, or one preset's settings")
    command.add_argument("name", nargs="?", metavar="PRESET", help="show its settings, as a configuration file")
    command = _command(commands, "settings", _settings, "every setting: its default, what it may be, and its meaning")
    command.add_argument(
        "key",
        nargs="?",
        default="",
        metavar="KEY",
        help="one setting, such as training.lr, or one table, such as method",
    )
    _command(commands, "env", _env, "versions, devices, threads and backends")
    return parser


def _add_train(commands: Any) -> None:
    command = _command(commands, "train", _train, "train a preset, task after task")
    command.add_argument(
        "preset", metavar="PRESET", help=f"a name that `{PROGRAM} presets` lists, or a configuration file (.toml)"
    )
    _add_data_dir(command)
    command.add_argument(
        "--out", type=Path, metavar="DIR", help="new or empty folder for the run (default: runs/PRESET)"
    )
    command.add_argument("--seed", type=int, metavar="N", help="of weights, batches and augmentation")
    _add_device(command)
    command.add_argument(
        "--fidelity",
        choices=FIDELITIES,
        help="official: as the authors' published code does it; default: with its slips mended",
    )
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help=f"change one setting, such as training.lr=0.01; may be repeated; `{PROGRAM} settings` explains all",
    )
    command.add_argument("--resume", action="store_true", help="go on with the run in the folder")


def _command(commands: Any, name: str, function: Any, summary: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
    command.set_defaults(run=function)
    return command


def _add_data_dir(command: argparse.ArgumentParser) -> None:
    command.add_argument("--data-dir", type=Path, metavar="D", help="folder of the data set's files")


def _add_device(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")


if __name__ == "__main__":
    sys.exit(main())
