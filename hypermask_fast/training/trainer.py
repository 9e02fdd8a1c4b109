"""The training loop: task after task, each with its own optimiser, evaluated on all tasks after each."""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from ..data import Scenario
from ..errors import InputError
from ..files import check_tensors, writing
from ..model import HyperMask
from ..model_state import load_network_state, network_state
from ..moments import check as check_moments
from ..processes import ranks_of
from . import checkpoint, describe, optimizers, stored, under_way
from .config import TrainingConfig
from .divergence import cause, finite_weights
from .evaluation import accuracy, check_outputs
from .inspecting import Inspector, check_no_inspection, check_whole
from .interrupt import Stopped
from .joining import join
from .lock import taken
from .logs import Logger, Loggers, TerminalLog, on_terminal
from .memory import peak_memory
from .order import batch_rows, with_ranks
from .report import check_no_reports, check_packages, device_name, write_reports
from .result import Result, text_after_task
from .step import TaskWork
from .step import steps as training_steps
from .under_way import Position
from .world import Stopping, World


class Trainer:
    """Trains a HyperMask model on a scenario: loss_t = cross-entropy + beta R / t + lam D, Adam afresh per task.

    Args:
        model: its tasks are at least the scenario's.
        scenario: where the data come from; moved to `device`.
        config: see `TrainingConfig`.
        ramp: in the first task, iteration i of n uses sparsity p (i + 1) / n.
        seed: of the batches' order and, through torch's default generators, of augmentation and dropout.
        device: where to train.
        run_dir: folder for checkpoints, made where it is not there; None writes none.
        settings: kept in checkpoints; one that was saved under others is refused, those of earlier_settings apart. See
            `RunConfig.digest`.
        report: folder for metrics.json, timing.json, and the accuracy matrix as a table and a picture, written after
            each task; None writes none.
        progress: show progress on standard error, as the command line does; None: where that is a terminal and there
            is no `logger`.
        about: what reports and progress call the run; None: made from the arguments.
        logger: is told of progress.
        on_task_end: called with the result so far after each task, and at once when a run is resumed; on every rank.
        stop: asked after every step and every task. Where it says yes, a checkpoint is saved and `fit` raises Stopped.

    Where torch.distributed has a process group of several processes, they train together, each with the same Trainer.
    Each takes its share of each batch and of what is evaluated, and the first one alone logs, writes and shows. A
    `stop` of one of them stops all, within about a second.

    Raises:
        InputError: more tasks in the scenario than in the model, a network that does not take its inputs or has fewer
            outputs than classes, no validation data where they are needed, a module whose get_extra_state gives no
            tensor where weights are saved, or a package missing that `report` or `progress` needs. In several
            processes: ranks that differ in what they were given.
        ProcessLost: another process is gone, or does not answer; `fit` raises it too.
    """

    def __init__(
        self,
        model: HyperMask,
        scenario: Scenario,
        config: TrainingConfig,
        *,
        ramp: bool = True,
        seed: int = 0,
        device: torch.device | str = "cpu",
        run_dir: Path | str | None = None,
        settings: str = "",
        report: Path | str | None = None,
        progress: bool | None = None,
        about: describe.About | None = None,
        logger: Logger | None = None,
        on_task_end: Callable[[Result], None] | None = None,
        stop: Callable[[], bool] | None = None,
        earlier_settings: Sequence[str] = (),
    ) -> None:
        if not isinstance(model, HyperMask) or not isinstance(scenario, Scenario):
            kinds = f"{type(model).__name__} and {type(scenario).__name__}"
            raise InputError(f"Trainer takes a HyperMask model and a Scenario, not {kinds}")
        if len(scenario.tasks) > model.num_tasks:
            raise InputError(f"the scenario has {len(scenario.tasks)} tasks, the model only {model.num_tasks}")
        if config.validates and any(len(task.validation) == 0 for task in scenario.tasks):
            raise InputError("keep = best and schedule = plateau need validation data: set data.validation")
        if run_dir is not None or config.keep == "best":
            check_tensors(model.state_dict())
        check_moments(config.moments, model.hypernet, amsgrad=False)
        self.device = torch.device(device)
        self.world = World.here()
        self.model = model.to(self.device)
        self.scenario = scenario.to(self.device)
        check_outputs(self.model, self.scenario)
        join(self.world, self.model, self.scenario, config, (ramp, seed, settings))
        if config.inspect:
            check_whole(self.model)
        self.config, self.ramp, self.seed = config, ramp, seed
        self.run_dir = None if run_dir is None else Path(run_dir)
        self.settings, self.earlier_settings = settings, tuple(earlier_settings)
        self.report = Path(report) if report is not None and self.world.first else None
        if self.report is not None:
            check_packages()
        self.about = about or describe.about_training(self.model, self.scenario, config, seed)
        shown = logger is None and on_terminal() if progress is None else progress
        self._terminal = self._progress(shown and self.world.first)
        loggers = (logger, self._terminal) if self.world.first else ()
        self.logger = Loggers([each for each in loggers if each is not None])
        self.on_task_end = on_task_end or (lambda result: None)
        tasks = len(scenario.tasks)
        nothing = torch.full((tasks + 1, tasks), float("nan"), dtype=torch.float64)
        self.result = Result(nothing[1:], nothing[0])
        self.stop = Stopping(stop or (lambda: False), self.world)
        self._inspector: Inspector | None = None
        self._at = Position()
        self._finite, self._kept = 0, ""  # the task's last iteration whose loss was seen; the checkpoint there is
        self._restored_state: dict[str, Any] = {}

    def fit(self, resume: bool = False) -> Result:
        """Trains every task, or every task that is left.

        Args:
            resume: go on from run_dir's checkpoint where there is one. On the CPU the numbers are then, bit for bit,
                those of a run that was never stopped.

        Raises:
            InputError: run_dir or report can't be written, another process trains in run_dir, or its checkpoint is not
                this run's; without resume, it has one, or report has reports.
            Stopped: `stop` has said so.
        """
        if self.report is not None:
            if not resume:
                check_no_reports(self.report)
            _folder(self.report)  # now, not when the first task is done
        if self.config.inspect and self.world.first and not resume:
            check_no_inspection(self.run_dir or self.report)
        on_gpu = self.device.type == "cuda"
        written = self.run_dir if self.world.first else None
        try:
            with (
                self.world.waiting(lambda: self._place() + self._kept),
                torch.cuda.device(self.device) if on_gpu else nullcontext(),  # a graph is captured on the current one
                nullcontext() if written is None else taken(_folder(written)),
            ):
                return self._fit(resume)
        finally:
            if self._terminal is not None:
                self._terminal.close()

    def _fit(self, resume: bool) -> Result:
        restored: dict[str, Tensor] = {}
        saved = self._saved(resume)
        if saved is not None:
            restored = self._restore(saved)
            if self._at.task > 0:
                self._after_task()
        else:
            torch.manual_seed(self.seed)
            self.result.baseline.copy_(self._test_accuracies())
        if self.config.inspect and self.world.first:  # every rank has the whole model
            self._inspector = Inspector(self.run_dir or self.report, self._at.task)
        while self._at.task < len(self.scenario.tasks):
            self._train_task(self._at.task, restored)
            self.result.matrix[self._at.task] = self._test_accuracies()
            self._inspect(self._at.task)
            self.result.peak_memory = max(self.result.peak_memory, peak_memory(self.device))
            self._at, restored = Position(task=self._at.task + 1), {}
            self._save()
            self._after_task()
            if self._at.task < len(self.scenario.tasks) and self.stop(now=True):
                raise self._stopped()
        return self.result

    def _inspect(self, task: int) -> None:
        if self._inspector is not None:
            values = self._inspector.after_task(self.model, self.scenario, task)
            self.logger.step(task, self._at.iteration, values)

    def _saved(self, resume: bool) -> Path | None:
        """Where the checkpoint is that all ranks go on from; None where there is none."""
        if self.run_dir is None or not (resume or self.world.first):
            return None
        saved = self.run_dir if checkpoint.exists(self.run_dir) else None
        if resume:
            content = b"" if saved is None else (saved / checkpoint.MANIFEST).read_bytes()
            self.world.check_same({f"checkpoint in {self.run_dir}": content})
        elif saved is not None:
            raise InputError(f"{saved} holds a checkpoint: fit(resume=True) goes on from it")
        return saved

    def _after_task(self) -> None:
        """Tells of the result so far."""
        if self.report is not None:
            write_reports(self.report, self.about, self.result, self.device)
        self.logger.message(text_after_task(self.result, self.scenario))
        self.on_task_end(self.result)

    def _progress(self, shown: bool) -> TerminalLog | None:
        several = f", {self.world.size} processes" if self.world.several else ""
        title = f"{self.about.title}; {self.about.details}; {device_name(self.device)}{several}"
        labels = [self.scenario.label(task) for task in range(len(self.scenario.tasks))]
        return TerminalLog(len(labels), title, labels=labels) if shown else None

    # -- one task -------------------------------------------------------------------------------------------------

    def _train_task(self, task: int, restored: dict[str, Tensor]) -> None:
        split = self.scenario.tasks[task].train
        length, start = self.config.length(len(split)), self._at.iteration
        optimizer = optimizers.optimizer(self.model, self.config, self.device)
        plateau = optimizers.plateau(optimizer, self.config)
        if restored:
            under_way.restore(restored, self._restored_state, self.model, optimizer, plateau)
            restored.clear()  # whatever is needed has its place now; the rest would take memory for the whole task
        else:
            self.model.begin_task(task)
        self._finite = start
        self.logger.begin_task(task, length, start)
        config, layout = self.config, self.model.layout
        ramp = partial(self._sparsity, task, length=length) if self.ramp and task == 0 else None
        order = batch_rows(len(split), config.batch_size, length, self.seed, task, start)
        blocks = with_ranks(order, split, start, layout, ramp, self.model.sparsity, self.device)
        rows, ranks = next(blocks)
        work = TaskWork(
            *(self.model, task, split, rows, ranks, optimizer, config.precision, self.world, self.seed, start),
            drift_tasks=config.drift_tasks,
        )
        graph = config.cuda_graph and self.device.type == "cuda"
        steps = training_steps(work, graph, self.logger.message, blocks)
        self.model.train()
        started, values = time.perf_counter(), {}
        for iteration in range(start, length):
            values = next(steps)
            self._at.iteration = iteration + 1
            self.result.steps += 1
            self._after_step(values, self._sparsity(task, iteration, length), length, optimizer, plateau)
            stop = iteration + 1 < length and self.stop()
            if stop or self._checkpoint_due(length):
                self.result.seconds += time.perf_counter() - started
                self._check_weights(values)
                self._save(optimizer, plateau)
                started = time.perf_counter()
            if stop:
                raise self._stopped()
        if self._at.best_model:
            load_network_state(self.model, self._at.best_model)
        self._check_weights(values)
        self.result.seconds += time.perf_counter() - started

    def _sparsity(self, task: int, iteration: int, length: int) -> float:
        if self.ramp and task == 0:
            return self.model.sparsity * (iteration + 1) / length
        return self.model.sparsity

    def _after_step(
        self,
        values: dict[str, Tensor],
        sparsity: float,
        length: int,
        optimizer: torch.optim.Adam,
        plateau: ReduceLROnPlateau | None,
    ) -> None:
        """Validation and the log, where they are due; the only places where the host waits for the device."""
        task, done = self._at.task, self._at.iteration
        self.logger.advance(1)
        logged = {}
        epoch = self.config.epoch_length(len(self.scenario.tasks[task].train))
        if self.config.validates and (done % self.config.validate_every == 0 or done % epoch == 0 or done == length):
            logged["validation_accuracy"] = self._validate(sparsity)
            if plateau is not None and done % epoch == 0:
                plateau.step(logged["validation_accuracy"])
        if logged or done % self.config.log_every == 0 or done == length or self._seen_to_diverge(values["loss"]):
            values = self.world.means(values)
            logged |= {name: value.item() for name, value in values.items()}
            logged |= {"lr": float(optimizer.param_groups[0]["lr"]), "sparsity": sparsity}
            self.logger.step(task, done, logged)
            if not isfinite(logged["loss"]):
                raise self._diverged(f"the loss is {logged['loss']} at", values)
            self._finite = done

    def _seen_to_diverge(self, loss: Tensor) -> bool:
        """Whether this step's loss is not finite, where looking costs nothing and all processes see the same."""
        if loss.device.type != "cpu" or self.world.several:
            return False
        if finite := isfinite(loss.item()):
            self._finite = self._at.iteration
        return not finite

    def _check_weights(self, values: dict[str, Tensor]) -> None:
        """Before they are saved: raises InputError where they are not finite, so that the checkpoint before stays."""
        if not self.world.all_say(finite_weights(self.model)):
            raise self._diverged("the weights are not finite after", self.world.means(values))

    def _diverged(self, what: str, values: dict[str, Tensor]) -> InputError:
        task, done = self._at.task, self._at.iteration
        split = self.scenario.tasks[task].train
        why = cause(split, values, self.model.drift, self.config.lr, self.config.evaluation_batch)
        seen = f" (finite until {self._finite})" if 0 < self._finite < done else ""
        return InputError(f"{what} {self.scenario.label(task)}, iteration {done}{seen}: {why}{self._kept}")

    def _validate(self, sparsity: float) -> float:
        """Validation accuracy now, percent; keeps a copy of the model where it is the task's best so far."""
        task = self._at.task
        split, batch = self.scenario.tasks[task].validation, self.config.evaluation_batch
        value = accuracy(self.model, split, task, batch, sparsity, self.world)
        if self.config.keep == "best" and value > self._at.best_accuracy:
            self._at.best_accuracy = value
            self._at.best_model = {name: tensor.clone() for name, tensor in network_state(self.model).items()}
        return value

    def _test_accuracies(self) -> Tensor:
        values = [
            accuracy(self.model, task.test, number, self.config.evaluation_batch, None, self.world)
            for number, task in enumerate(self.scenario.tasks)
        ]
        return torch.tensor(values, dtype=torch.float64)

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def _checkpoint_due(self, length: int) -> bool:
        every, done = self.config.checkpoint_every, self._at.iteration
        return self.run_dir is not None and every > 0 and done % every == 0 and done < length

    def _save(self, optimizer: torch.optim.Adam | None = None, plateau: ReduceLROnPlateau | None = None) -> None:
        """Within a task, all that the rest of it depends on; between tasks, the model and the results. On all ranks."""
        if self.run_dir is None:
            return
        at = self._at
        tensors = checkpoint.model_tensors(self.model) | checkpoint.generator_tensors(self.device)
        tensors |= {"result.matrix": self.result.matrix, "result.baseline": self.result.baseline}
        state: dict[str, Any] = {
            "settings": self.settings,
            "length": {"iterations": self.config.iterations, "epochs": self.config.epochs},
            "task": at.task,
            "iteration": at.iteration,
            "best_accuracy": at.best_accuracy,
            "seconds": self.result.seconds,
            "steps": self.result.steps,
            "peak_memory": self.result.peak_memory,
            "threads": torch.get_num_threads(),
            "model": checkpoint.model_settings(self.model),
        }
        if optimizer is not None:
            under_way.add(tensors, state, self.model, optimizer, plateau, at.best_model)
        ranks = ranks_of(self.model.hypernet.processes)
        checkpoint.save(self.run_dir, f"{at.task:03d}-{at.iteration:07d}", tensors, state, ranks)
        self._keeps()

    def _stopped(self) -> Stopped:
        kept = "nothing is saved" if self.run_dir is None else "which is saved"
        return Stopped(f"stopped at {self._place()}, {kept}")

    def _keeps(self) -> None:
        self._kept = f"; the checkpoint of {self._place()} is kept"

    def _place(self) -> str:
        task = self._at.task
        label = self.scenario.label(task) if task < len(self.scenario.tasks) else f"task {task}"
        return f"{label}, iteration {self._at.iteration}"

    def _restore(self, run_dir: Path) -> dict[str, Tensor]:
        """Goes to the checkpoint's position; returns its tensors where that is within a task."""
        tasks = self.scenario.tasks
        samples, settings = [len(task.train) for task in tasks], (self.settings, *self.earlier_settings)
        tensors, state = stored.load(run_dir, self.model, len(tasks), self.config, settings, samples, self.device)
        checkpoint.restore_model(self.model, tensors)
        checkpoint.restore_generators(tensors, self.device)
        if self.device.type == "cpu":
            checkpoint.warn_of_threads(state)
        self.result = Result(
            tensors["result.matrix"].cpu(),
            tensors["result.baseline"].cpu(),
            state["seconds"],
            state["steps"],
            state["peak_memory"],
        )
        self._at = Position(state["task"], state["iteration"], state["best_accuracy"], under_way.best_model(tensors))
        self._restored_state = state
        self._keeps()
        return tensors if self._at.iteration > 0 else {}


def _folder(path: Path) -> Path:
    """`path`, where a folder is afterwards."""
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
    return path
