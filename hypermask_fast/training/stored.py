"""What a run's checkpoint must hold, given its settings. All of it is checked before any of it is used.

The digests of `checkpoint` show damage. Here everything that follows from the settings is compared with them: names,
shapes, dtypes and ranges.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..checks import is_whole, shown
from ..errors import InputError
from ..inference import restored
from ..model import HyperMask
from ..model_state import FITTED, PREFIX, fitted, network_state
from ..processes import local, ranks_of
from . import checkpoint
from .checkpoint import BEST, MODEL, MOMENTS, OPTIMIZER
from .slices import layouts
from .tables import PLATEAU_FACTOR, PLATEAU_LOWEST, PLATEAU_PATIENCE, TrainingConfig
from .tensor_files import MANIFEST, REMEDY

_LONGEST = 1e10  # seconds: three hundred years
_LARGEST = 2**50  # bytes of memory
_MOST_THREADS = 2**20
_NAMES = (MODEL + "{}", BEST + "{}", OPTIMIZER + "{}/exp_avg", OPTIMIZER + "{}/exp_avg_sq")  # of what is sharded alike
_NOT_KNOWN = TrainingConfig(iterations=1)  # of a checkpoint whose network alone is looked at


def load(
    run_dir: Path,
    model: HyperMask,
    tasks: int,
    config: TrainingConfig,
    settings: Sequence[str],
    samples: Sequence[int] | None,
    device: torch.device | str = "cpu",
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The run's checkpoint as (tensors, state), see `Trainer`, which is the model's and the settings' own.

    Args:
        run_dir: the run's folder.
        model: of the run, with whatever weights; it is not changed.
        tasks: of the run's scenario.
        config: how the run is trained.
        settings: the checkpoint was saved under one of them, see `RunConfig.digest`.
        samples: training samples of each task. None where the data may be others than those that were trained on:
            how long the tasks are is then not looked at.
        device: where the tensors go. Where the model is sharded, its tensors are DTensors like the model's own.

    Raises:
        InputError: there is none, it is damaged, or anything in it can't be of this run; which file, and what. Of
            several processes all raise it where one does.
    """
    ranks = ranks_of(model.hypernet.processes)
    found = checkpoint.load(run_dir, device, layouts(model, _NAMES), ranks)
    with ranks.together():
        check = _Check(found.file, found.tensors, found.state, model, tasks, config, samples)
        check.network(MODEL)
        check.task_count()
        checkpoint.check_settings(run_dir, found.state, settings)
        check.length()
        check.position()
        check.counters()
        check.results()
        check.generators()
        check.machine_and_model()
        if found.state["iteration"] > 0:
            check.running_task()
        else:
            check.between_tasks()
        check.nothing_else()
    return found.tensors, found.state


def load_network(run_dir: Path, model: HyperMask) -> tuple[dict[str, Tensor], int]:
    """Of a checkpoint whose settings nobody knows, such as a `Trainer`'s: its tensors, and how many tasks are learned.

    Raises:
        InputError: there is none, it is damaged, or it is of another model: other tensors, sparsity, fidelity or masked
            parameters.
    """
    ranks = ranks_of(model.hypernet.processes)
    found = checkpoint.load(run_dir, layouts=layouts(model, _NAMES), ranks=ranks)
    with ranks.together():
        check = _Check(found.file, found.tensors, found.state, model, model.num_tasks, _NOT_KNOWN, None)
        if "model" not in found.state:
            raise InputError(f"the checkpoint in {run_dir} is of version 0.1.0, which did not save what its model was")
        check.machine_and_model()
        check.network(MODEL)
        return found.tensors, check.learned()


