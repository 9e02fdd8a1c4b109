"""Runs: from a configuration to a trained model in a folder, and back from that folder.

A run's folder holds config.toml (written first: its presence makes the folder a run), checkpoints, log.csv and the
reports of `report`. Nothing here replaces a run's files but the run itself, resumed, in one process at a time.
"""

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from .. import exporting
from ..data import Scenario, load_scenario
from ..errors import InputError
from ..files import remove_partial, write_atomic, writing
from ..model import HyperMask
from . import checkpoint, report
from .config import RunConfig
from .lock import LOCK, taken
from .logs import CsvLog, Logger, Loggers, TensorBoardLog
from .targets import TargetConfig, build_target
from .trainer import Result, Trainer

CONFIG, LOG, TENSORBOARD = "config.toml", "log.csv", "tensorboard"


def pick_device(name: str) -> torch.device:
    """ "auto" (a GPU where PyTorch sees one), "cpu" or "cuda" as a device. Raises InputError where there is no GPU."""
    if name not in ("auto", "cpu", "cuda"):
        raise InputError(f"device must be auto, cpu or cuda, not {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda: PyTorch sees no GPU here; `hypermask-fast env` says more, --device cpu works")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def read_scenario(config: RunConfig) -> Scenario:
    """The scenario of a configuration, on the CPU. Raises InputError: unknown, or its files missing or damaged."""
    data = config.data
    return load_scenario(data.scenario, data.dir, seed=config.seed, validation=data.validation, tasks=data.tasks)


def build_model(config: RunConfig, scenario: Scenario, device: torch.device | str = "cpu") -> HyperMask:
    """The untrained model of a run. Seeds PyTorch's generators with config.seed first; made on the CPU, then moved,
    so that every device begins with the same weights.

    Raises:
        InputError: a target that does not take the scenario's inputs, or a setting out of range.
    """
    torch.manual_seed(config.seed)
    method = config.method
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
) -> Result:
    """Trains a run to its end. Its folder gets config.toml, log.csv, checkpoints and, after each task, the reports.

    Args:
        config: with resume, the run's own; see `stored_config`.
        run_dir: a new or empty folder; with resume, the run's.
        device: where to train.
        resume: go on from the newest checkpoint, or from the beginning where the run was stopped before its first.
        logger: is told of progress besides log.csv and TensorBoard.
        stop: see `Trainer`.

    Raises:
        InputError: the folder is in use, data or settings are wrong, a package is missing. Nothing was written then,
            unless the run itself fails later.
        Stopped: `stop` has said so; the run can be resumed.
    """
    run_dir, settings = Path(run_dir), config.to_toml()
    report.check_packages()
    with ExitStack() as lock:
        if resume:
            stored_config(run_dir)
            lock.enter_context(taken(run_dir))
            checkpoint.exists(run_dir)  # or was lost
        else:
            check_free(run_dir)
        loggers = Loggers([])
        trainer = _trainer(config, run_dir, device, loggers, stop)
        # All that can be checked has been: from here on the folder is a run.
        if not resume:
            with writing(run_dir):
                run_dir.mkdir(parents=True, exist_ok=True)
            lock.enter_context(taken(run_dir))
            check_free(run_dir)  # still, now that nobody else can take it
        remove_partial(run_dir, (CONFIG, LOG, *report.FILES))
        if not resume:
            write_atomic(run_dir / CONFIG, settings)
        loggers.loggers = tuple(_loggers(run_dir, resume, logger))
        try:
            return trainer.fit(resume=resume)
        finally:
            loggers.close()


def _trainer(
    config: RunConfig,
    run_dir: Path,
    device: torch.device | str,
    loggers: Loggers,
    stop: Callable[[], bool] | None,
) -> Trainer:
    """The run's Trainer, which writes the reports after each task; nothing is written yet."""
    scenario = read_scenario(config)
    model = build_model(config, scenario, device)

    def on_task_end(result: Result) -> None:
        report.write_reports(run_dir, config, result, device)
        loggers.message(_after_task(result))

    return Trainer(
        model,
        scenario,
        config.training,
        ramp=config.method.ramp,
        seed=config.seed,
        device=device,
        run_dir=run_dir,
        settings=config.digest(),
        logger=loggers,
        on_task_end=on_task_end,
        stop=stop,
        earlier_settings=[config.digest_with_title()],
    )


def check_free(run_dir: Path) -> None:
    """Raises InputError unless `run_dir` can become a new run's folder: not there, or empty (hidden files apart)."""
    if (run_dir / CONFIG).exists():
        if (run_dir / LOCK).exists():
            with taken(run_dir):  # or by whom
                pass
        raise InputError(f"{run_dir} already holds a run: go on with it by --resume, or choose another folder (--out)")
    if run_dir.exists() and not run_dir.is_dir():
        raise InputError(f"{run_dir} is a file: a run needs a new or empty folder (--out)")
    if run_dir.is_dir() and any(not entry.name.startswith(".") for entry in run_dir.iterdir()):
        raise InputError(f"{run_dir} is not empty: a run needs a new or empty folder (--out)")


