"""hypermask-fast train"""

import argparse
import signal
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..regularizers import FIDELITIES
from ..training import report, resume, run
from ..training.config import CONFIG, RunConfig, load_preset
from ..training.interrupt import Stopped, StopSignals
from .command import PROGRAM, add_data_dir, add_device, command, interrupted


def add(commands: Any) -> None:
    parser = command(commands, "train", _run, "train a preset, task after task")
    parser.add_argument(
        "preset", metavar="PRESET", help=f"a name that `{PROGRAM} presets` lists, or a configuration file (.toml)"
    )
    add_data_dir(parser)
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="new or empty folder for the run (default: runs/PRESET)"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="of weights, batches and augmentation")
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
    parser.add_argument("--resume", action="store_true", help="go on with the run in the folder")


def _run(arguments: argparse.Namespace) -> int:
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
            return interrupted(signals.number or signal.SIGINT, where + hint)
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