@dataclass
class _Check:
    """Each method raises InputError where its part of the checkpoint is not as it must be."""

    file: Path
    tensors: dict[str, Tensor]
    state: dict[str, Any]
    model: HyperMask
    tasks: int
    config: TrainingConfig
    samples: Sequence[int] | None
    seen: set[str] = field(default_factory=set)  # tensors and, from "state." on, entries of the state

    def network(self, prefix: str) -> None:
        """Every tensor of the model, finite; variances and counts not negative."""
        own, marks = network_state(self.model), f"{prefix}{PREFIX}tasks"
        if marks in self.tensors:  # which tasks are removed or frozen
            self._tensor(marks, (self.model.num_tasks,), torch.uint8)
            self._values(marks, high=2)
        stored = {name.removeprefix(prefix) for name in self.tensors if name.startswith(prefix)}
        for name in sorted(name for name in own.keys() | stored if not name.startswith(PREFIX)):
            if name not in stored or name not in own:
                where = "the checkpoint" if name not in stored else "this network"
                raise InputError(f"{self.file} is of another network: {_named(name)} is not in {where}")
            there, here = self.tensors[prefix + name], own[name]
            if there.shape != here.shape or there.dtype != here.dtype:
                raise InputError(
                    f"{self.file} is of another network: {name} is {_kind(there)} there, {_kind(here)} here"
                )
            counted = name.endswith(("running_var", "num_batches_tracked"))
            self._values(prefix + name, low=0 if counted else None)
        self._fitted(prefix + PREFIX)

    def _fitted(self, prefix: str) -> None:
        """What methods of inference have fitted, where they have."""
        names = [name for name in self.tensors if name.startswith(prefix + FITTED)]
        entries = fitted({name.removeprefix(prefix): self.tensors[name] for name in names})
        try:
            restored(entries, range(self.model.num_tasks))
        except InputError as error:
            raise InputError(f"{self.file} does not fit this run: {error}{REMEDY}") from error
        self.seen.update(names)

    def task_count(self) -> None:
        matrix = self.tensors.get("result.matrix")
        if matrix is not None and matrix.dim() == 2 and matrix.shape != (self.tasks, self.tasks):
            raise InputError(f"{self.file} is of a run of {len(matrix)} tasks, not {self.tasks}")

    def length(self) -> None:
        """Of tasks as the checkpoint was saved: not more than now, in the same unit. Version 0.1.0 wrote none."""
        self.seen.add("state.length")
        now = {"iterations": self.config.iterations, "epochs": self.config.epochs}
        then = self.state.get("length", now)
        same = isinstance(then, dict) and then.keys() == now.keys()
        for unit, value in now.items():
            fits = same and (then[unit] is None if value is None else is_whole(then[unit]) and 0 < then[unit] <= value)
            if not fits:
                self._bad_entry("length", f"{unit} {'null' if value is None else f'1 to {value}'}")

    def position(self) -> None:
        """The task and the iteration; nothing is saved before the first step, nor right at a task's last one."""
        task = self._whole("task", 0, self.tasks)
        running = task < self.tasks
        length = self._length(task) if running else None
        latest = 0 if not running else None if length is None else length - 1
        self._whole("iteration", 1 if task == 0 else 0, latest)

    def counters(self) -> None:
        done = self._steps()
        self._whole("steps", 0 if done is None else done, done)
        self._number("seconds", 0, _LONGEST)
        self._whole("peak_memory", 0, _LARGEST)

    def results(self) -> None:
        """Percentages for the tasks that are learned, NaN for the others."""
        learned = self.state["task"]
        matrix = self._tensor("result.matrix", (self.tasks, self.tasks), torch.float64)
        self._values("result.matrix", 0, 100, matrix[:learned])
        if not matrix[learned:].isnan().all():
            self._bad_tensor("result.matrix", f"has accuracies after task {learned}, which is not learned")
        self._tensor("result.baseline", (self.tasks,), torch.float64)
        self._values("result.baseline", 0, 100)

    def generators(self) -> None:
        now = torch.get_rng_state()
        states = {"generator.cpu": tuple(now.shape)}
        if "generator.cuda" in self.tensors:
            states["generator.cuda"] = (16,)
        for name, shape in states.items():
            self._tensor(name, shape, torch.uint8)
        try:
            torch.Generator().set_state(self.tensors["generator.cpu"].cpu())
        except RuntimeError as error:
            self._bad_tensor("generator.cpu", f"is no generator's state ({str(error).splitlines()[0]})")

    def machine_and_model(self) -> None:
        """What version 0.1.0 did not save: threads, and what decides the model's outputs besides its tensors."""
        self.seen |= {"state.threads", "state.model"}
        if "threads" in self.state:
            self._whole("threads", 1, _MOST_THREADS)
        if "model" not in self.state:
            return
        model: Any = self.state["model"]
        for name, value in checkpoint.model_settings(self.model).items():
            there = model.get(name) if isinstance(model, dict) else None
            if there != value:
                raise InputError(
                    f"the checkpoint in {self.file.parent} is of another model: {name} is {shown(there)} there, "
                    f"{shown(value)} here"
                )

    def learned(self) -> int:
        """How many tasks are learned, of as many as there are at most."""
        return self._whole("task", 0, self.tasks)

    def running_task(self) -> None:
        """All that the rest of a task depends on."""
        epochs = self._epochs()
        self._best(epochs)
        self._rate(epochs)
        self._moments()
        self._anchor()

    def between_tasks(self) -> None:
        self._number("best_accuracy", -1, -1)

    def nothing_else(self) -> None:
        for name in self.tensors:
            if name not in self.seen:
                raise InputError(f"{self.file} has a tensor that does not belong there: {shown(name)}{REMEDY}")
        for name in self.state:
            if name != "settings" and f"state.{name}" not in self.seen:
                manifest = self.file.parent / MANIFEST
                raise InputError(f"{manifest} has an entry that does not belong there: {shown(name)}{REMEDY}")

    # -- within a task ------------------------------------------------------------------------------------------------

    def _best(self, epochs: int | None) -> None:
        """The best model so far, where one is to be kept and validation has come."""
        keeps = self.config.keep == "best"
        validated: bool | None = None
        if epochs is not None:
            validated = epochs > 0 or self.state["iteration"] >= self.config.validate_every
        value = self._number("best_accuracy", -1, 100)
        if keeps and validated is not False and value >= 0:
            self.network(BEST)
        elif value != -1 or (keeps and validated):
            self._bad_entry("best_accuracy", "0 to 100" if keeps and validated else "-1.0")

    def _rate(self, epochs: int | None) -> None:
        """The learning rate: as it is set, or as often lowered as the schedule can have done it."""
        low = self.config.lr if self.config.schedule == "constant" else min(self.config.lr, PLATEAU_LOWEST)
        lr = self._number("lr", low * (1 - 1e-6), self.config.lr * (1 + 1e-6))  # on a GPU it is kept in float32
        if self.config.schedule == "constant":
            return
        times = math.log(lr / self.config.lr) / math.log(PLATEAU_FACTOR)
        if abs(times - round(times)) > 1e-4 and lr > PLATEAU_LOWEST * (1 + 1e-6):
            self._bad_entry("lr", f"{self.config.lr} times a power of {PLATEAU_FACTOR:.4f}")
        self.seen.add("state.plateau")
        plateau = self.state.get("plateau")
        if not isinstance(plateau, dict) or plateau.keys() != {"best", "num_bad_epochs"}:
            self._bad_entry("plateau", "best and num_bad_epochs")
        best, bad = plateau["best"], plateau["num_bad_epochs"]
        none_yet = best == -math.inf and not epochs
        some = _is_number(best) and 0 <= best <= 100 and epochs != 0
        if not (none_yet or some):
            self._bad_entry("plateau", "best to be a percentage, or -Infinity in the first epoch")
        most = PLATEAU_PATIENCE if epochs is None else min(PLATEAU_PATIENCE, epochs)
        if not (is_whole(bad) and 0 <= bad <= most):
            self._bad_entry("plateau", f"num_bad_epochs to be a whole number, 0 to {most}")

    def _moments(self) -> None:
        """Adam's state of parameters that the task trains: those whose names the state has, where it has them."""
        task, iteration = self.state["task"], self.state["iteration"]
        later = {f"hypernet.embeddings.{i}" for i in range(task + 1, self.model.num_tasks)}
        parameters = {name: p for name, p in self.model.named_parameters() if name not in later}
        held = {name.removeprefix(OPTIMIZER).rpartition("/")[0] for name in self.tensors if name.startswith(OPTIMIZER)}
        for name in sorted(held & parameters.keys()):
            prefix, parameter = f"{OPTIMIZER}{name}/", parameters[name]
            self._tensor(prefix + "step", (), torch.float32)
            step = self._values(prefix + "step", 1, iteration)
            if step != step.round():
                self._bad_tensor(prefix + "step", f"is {step.item():g}, no whole number")
            rounded = self.config.moments == "bfloat16" and parameter is self.model.hypernet.output.weight
            for entry, low in (("exp_avg", None), ("exp_avg_sq", 0)):
                self._tensor(prefix + entry, tuple(parameter.shape), torch.bfloat16 if rounded else parameter.dtype)
                self._values(prefix + entry, low)
        if MOMENTS in self.state:
            self._named_moments(held)

    def _named_moments(self, held: set[str]) -> None:
        self.seen.add(f"state.{MOMENTS}")
        named = self.state[MOMENTS]
        if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
            self._bad_entry(MOMENTS, "names of parameters")
        for name in sorted(held.symmetric_difference(named)):
            has = "has" if name in held else "lacks"
            raise InputError(f"{self.file} {has} moments of {shown(name)}, otherwise than {MANIFEST} says{REMEDY}")

    def _anchor(self) -> None:
        task, hypernet = self.state["task"], self.model.hypernet
        dtype = hypernet.output.weight.dtype
        shapes = hypernet.drift_target_shapes(task) if task > 0 else ()
        self._tensor("anchor.weights", (hypernet.size,), dtype)
        self._values("anchor.weights")
        for i, shape in enumerate(shapes):
            self._tensor(f"anchor.targets.{i}", shape, dtype)
            self._values(f"anchor.targets.{i}")

    # -- lengths, where they are known ----------------------------------------------------------------------------

    def _length(self, task: int) -> int | None:
        return None if self.samples is None else self.config.length(self.samples[task])

    def _steps(self) -> int | None:
        """How many steps are done at this position."""
        if self.samples is None:
            return None
        before = sum(self.config.length(count) for count in self.samples[: self.state["task"]])
        return before + self.state["iteration"]

    def _epochs(self) -> int | None:
        """Whole epochs of the running task."""
        if self.samples is None:
            return None
        return self.state["iteration"] // self.config.epoch_length(self.samples[self.state["task"]])

    # -- single entries and tensors -------------------------------------------------------------------------------

    def _whole(self, key: str, low: int, high: int | None) -> int:
        self.seen.add(f"state.{key}")
        value: Any = self.state.get(key)
        if not is_whole(value) or value < low or (high is not None and value > high):
            limits = f"{low} or more" if high is None else f"{low} to {high}"
            self._bad_entry(key, f"a whole number, {limits}")
        return value

    def _number(self, key: str, low: float, high: float) -> float:
        self.seen.add(f"state.{key}")
        value: Any = self.state.get(key)
        if not _is_number(value) or not low <= value <= high:
            self._bad_entry(key, f"a number, {low:g} to {high:g}")
        return value

    def _tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if name not in self.tensors:
            raise InputError(f"{self.file} has no tensor {name}{REMEDY}")
        tensor = self.tensors[name]
        if tensor.shape != shape or tensor.dtype != dtype:
            self._bad_tensor(name, f"is {_kind(tensor)}, not {_kind(torch.empty(shape, dtype=dtype, device='meta'))}")
        self.seen.add(name)
        return tensor

    def _values(
        self, name: str, low: float | None = None, high: float | None = None, of: Tensor | None = None
    ) -> Tensor:
        """The tensor, a part of it, or what this process has of it; finite, low or more, high or less."""
        self.seen.add(name)
        values = local(self.tensors[name]) if of is None else of
        if values.is_floating_point() and not values.isfinite().all():
            self._bad_tensor(name, "is not finite")
        if values.numel() and low is not None and values.min() < low:
            self._bad_tensor(name, f"has {values.min().item():g}, less than {low:g}")
        if values.numel() and high is not None and values.max() > high:
            self._bad_tensor(name, f"has {values.max().item():g}, more than {high:g}")
        return values

    def _bad_entry(self, key: str, expected: str) -> NoReturn:
        found = f"is {shown(self.state[key])}" if key in self.state else "is missing"
        manifest = self.file.parent / MANIFEST
        raise InputError(f"{manifest} does not fit this run: {key} {found}, expected {expected}{REMEDY}")

    def _bad_tensor(self, name: str, what: str) -> NoReturn:
        raise InputError(f"{self.file} does not fit this run: {name} {what}{REMEDY}")


def _is_number(value: Any) -> bool:
    return is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def _named(name: str) -> str:
    """A tensor's name, which a file may have made up."""
    return name if name.isprintable() and len(name) < 100 else shown(name)


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