def stored_config(run_dir: Path) -> RunConfig:
    """The configuration that a run's folder holds. Raises InputError where it holds no run."""
    if not (run_dir / CONFIG).is_file():
        raise InputError(f"{run_dir} holds no run (no {CONFIG}): give a folder that `hypermask-fast train` has made")
    return RunConfig.load(run_dir / CONFIG)


def load_run(
    run_dir: Path | str, data_dir: Path | str | None = None, device: torch.device | str = "cpu"
) -> tuple[RunConfig, HyperMask, Scenario]:
    """A run as its newest checkpoint has it: configuration, model in evaluation mode, and the tasks learned so far.

    Args:
        run_dir: the run's folder.
        data_dir: where the data are now, if not where they were in training.
        device: of the model and the scenario.

    Returns:
        The scenario has the learned tasks only; the model has all of the run's.

    Raises:
        InputError: no run, no task learned yet, data missing, a checkpoint that is damaged or of another network.
    """
    run_dir = Path(run_dir)
    config = stored_config(run_dir)
    if data_dir is not None:
        config = with_data_dir(config, data_dir)
    scenario = read_scenario(config)
    model = build_model(config, scenario)
    learned, settings = 0, (config.digest(), config.digest_with_title())
    if checkpoint.exists(run_dir):
        learned = checkpoint.load_model(run_dir, model, *settings)
    if learned == 0:
        raise InputError(f"the run in {run_dir} has not learned its first task yet: go on with it by --resume")
    return config, model.to(device).eval(), replace(scenario, tasks=scenario.tasks[:learned]).to(device)


def with_data_dir(config: RunConfig, data_dir: Path | str) -> RunConfig:
    """`config` reading its data from `data_dir`, made absolute so that it holds wherever the run is loaded from."""
    return replace(config, data=replace(config.data, dir=str(Path(data_dir).expanduser().resolve())))


# -- exported networks ------------------------------------------------------------------------------------------------


def export_task(
    run_dir: Path | str,
    task: int,
    path: Path | str,
    data_dir: Path | str | None = None,
    format: str = "safetensors",
) -> None:
    """Writes the plain network of one learned task, mask baked in, as safetensors (see `load_exported`), pt2 or onnx.

    The tensors of a safetensors file are the network's state_dict. The file's metadata (strings) says how to build the
    network: target (its TargetConfig as JSON), input_shape, num_classes (JSON), and task, scenario and format.

    Raises:
        InputError: the task is not learned, `path` exists, or what `load_run` raises.
    """
    path = Path(path)
    if path.exists():
        raise InputError(f"{path} already exists: choose another file")
    if not path.absolute().parent.is_dir():
        raise InputError(f"{path.absolute().parent} is not a folder: make it first, or choose another file")
    config, model, scenario = load_run(run_dir, data_dir)
    if not 0 <= task < len(scenario.tasks):
        raise InputError(f"task {task} is not among those this run has learned: 0 to {len(scenario.tasks) - 1}")
    metadata = {
        "scenario": scenario.name,
        "task": str(task),
        "target": json.dumps(asdict(config.target)),
        "input_shape": json.dumps(scenario.input_shape),
        "num_classes": str(scenario.num_classes),
    }
    example = torch.zeros(2, *scenario.input_shape)
    exporting.write(model.export(task), format, path, example, metadata=metadata)


def load_exported(path: Path | str) -> nn.Module:
    """The plain nn.Module in a file by `export_task`, in evaluation mode on the CPU; nothing is unpickled.

    Raises:
        InputError: not such a file.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        values = json.loads(metadata["target"])
        target = TargetConfig(**{**values, "hidden": tuple(values["hidden"])})
        net = build_target(target, json.loads(metadata["input_shape"]), int(metadata["num_classes"]))
        _without_absent_statistics(net, tensors)
        net.load_state_dict(tensors)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} is not a network exported by hypermask-fast: {reason}") from error
    return net.eval()


def _without_absent_statistics(net: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Batch norm of an official-fidelity run has no running statistics: it uses each batch's own."""
    for name, module in net.named_modules():
        if (
            isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d))
            and f"{name}.running_mean" not in tensors
        ):
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None


def _loggers(run_dir: Path, resume: bool, logger: Logger | None) -> list[Logger]:
    loggers: list[Logger] = [CsvLog(run_dir / LOG, resume)]
    if TensorBoardLog.available():
        loggers.append(TensorBoardLog(run_dir / TENSORBOARD))
    return loggers if logger is None else [*loggers, logger]


def _after_task(result: Result) -> str:
    """ "after task 2: 99.1 98.7 (average 98.90 %)": accuracies on the tasks learned so far."""
    summary = report.summarize(result.matrix, result.baseline)
    row = result.matrix[summary.tasks_learned - 1, : summary.tasks_learned].tolist()
    accuracies = " ".join(f"{value:.1f}" for value in row)
    return f"after task {summary.tasks_learned}: {accuracies} (average {summary.average_accuracy:.2f} %)"
