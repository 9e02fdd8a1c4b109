"""hypermask-fast train"""

import argparse
import functools
import signal
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from ..regularizers import FIDELITIES
from ..training import own, report, resume, run
from ..training.config import CONFIG, RunConfig, load_preset
from ..training.interrupt import Stopped, StopSignals
from ..training.result import Result
from . import several
from .command import PROGRAM, add_data_dir, add_device, command, interrupted, tell
from .launched import TIMEOUT, Launched, rank_alone

_LONGEST = 1e7  # seconds: four months


def add(commands: Any) -> None:
    parser = command(commands, "train", _run, "train a preset, task after task")
    parser.set_defaults(on_all_ranks=True)
    parser.add_argument(
        "preset", metavar="PRESET", help=f"a name that `{PROGRAM} presets` lists, or a configuration file (.toml)"
    )
    add_data_dir(parser)
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="new or empty folder for the run (default: runs/PRESET)"
    )
    parser.add_argument(
        "--seed", type=int, metavar="N", help="seed of weights, batches, augmentation and tasks that are drawn"
    )
    parser.add_argument(
        "--seeds", metavar="LIST", help="several runs, each in a folder of its own below --out: such as 0-4 or 0,3,7"
    )
    add_device(parser)
    parser.add_argument(
        "--fidelity",
        choices=FIDELITIES,
        help="official: as the authors' published code does it; default: with its slips mended",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help=f"change one setting, such as training.lr=0.01; may be repeated; `{PROGRAM} settings` explains all",
    )
    parser.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="KEY=VALUE,...",
        help="several runs, one for each of a setting's values; repeated, and with --seeds: for each combination",
    )
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="of several runs: how many at once, which share the threads (default: 1)"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run in the folder, or with all runs of --seeds and --grid"
    )
    group = parser.add_argument_group("data and a network of your own (docs/your-own.md), in place of the preset's")
    group.add_argument(
        "--scenario", metavar="FILE:FUNCTION", help="a function in a Python file, or module:function, that returns data"
    )
    group.add_argument(
        "--network", metavar="FILE:FUNCTION", help="the same, which returns the torch.nn.Module that is masked"
    )
    group.add_argument(
        "--images", type=Path, metavar="DIR", help="images in train/CLASS and test/CLASS, or train/TASK/CLASS and so on"
    )
    group.add_argument("--classes-per-task", type=int, metavar="K", help="of images in a folder per class")
    parser.add_argument(
        "--timeout",
        type=_seconds,
        default=TIMEOUT,
        metavar="SECONDS",
        help=f"in several processes: how long one waits for another before all end (default: {TIMEOUT:g})",
    )


def _run(arguments: argparse.Namespace) -> int:
    launched = Launched(arguments.timeout)
    if several.asked(arguments):
        several.check_alone(launched.size)
        return several.train(arguments, _preset(arguments), _run_dir(arguments), _asked_settings(arguments))
    with launched.together(on_gpu=arguments.device != "cpu" and torch.cuda.is_available()):
        return _train(arguments, launched)


def _train(arguments: argparse.Namespace, launched: Launched) -> int:
    device = run.pick_device(arguments.device, launched.local_rank)
    preset, run_dir = _preset(arguments), _run_dir(arguments)
    asked = _asked_settings(arguments)
    # After a restart by torchrun the same command goes on with the run that it has begun, and with no other one.
    goes_on = launched.as_first(arguments.resume or (launched.has_begun(run_dir) and (run_dir / CONFIG).is_file()))
    config = resume.resumed_config(run_dir, preset, asked) if goes_on else preset.with_values(asked)
    if (folder := arguments.data_dir or arguments.images) is not None:
        config = run.with_data_dir(config, folder)
    finished = goes_on and resume.is_finished(run_dir, config)
    with StopSignals() as signals:
        try:
            shown, begins = launched.first and not finished, functools.partial(launched.begins, run_dir)
            result = run.train(config, run_dir, device, goes_on, stop=signals, progress=shown, begins=begins)
        except KeyboardInterrupt as error:
            where = f": {error}" if isinstance(error, Stopped) else ""
            hint = "; the same command with --resume goes on" if (run_dir / CONFIG).is_file() else ""
            return interrupted(signals.number or signal.SIGINT, where + hint, launched.speaks(where))
    if launched.first:
        _tell(run_dir, result, finished)
    return 0


def _tell(run_dir: Path, result: Result, finished: bool) -> None:
    if finished:
        average = report.summarize(result.matrix, result.baseline).average_accuracy
        print(f"{run_dir} is finished, with an average accuracy of {average:.2f} %: {run_dir / report.METRICS}")
        return
    print(result)
    rate = f", {_rate(result.steps / result.seconds)} steps per second" if result.seconds else ""
    print(f"\ntrained for {result.seconds:.1f} s{rate}\nresults in {run_dir} (picture: {report.MATRIX_PICTURE})")


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds <= _LONGEST:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most {_LONGEST:g} seconds, not {text}")
    return seconds


def _rate(value: float) -> str:
    """Two digits at least, however slow."""
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def _preset(arguments: argparse.Namespace) -> RunConfig:
    """A preset by name, or a configuration file by path, with data and a network of the user's own."""
    name = arguments.preset
    if arguments.images is not None and arguments.data_dir is not None:
        raise InputError("--images and --data-dir both say where the data are: give one of them")
    if arguments.classes_per_task is not None and arguments.images is None:
        raise InputError("--classes-per-task is for --images")
    preset = RunConfig.load(Path(name)) if name.endswith(".toml") else load_preset(name)
    named = own.with_own(preset, arguments.scenario, arguments.network, arguments.images)
    if name.endswith(".toml") and rank_alone() == 0:
        own.tell_code(preset, named, tell)
    return named


def _run_dir(arguments: argparse.Namespace) -> Path:
    return arguments.out or Path("runs") / Path(arguments.preset).stem


def _asked_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Dotted settings that the command line gives; --seed, --fidelity and --classes-per-task are short for three."""
    asked: dict[str, Any] = {}
    for assignment in arguments.set:
        key, equals, value = assignment.partition("=")
        if not equals or not key.strip():
            raise InputError(f"--set takes key=value, such as training.lr=0.01, not {assignment!r}")
        asked[key.strip()] = value.strip()
    for name, key in (("seed", "seed"), ("fidelity", "fidelity"), ("classes_per_task", "data.classes_per_task")):
        value = getattr(arguments, name)
        if value is not None:
            asked[key] = value
    return asked
