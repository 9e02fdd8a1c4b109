"""Runs: from a configuration to a trained model in a folder, and back from that folder.

A run's folder holds config.toml (written first: its presence makes the folder a run), checkpoints, log.csv and the
reports of `report`. Nothing here replaces a run's files but the run itself, resumed, in one process at a time.
"""

import shutil
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from ..data import Scenario
from ..errors import InputError
from ..files import check_writable, missing_folders, remove_empty, remove_partial, write_atomic, writing
from ..model import HyperMask
from ..own_code import is_own
from . import checkpoint, describe, own, report, stored
from .config import CONFIG, RunConfig, stored_config
from .exported import check_new_file, export_model
from .exported import load_exported as load_exported  # where it was in version 0.1.0
from .lock import LOCK, taken
from .logs import CsvLog, Logger, Loggers, TensorBoardLog, on_terminal
from .needs import check_memory, lack_of_memory_told
from .result import Result
from .resume import accepted_settings
from .targets import build_target
from .trainer import Trainer
from .world import World

LOG, TENSORBOARD = "log.csv", "tensorboard"
_EARLY = {CONFIG, LOG, TENSORBOARD}  # what a run has written before its first checkpoint


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """ "auto" (a GPU where PyTorch sees one), "cpu" or "cuda" as a device.

    local_rank: which of this machine's processes that train together this one is; each has a GPU of its own.

    Raises:
        InputError: there is no GPU, or none for this process.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise InputError(f"device must be auto, cpu or cuda, not {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda: PyTorch sees no GPU here; `hypermask-fast env` says more, --device cpu works")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank == 0:
        return torch.device("cuda")
    if local_rank >= (gpus := torch.cuda.device_count()):
        raise InputError(f"process {local_rank} of this machine has no GPU of its own: PyTorch sees {gpus} here")
    return torch.device("cuda", local_rank)


def read_scenario(config: RunConfig) -> Scenario:
    """The scenario of a configuration, on the CPU; see `own.read_scenario`."""
    return own.read_scenario(config)


def build_model(config: RunConfig, scenario: Scenario, device: torch.device | str = "cpu") -> HyperMask:
    """The untrained model of a run. Seeds PyTorch's generators with config.seed first; made on the CPU, then moved,
    so that every device begins with the same weights.

    Raises:
        InputError: a target that does not take the scenario's inputs, a setting out of range, or more memory than
            there is.
    """
    check_memory(config, scenario, device, training=False)
    torch.manual_seed(config.seed)
    method = config.method
    with lack_of_memory_told(config, scenario):
        model = HyperMask(
            build_target(config.target, scenario.input_shape, scenario.num_classes),
            len(scenario.tasks),
            method.sparsity,
            config.hypernet,
            beta=method.beta,
            lam=method.lam,
            drift_norm=method.drift_norm,
            drift_masked=method.drift_masked,
            classes=scenario.classes if len(set(scenario.classes)) > 1 else None,
            fidelity=config.fidelity,
        )
        return model.to(device)


def train(
    config: RunConfig,
    run_dir: Path | str,
    device: torch.device | str = "cpu",
    resume: bool = False,
    logger: Logger | None = None,
    stop: Callable[[], bool] | None = None,
    progress: bool | None = None,
    begins: Callable[[], None] | None = None,
) -> Result:
    """Trains a run to its end. Its folder gets config.toml, log.csv, checkpoints and, after each task, the reports.

    In several processes, see `Trainer`, all of them call this; the first one alone has to do with the folder.

    Args:
        config: with resume, the run's own, see `stored_config`, or one that `resumed_config` allows.
        run_dir: a new or empty folder; with resume, the run's.
        device: where to train.
        resume: go on from the newest checkpoint, or from the beginning where the run was stopped before its first.
        logger: is told of progress besides log.csv and TensorBoard.
        stop, progress: see `Trainer`.
        begins: called when the folder becomes a new run's, before anything is written.

    Raises:
        InputError: the folder is in use, data or settings are wrong, a package is missing. Nothing was written then,
            unless the run itself fails later.
        Stopped: `stop` has said so; the run can be resumed.
    """
    config = config.settled()
    run_dir, writes = Path(run_dir), World.here().first
    config.to_toml()  # raises now where it can't be written
    report.check_packages()
    with ExitStack() as lock:
        if resume:
            stored_config(run_dir)
        config = own.fingerprinted(config)
        if resume:
            if writes:
                lock.enter_context(taken(run_dir))
            if checkpoint.exists(run_dir):  # or was lost
                checkpoint.check_settings(run_dir, checkpoint.state(run_dir) or {}, accepted_settings(run_dir, config))
        elif writes:
            check_free(run_dir)
        loggers = Loggers([])
        shown = logger is None and on_terminal() if progress is None else progress
        scenario = read_scenario(config)
        config = own.counted(config, scenario)
        trainer = _trainer(config, scenario, run_dir, device, loggers, stop, shown, resume)
        if not writes:
            with lack_of_memory_told(config, trainer.scenario):
                return trainer.fit(resume=resume)
        # All that can be checked has been: from here on the folder is a run.
        if not resume:
            lock.callback(remove_empty, missing_folders(run_dir))
            with writing(run_dir):
                run_dir.mkdir(parents=True, exist_ok=True)
            lock.enter_context(taken(run_dir))
            check_free(run_dir)  # still, now that nobody else can take it
            if begins is not None:
                begins()
        try:
            remove_partial(run_dir, (CONFIG, LOG, *report.FILES))
            if not resume:
                _forget(run_dir)
                write_atomic(run_dir / CONFIG, config.to_toml())
            else:
                before = stored_config(run_dir)
                if (kept := replace(config, data=before.data, target=before.target)) != before:
                    write_atomic(run_dir / CONFIG, kept.to_toml())
            loggers.loggers = tuple(_loggers(run_dir, resume, logger))
            with lack_of_memory_told(config, trainer.scenario):
                return trainer.fit(resume=resume)
        except Exception:
            if not resume and trainer.result.steps == 0:
                loggers.close()
                _forget(run_dir)
            raise
        finally:
            loggers.close()


def _forget(run_dir: Path) -> None:
    """Takes away what a run has written that has no checkpoint: its folder is free again."""
    with writing(run_dir):
        for name in (CONFIG, LOG):
            (run_dir / name).unlink(missing_ok=True)
    shutil.rmtree(run_dir / TENSORBOARD, ignore_errors=True)


def _trainer(
    config: RunConfig,
    scenario: Scenario,
    run_dir: Path,
    device: torch.device | str,
    loggers: Loggers,
    stop: Callable[[], bool] | None,
    progress: bool,
    resume: bool,
) -> Trainer:
    """The run's Trainer; nothing is written yet."""
    check_memory(config, scenario, device)
    model = build_model(config, scenario, device)
    return Trainer(
        model,
        scenario,
        config.training,
        ramp=config.method.ramp,
        seed=config.seed,
        device=device,
        run_dir=run_dir,
        settings=config.digest(),
        report=run_dir,
        progress=progress,
        about=describe.about(config),
        logger=loggers,
        stop=stop,
        earlier_settings=accepted_settings(run_dir, config) if resume else (),
    )


