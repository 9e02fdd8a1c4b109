"""The life of a task: added, copied, frozen, removed; and what a state_dict says of all tasks."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import inference, model_state
from .checks import is_whole, shown
from .dense import HyperNetwork
from .errors import InputError
from .inference.fitted import ClassGaussians
from .masking import classes as numbers
from .masking.layout import MaskLayout
from .masking.masked_network import MaskedNetwork
from .regularizers import Anchor


class TaskLife(MaskedNetwork):
    """A masked network with its hypernetwork, whose tasks come and go. Ids are never given twice.

    Attributes:
        hypernet: the hypernetwork, with one embedding per task.
        sparsity: percent.
        anchor: what `begin_task` captured; None before the first task begins.
        frozen: ids of tasks that are no longer trained.
        fitted: what methods of `inference` have fitted to training data, by their names.
    """

    hypernet: HyperNetwork
    sparsity: float
    anchor: Anchor | None
    frozen: tuple[int, ...] = ()
    fitted: dict[str, ClassGaussians]

    @property
    def num_tasks(self) -> int:
        """How many ids have been given: tasks are numbered 0 to num_tasks - 1. See `tasks` for those still there."""
        return self.hypernet.num_tasks

    @property
    def tasks(self) -> tuple[int, ...]:
        """Ids of the tasks that are there."""
        return tuple(self.hypernet.tasks())

    @property
    def classes(self) -> tuple[int, ...] | None:
        """How many classes each task has; None where all use every output."""
        return None if self._classes is None else self._classes.counts

    def position(self, task: int) -> int:
        """How many of the tasks that are there come before `task`: what t is in beta R / t."""
        return len(self.hypernet.tasks(task)) - 1

    def _known(self, tasks: Tensor) -> Tensor:
        """Which task ids exist, without a wait for the device."""
        known = (tasks >= 0) & (tasks < self.num_tasks)
        for removed in self.hypernet.removed:
            known = known & (tasks != removed)
        return known

    def task_ids(self, tasks: Iterable[int] | Tensor | None = None) -> tuple[int, ...]:
        """Ids, in the order given, of tasks that there are; None: of all, `tasks`.

        Raises:
            InputError: it is no sequence of ids, or there is no such task.
        """
        if tasks is None:
            return self.tasks
        try:
            each = iter(tasks)
        except TypeError:  # a tensor or array without dimensions looks as if one could go through it
            raise InputError(f"tasks are ids, such as [0, 1], not {shown(tasks)}") from None
        return tuple(map(self._check_task, each))

    def _check_task(self, task: int | Tensor) -> int:
        """The id as an int. Raises InputError where there is no such task."""
        hypernet = self.hypernet
        if type(task) is not int:
            if not (is_id(task) if isinstance(task, Tensor) else is_whole(task)):
                raise InputError(f"a task is an integer from 0 to {self.num_tasks - 1}, not {shown(task)}")
            task = int(task)
        if not 0 <= task < hypernet.num_tasks:
            ids = f"0 to {self.num_tasks - 1}"
            raise InputError(f"task {task} does not exist: this model has tasks {ids} (add_task adds one)")
        if task in hypernet.removed:
            raise InputError(f"task {task} was removed: this model has tasks {', '.join(map(str, self.tasks))}")
        return task

    # -- the life of a task ---------------------------------------------------------------------------------------

    def add_task(
        self, optimizer: Optimizer | None = None, *, like: int | None = None, classes: int | None = None
    ) -> int:
        """One more task, at any time; returns its id.

        Existing Parameters stay the same objects, so a running optimiser goes on working; given here, it also gets
        the new ones, each in the group of the task before and right behind it: schedulers find as many groups as they
        know, and the order is that of a new optimiser's.

        Args:
            optimizer: of this model.
            like: the task that it begins as a copy of: embedding, per-task parameters, batch-norm statistics. None: a
                fresh embedding ~ N(0, 1), and the parameters and statistics that the network came with.
            classes: how many it has, for a model with `classes`; by default as many as the task `like`.

        Raises:
            InputError: `like` does not exist, classes are missing or not to be given, or no optimiser of this model.
        """
        like = None if like is None else self._check_task(like)
        if optimizer is not None and not self._is_trained_by(optimizer):
            raise InputError(f"add_task(optimizer) takes this model's optimizer, not {type(optimizer).__name__}")
        counts = self._counts_with(like, classes)
        own, norms = self.own_values(), self.statistics()
        added = [self.hypernet.add_task()]
        for plain, values in own:
            values.append(nn.Parameter(plain.detach().clone(), plain.requires_grad))
            added.append(values[-1])
        for module in norms:
            module.add_task(like)
        if like is not None:
            with torch.no_grad():
                for new, old in zip(added, self._parameters_of(like), strict=True):
                    new.copy_(old)
        if counts is not None and self._classes is not None:
            self._classes.counts = counts
        if optimizer is not None:
            for before, new in zip(self._parameters_of(self.num_tasks - 2), added, strict=True):
                _enter(optimizer, before, new)
        return self.num_tasks - 1

    def _is_trained_by(self, optimizer: Any) -> bool:
        mine = set(map(id, self.parameters()))
        return any(id(p) in mine for group in getattr(optimizer, "param_groups", ()) for p in group["params"])

    def _counts_with(self, like: int | None, classes: int | None) -> tuple[int, ...] | None:
        """The numbers of classes with one more task."""
        if self.classes is None:
            if classes is not None:
                raise InputError("classes: this model's tasks use all outputs; give it HyperMask(..., classes=[...])")
            return None
        if classes is None:
            if like is None:
                raise InputError("how many classes? add_task(classes=...), for this model's tasks differ in it")
            classes = self.classes[like]
        return numbers.check((*self.classes, classes), self.num_tasks + 1)

    def remove_task(self, task: int) -> None:
        """Forgets a task: its embedding, per-task parameters and statistics are wiped. Ids of others stay.

        The drifts and their scale 1 / t count the tasks that are left. `forward_all_tasks` gives NaN in the task's
        row, `infer_task` and `predict` never choose it, `all_masks` leaves it out. Its Parameters stay where they are,
        zero and untrained, so that optimisers and state_dicts go on fitting. What it has taught the shared networks
        stays in them.

        Raises:
            InputError: it does not exist, or is the last one.
        """
        task = self._check_task(task)
        if len(self.tasks) == 1:
            raise InputError(f"task {task} is the only one left: a model needs a task")
        anchor = self.anchor
        if anchor is not None and task == anchor.task:
            self.anchor = None
        elif anchor is not None and task < anchor.task:
            self.anchor = anchor.without(self.position(task))
        with torch.no_grad():
            for parameter in self._parameters_of(task):
                parameter.zero_()
        for module in self.statistics():
            module.reset(task)
        for fitted in self.fitted.values():
            fitted.forget(task)
        self._mark(sorted({*self.hypernet.removed, task}), [frozen for frozen in self.frozen if frozen != task])

    def freeze_task(self, task: int, frozen: bool = True) -> None:
        """Has training leave a task's own as they are: embedding, per-task parameters, batch-norm statistics.

        Its mask can still change with the hypernetwork, which all tasks share; the output drift holds it in place.
        frozen=False: it is trained again.

        Raises:
            InputError: it does not exist.
        """
        task = self._check_task(task)
        self._mark(self.hypernet.removed, sorted({*self.frozen, task} if frozen else {*self.frozen} - {task}))

    def _mark(self, removed: Sequence[int], frozen: Sequence[int]) -> None:
        """Makes these the removed and the frozen tasks."""
        plain = [parameter.requires_grad for parameter, _ in self.own_values()]
        before, still = {*self.hypernet.removed, *self.frozen}, {*removed, *frozen}
        for task in before | still:  # of all others the user says what is trained
            for parameter, trained in zip(self._parameters_of(task), (True, *plain), strict=True):
                parameter.requires_grad_(trained and task not in still)
                if task in still:
                    parameter.grad = None
        self.hypernet.removed, self.frozen = tuple(removed), tuple(frozen)
        for module in self.statistics():
            module.frozen = tuple(frozen)

    def _parameters_of(self, task: int) -> list[nn.Parameter]:
        """The embedding, and the task's value of every per-task parameter."""
        return [self.hypernet.embeddings[task], *(values[task] for _, values in self.own_values())]

    def print_trainable_parameters(self) -> None:
        """Prints how many parameters are trained, of which kinds they are, and what each is for."""
        print(self._counted())

    def _counted(self) -> str:
        masked = {id(weight) for weight in self.weights()}
        own = {id(plain) for plain, _ in self.own_values()}
        embeddings = set(map(id, self.hypernet.embeddings))
        kinds = {
            "network, masked": [p for p in self.net.parameters() if id(p) in masked],
            "network, shared by all tasks": [p for p in self.net.parameters() if id(p) not in masked | own],
            "network, per task": list(self.own.parameters()),
            "hypernetwork": [p for p in self.hypernet.parameters() if id(p) not in embeddings],
            f"embeddings of {len(self.tasks)} tasks": [self.hypernet.embeddings[task] for task in self.tasks],
        }
        everything = [parameter for parameters in kinds.values() for parameter in parameters]
        lines = [("trainable", "all", "parameters of")]
        lines += [(*_sizes(parameters), kind) for kind, parameters in kinds.items() if parameters]
        lines.append((*_sizes(everything), "all of them"))
        widths = [max(len(line[i]) for line in lines) for i in range(2)]
        return "\n".join(f"{a:>{widths[0]}}  {b:>{widths[1]}}  {c}" for a, b, c in lines)

    # -- state_dict -----------------------------------------------------------------------------------------------

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        known = self.layout if self._heads_known else None
        marks = [2 if task in self.frozen else int(task in self.hypernet.removed) for task in range(self.num_tasks)]
        entries = model_state.entries(self.layout, self.sparsity, marks, self.classes, known, self.anchor)
        for name, fitted in self.fitted.items():
            entries |= model_state.fitted_entries(name, fitted.entries())
        destination.update({prefix + name: tensor for name, tensor in entries.items()})

    _entries = model_state.Entries()

    def _fqn_modifiers(self) -> dict[str, str]:
        """Where torch.distributed.checkpoint.state_dict finds the names of a state_dict that are no attributes here."""
        return {model_state.PREFIX.removesuffix("."): "_entries"}

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        found = model_state.taken(state_dict, prefix)
        model_state.check(found, self.layout, self.sparsity, self.num_tasks, self.classes)
        model_state.check_shapes(self, state_dict, prefix)
        if found:
            self._restore(found)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _restore(self, found: dict[str, Tensor]) -> None:
        """Takes `model_state.entries` over. Raises InputError, before anything changes, where they don't fit."""
        layout = self._layout_of(model_state.output_biases(found, self.layout))
        marks = found["tasks"].tolist() if "tasks" in found else None
        removed = self.hypernet.removed if marks is None else [t for t, m in enumerate(marks) if m == 1]
        anchor = model_state.anchor(found, self.layout.size)
        if anchor is not None:
            self._check_anchor(anchor, removed)
        fitted = inference.restored(model_state.fitted(found), range(self.num_tasks))
        self.layout, self._heads_known = (self.layout, self._heads_known) if layout is None else (layout, True)
        if marks is not None:
            self._mark(removed, [t for t, m in enumerate(marks) if m == 2])
        device, dtype = self.weights()[0].device, self.hypernet.output.weight.dtype
        if fitted or "sparsity" in found:
            for one in fitted.values():
                one.to(device)
            self.fitted = fitted
        if "sparsity" in found:  # a whole state: without an anchor there was none
            self.anchor = None if anchor is None else anchor.map(lambda tensor: tensor.to(device, dtype, copy=True))
            if self.anchor is not None:
                self.anchor = self.anchor._replace(targets=self.hypernet.held_targets(self.anchor.targets))

    def _check_anchor(self, anchor: Anchor, removed: Sequence[int]) -> None:
        """Raises InputError where it can't be one of this model's tasks, with these removed."""
        if anchor.task not in range(self.num_tasks) or anchor.task in removed:
            raise InputError(f"the state is of another model: task {anchor.task}, which began last, does not exist")
        earlier = sum(task not in removed for task in range(anchor.task))
        shapes = self.hypernet.drift_target_shapes(earlier) if earlier else ()
        found = tuple(tuple(target.shape) for target in anchor.targets)
        if found != shapes:
            raise InputError(
                f"the state is of another model: what task {anchor.task} compares with has the shapes {found}, "
                f"this model's {shapes}"
            )

    def _layout_of(self, biases: list[str] | None) -> MaskLayout | None:
        """The layout with these output layers' biases; None where they are not told."""
        if biases is None:
            return None
        layout = self.layout.with_output_biases(biases)
        if self._heads_known and layout != self.layout:
            mine = [segment.name for segment in self.layout.segments if not segment.selected]
            raise InputError(
                f"the state is of another layout: its output layer's bias is {', '.join(biases) or 'none'}, this "
                f"model's is {', '.join(mine) or 'none'}"
            )
        return self.layout if self._heads_known else layout


def is_id(task: Tensor) -> bool:
    """Whether it can be one task's id."""
    return task.dtype == torch.int64 and task.dim() <= 1 and task.numel() == 1


def _sizes(parameters: Sequence[nn.Parameter]) -> tuple[str, str]:
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    return f"{trained:,}", f"{sum(parameter.numel() for parameter in parameters):,}"


def _enter(optimizer: Optimizer, before: nn.Parameter, new: nn.Parameter) -> None:
    """Lets the optimiser train one more task's parameter, behind that of the task before."""
    for group in optimizer.param_groups:
        for i, parameter in enumerate(group["params"]):
            if parameter is before:
                group["params"].insert(i + 1, new)
                if "param_names" in group:
                    start, _, number = group["param_names"][i].rpartition(".")
                    group["param_names"].insert(i + 1, f"{start}.{int(number) + 1}")
                return
    settings = {k: v for k, v in optimizer.param_groups[0].items() if k not in ("params", "param_names")}
    optimizer.add_param_group({**settings, "params": [new]})
