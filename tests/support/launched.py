"""What ranks of tests do, where a process can import it; imported once by the process that they are forked from."""

import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import timedelta
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import TensorDataset

import hypermask_fast as hmf
from hypermask_fast import InputError, cli
from hypermask_fast.commands import launched
from hypermask_fast.data import DatasetSplit, Scenario, TensorSplit
from hypermask_fast.training import joining, report, run, step
from hypermask_fast.training.config import TrainingConfig, load_preset
from hypermask_fast.training.interrupt import Stopped
from hypermask_fast.training.trainer import Trainer
from hypermask_fast.training.world import World

from .networks import blob_scenario
from .told import refusal

torch.set_num_threads(1)  # a fork has no threads of OpenMP's, and would wait for them
report.check_packages()
_config = load_preset("split-digits")
run.build_model(_config, run.read_scenario(_config))


def command(rank: int, words: list[str], events: dict[int, tuple[int, str, float]] | None = None) -> int:
    """The command line. events: rank -> (step, what happens to it before it, seconds); step 0: from the start."""
    if rank in (events or {}):
        number, what, seconds = events[rank]
        if number == 0:
            _FROM_THE_START[what](seconds)
        else:
            _before_step(number, what, seconds)
    return cli.main([word.replace("RANK", str(rank)) for word in words])


def _before_step(number: int, what: str, seconds: float) -> None:
    count, do = 0, step.TaskWork.step

    def watched(*arguments: Any, **named: Any) -> Any:
        nonlocal count
        count += 1
        if count == number:
            _EVENTS[what](seconds)
        return do(*arguments, **named)

    step.TaskWork.step = watched


def _fail(seconds: float) -> None:
    raise InputError("this rank's disk is full")


def _late_to_ask(seconds: float) -> None:
    """Who speaks."""
    do = launched.Launched.speaks

    def late(*arguments: Any) -> bool:
        time.sleep(seconds)
        return do(*arguments)

    launched.Launched.speaks = late


def _patient(seconds: float) -> None:
    launched._PATIENCE = seconds


_FROM_THE_START: dict[str, Callable[[float], None]] = {"late to ask": _late_to_ask, "patient": _patient}
_EVENTS: dict[str, Callable[[float], None]] = {
    "sleep": time.sleep,
    "die": lambda seconds: os.kill(os.getpid(), signal.SIGKILL),
    "fail": _fail,
    "terminate": lambda seconds: os.kill(os.getpid(), signal.SIGTERM),
}


# -- Trainers ---------------------------------------------------------------------------------------------------------


class Trained(NamedTuple):
    """What a Trainer has found."""

    matrix: list
    baseline: list
    weights: dict[str, torch.Tensor]
    rows: list[list[float]]
    generator: torch.Tensor


class Case(NamedTuple):
    """A network, its data and settings. random: whether the network draws random numbers, or a Dataset does."""

    net: Callable[[], nn.Module]
    augment: Callable | None = None
    as_dataset: bool = False
    settings: Mapping[str, Any] = MappingProxyType({})
    model: Mapping[str, Any] = MappingProxyType({})
    random: bool = False


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))


def _norms() -> nn.Module:
    # No bias: batch norm takes it away, so its gradient is rounding, of which Adam makes steps as large as any.
    return nn.Sequential(nn.Linear(8, 16, bias=False), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 2))


def _dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 2))


def _noise(x: torch.Tensor) -> torch.Tensor:
    return x + 0.1 * torch.randn_like(x)


_BEST = {"keep": "best", "schedule": "plateau", "validate_every": 4}
_CHUNKS = {"hypernetwork": hmf.HypernetConfig(embedding=8, hidden=(12,), chunk_size=64, chunk_embedding=4)}
TRAINERS = {
    "plain": Case(_mlp),
    "augmented": Case(_mlp, augment=_noise),
    "best": Case(_mlp, settings=_BEST),
    "dataset": Case(_mlp, as_dataset=True),
    "chunks": Case(_mlp, model=_CHUNKS),
    "dense gradient": Case(_mlp, settings={"gradient": "dense"}),
    "replicas": Case(_mlp, settings={"shard": "none"}),
    "batch norm": Case(_norms, settings=_BEST),
    "official": Case(_norms, model={"fidelity": "official"}),
    "local batch norm": Case(_norms, settings={"batch_norm": "local"}, random=True),
    "dropout": Case(_dropout, augment=_noise, random=True),
}