def holds_run(run_dir: Path) -> bool:
    """Whether the folder is a run's that has saved something: one that ended before has left nothing to go on with."""
    return (run_dir / CONFIG).exists() and not _visible(run_dir) <= _EARLY


def check_free(run_dir: Path, but: AbstractSet[str] = frozenset()) -> None:
    """Raises InputError unless `run_dir` can become a new run's folder: not there, or empty (hidden files apart, `but`,
    and what a run has left that ended before its first checkpoint)."""
    check_writable(run_dir, "--out")
    if (run_dir / CONFIG).exists():
        if (run_dir / LOCK).exists():
            with taken(run_dir):  # or by whom
                pass
        if not holds_run(run_dir):
            return
        raise InputError(f"{run_dir} already holds a run: go on with it by --resume, or choose another folder (--out)")
    if run_dir.is_dir() and not _visible(run_dir) <= but:
        raise InputError(f"{run_dir} is not empty: a run needs a new or empty folder (--out)")


def _visible(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir() if not entry.name.startswith(".")}


def load_run(
    run_dir: Path | str,
    data_dir: Path | str | None = None,
    device: torch.device | str = "cpu",
    scenario: str | None = None,
    network: str | None = None,
) -> tuple[RunConfig, HyperMask, Scenario]:
    """A run as its newest checkpoint has it: configuration, model in evaluation mode, and the tasks learned so far.

    Args:
        run_dir: the run's folder.
        data_dir: where the data are now, if not where they were in training.
        device: of the model and the scenario.
        scenario, network: of a run with data or a network of one's own, their functions' names once more: code that
            only the run's folder names does not run.

    Returns:
        The scenario has the learned tasks only; the model has all of the run's.

    Raises:
        InputError: no run, no task learned yet, data missing, a checkpoint that is damaged or of another network.
    """
    run_dir = Path(run_dir)
    config = own.named_again(stored_config(run_dir), run_dir, scenario, network)
    if data_dir is not None:
        config = with_data_dir(config, data_dir)
    changed = own.warn_of_changes(config)
    data = read_scenario(config)
    model = build_model(config, data)
    learned = 0
    if checkpoint.exists(run_dir):
        tasks = data.tasks
        samples = None if data_dir is not None or changed else [len(task.train) for task in tasks]
        tensors, state = stored.load(
            run_dir, model, len(tasks), config.training, accepted_settings(run_dir, config), samples
        )
        checkpoint.restore_model(model, tensors)
        learned = state["task"]
    if learned == 0:
        raise InputError(f"the run in {run_dir} has not learned its first task yet: go on with it by --resume")
    return config, model.to(device).eval(), replace(data, tasks=data.tasks[:learned]).to(device)