class _Rows:
    """A logger that keeps what it is told."""

    def __init__(self) -> None:
        self.rows: list[list[float]] = []

    def step(self, task: int, iteration: int, values: dict[str, float]) -> None:
        self.rows.append([task, iteration, *values.values()])

    def __getattr__(self, name: str) -> Callable:
        return lambda *arguments: None


def scenario_of(case: Case, change: Callable[[TensorSplit], TensorSplit] | None = None) -> Scenario:
    def split(given: TensorSplit) -> Any:
        given = replace(given, augment=case.augment) if change is None else change(given)
        return DatasetSplit(TensorDataset(given.inputs, given.labels)) if case.as_dataset else given

    scenario = blob_scenario(2)
    return replace(scenario, tasks=tuple(replace(task.map(split)) for task in scenario.tasks))


def trainer_of(name: str, run_dir: str | None = None, seed: int = 3, **changes: Any) -> Trainer:
    case = TRAINERS[name]
    torch.manual_seed(1)
    config = {"hypernetwork": hmf.HypernetConfig(embedding=8, hidden=(12,))}
    model = hmf.HyperMask(case.net(), 2, **({"sparsity": 20, "beta": 0.01, "lam": 1e-3} | config | dict(case.model)))
    settings = {"iterations": 12, "batch_size": 32, "log_every": 3, "checkpoint_every": 0} | dict(case.settings)
    given = {"scenario": scenario_of(case), "logger": _Rows()} | changes
    settings |= given.pop("settings", {})
    return Trainer(model, config=TrainingConfig(**settings), seed=seed, run_dir=run_dir, **given)


def _found(trainer: Trainer, resume: bool = False) -> Trained:
    result = trainer.fit(resume)
    weights = {
        name: getattr(value, "full_tensor", lambda value=value: value)().detach().clone()
        for name, value in trainer.model.state_dict().items()
        if isinstance(value, torch.Tensor)
    }
    rows = getattr(trainer.logger.loggers[0], "rows", []) if trainer.logger.loggers else []
    return Trained(result.matrix.tolist(), result.baseline.tolist(), weights, rows, torch.get_rng_state())


def trained(name: str) -> Trained:
    """In one process."""
    return _found(trainer_of(name))


def _grouped() -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))


def compared(rank: int) -> dict[str, Any]:
    _grouped()
    found: dict[str, Any] = {name: trained(name) for name in TRAINERS}
    found["again"] = {name: trained(name) for name, case in TRAINERS.items() if case.random}
    with World.here().own_noise(1, 2):
        found["noise"] = torch.rand(4).tolist()
    return found


def stopped(rank: int, folder: str) -> tuple[str, Trained, Trained]:
    """Where a run ends that the last rank alone stops; the same without, and what goes on from there."""
    _grouped()
    whole = _found(trainer_of("best", settings={"iterations": 40}))
    trainer = trainer_of(
        "best", folder, stop=lambda: rank == 1 and trainer.result.steps >= 20, settings={"iterations": 40}
    )
    place = ""
    try:
        trainer.fit()
    except Stopped as error:
        place = str(error)
    torch.manual_seed(99)
    return place, whole, _found(trainer_of("best", folder, settings={"iterations": 40}), resume=True)


def agreed(rank: int) -> dict[str, str]:
    """What is said where the last rank has been given something else."""
    _grouped()
    other = rank == 2
    case = TRAINERS["plain"]

    def pixels(split: TensorSplit) -> TensorSplit:
        return replace(split, inputs=split.inputs + 0.1 * other)

    def labels(split: TensorSplit) -> TensorSplit:
        return replace(split, labels=(split.labels + (torch.arange(len(split)) == 11) * other) % 2)

    def first_label(split: TensorSplit) -> TensorSplit:
        return replace(split, labels=(split.labels + (torch.arange(len(split)) == 0) * other) % 2)

    said = {
        "data": refusal(lambda: trainer_of("plain", scenario=scenario_of(case, pixels))),
        "labels": refusal(lambda: trainer_of("plain", scenario=scenario_of(case, labels))),
        "Dataset": refusal(lambda: trainer_of("dataset", scenario=scenario_of(TRAINERS["dataset"], first_label))),
        "settings": refusal(lambda: trainer_of("plain", settings={"lr": 0.01 + 0.01 * other})),
        "seed": refusal(lambda: trainer_of("plain", seed=min(rank, 1))),
        "networks": refusal(lambda: trainer_of("dropout" if other else "plain")),
    }
    if other:
        joining.package_digest = lambda: b"another one"
    return said | {"package": refusal(lambda: trainer_of("plain"))}