def load_model(run_dir: Path | str, model: HyperMask) -> int:
    """Loads a `Trainer`'s run, as its newest checkpoint has it, into a model of one's own.

    Args:
        run_dir: the Trainer's run_dir.
        model: made like the one that was trained; it is in evaluation mode afterwards.

    Returns:
        How many tasks are learned to the end, tasks 0 to that less 1. A task under way is loaded as it stands.

    Raises:
        InputError: no checkpoint, one that is damaged, no HyperMask model, or another one: other tensors, sparsity,
            fidelity or masked parameters.
    """
    run_dir = Path(run_dir)
    if not isinstance(model, HyperMask):
        raise InputError(
            f"load_model takes a HyperMask model like the one that was trained, not {type(model).__name__}"
        )
    tensors, learned = stored.load_network(run_dir, model)
    checkpoint.restore_model(model, tensors)
    model.eval()
    return learned


def with_data_dir(config: RunConfig, data_dir: Path | str) -> RunConfig:
    """`config` reading its data from `data_dir`, made absolute so that it holds wherever the run is loaded from."""
    return replace(config, data=replace(config.data, dir=str(Path(data_dir).expanduser().resolve())))


def export_task(
    run_dir: Path | str,
    task: int,
    path: Path | str,
    data_dir: Path | str | None = None,
    format: str = "safetensors",
    scenario: str | None = None,
    network: str | None = None,
) -> None:
    """Writes the plain network of one learned task of a run; see `exported.export_model`.

    data_dir, scenario, network: see `load_run`.

    Raises:
        InputError: the task is not learned, `path` exists, or what `load_run` raises.
    """
    check_new_file(path)
    config, model, data = load_run(run_dir, data_dir, scenario=scenario, network=network)
    if not 0 <= task < len(data.tasks):
        raise InputError(f"task {task} is not among those this run has learned: 0 to {len(data.tasks) - 1}")
    export_model(model, data, task, path, None if is_own(config.target.name) else config.target, format)


def _loggers(run_dir: Path, resume: bool, logger: Logger | None) -> list[Logger]:
    loggers: list[Logger] = [CsvLog(run_dir / LOG, resume)]
    if TensorBoardLog.available():
        loggers.append(TensorBoardLog(run_dir / TENSORBOARD))
    return loggers if logger is None else [*loggers, logger]
