"""What is fitted to training data and then kept in the model: of every class a mean and a covariance of features."""

import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from ..errors import InputError
from .features import TaskModel, feature_layer, features_of
from .fingerprint import fingerprints, glance
from .fitting import TasksData, batches, by_task, evaluating
from .gaussians import TaskSums, inverse_root, squared_distances

_F = TypeVar("_F", bound="ClassGaussians")
_ROUNDING = 1e-13  # of a squared mean: what float32's rounding leaves of a variance of 0


@dataclass(frozen=True, eq=False)
class TaskGaussians:
    """Of one task's classes, in ascending order.

    Attributes:
        labels: (C,) int64; counts: (C,) int64, samples of each.
        means: (C, D) float64; covariances: (C, D, D) float64, unbiased.
        fingerprint: of the weights that made the features; see `fingerprints`.
    """

    labels: Tensor
    counts: Tensor
    means: Tensor
    covariances: Tensor
    fingerprint: bytes

    @classmethod
    def of(cls, sums: TaskSums, fingerprint: bytes) -> "TaskGaussians":
        """Raises InputError where a class has no covariance."""
        sums.check()
        labels = sorted(sums.classes)
        each = [sums.classes[label] for label in labels]
        device = each[0].origin.device
        return cls(
            torch.tensor(labels, device=device),
            torch.tensor([one.count for one in each], device=device),
            torch.stack([one.mean() for one in each]),
            torch.stack([one.covariance() for one in each]),
            fingerprint,
        )

    def to(self, device: torch.device) -> "TaskGaussians":
        labels, counts = self.labels.to(device), self.counts.to(device)
        return TaskGaussians(labels, counts, self.means.to(device), self.covariances.to(device), self.fingerprint)


class ClassGaussians(ABC):
    """A method that takes the nearest class of all tasks' classes, by a distance of its own in feature space.

    `model.fitted[name]` is what was fitted last. It is saved with the model, and a removed task's statistics go with
    the task. Where weights have changed since a task was fitted, the first use of that task afterwards warns.

    Attributes:
        name: the method's.
        layer: path of the layer whose input the features are.
        of_task: statistics by task.
    """

    name: ClassVar[str]
    layer: str
    of_task: dict[int, TaskGaussians]

    def __init__(self) -> None:
        self.layer, self.of_task = "", {}
        self._roots: dict[tuple[int, torch.dtype], tuple[Tensor, ...]] = {}
        self._seen: tuple[tuple, frozenset[int]] = (), frozenset()  # a glance, and the tasks looked at under it

    # -- what a method is -----------------------------------------------------------------------------------------

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """JSON values that make the same method again."""

    @abstractmethod
    def collected(self, features: Tensor) -> Tensor:
        """(B, D) what mean and covariance are taken of."""

    @abstractmethod
    def compared(self, features: Tensor) -> Tensor:
        """(B, D) what distances are taken of."""

    @abstractmethod
    def centres(self, means: Tensor) -> Tensor:
        """(C, D) what they are taken from."""

    @abstractmethod
    def metric(self, covariance: Tensor) -> Tensor:
        """(D, D) the matrix M whose (pseudo-)inverse weighs a difference."""

    # -- fitting --------------------------------------------------------------------------------------------------

    def update(self: _F, model: TaskModel, data: TasksData, *, batch_size: int = 1000) -> _F:
        """Fits these tasks, for the first time or again, on the layer that was chosen; others stay. See `fit`."""
        self._collect(model, data, self.layer or None, batch_size)
        model.fitted[self.name] = self
        return self

    @torch.no_grad()
    def _collect(self, model: TaskModel, data: TasksData, layer: str | None, batch_size: int) -> None:
        """Takes tasks' training data in. Raises InputError before anything changes."""
        new: dict[int, TaskGaussians] = {}
        tasks, found = by_task(model, data), None
        of_weights = fingerprints(model, tasks)
        with evaluating(model):
            for task, of_task in tasks.items():
                sums, mask = TaskSums(task), None
                for inputs, kwargs, labels in batches(of_task, batch_size, f"task {task}"):
                    found = found or feature_layer(model, layer, inputs, kwargs)  # before a mask: the first pass
                    mask = mask or model.all_masks([task])[0]
                    features, _ = features_of(model, mask, found, inputs, kwargs)
                    if len(features) != len(labels):
                        raise InputError(f"a batch of task {task} has {len(features)} inputs and {len(labels)} labels")
                    sums.add(self.collected(features.double()), labels.to(features.device))
                counts = model.classes
                if counts is not None and sums.classes and max(sums.classes) >= counts[task]:
                    raise InputError(f"task {task} has {counts[task]} classes, and a label {max(sums.classes)}")
                new[task] = TaskGaussians.of(sums, of_weights[task])
                self._check_varies(task, new[task])
        self.layer = found or self.layer
        self._replace({**self.of_task, **new})

    def _check_varies(self, task: int, gaussians: TaskGaussians) -> None:
        for label, mean, covariance in zip(
            gaussians.labels.tolist(), gaussians.means, gaussians.covariances, strict=True
        ):
            if not covariance.diagonal().sum() > _ROUNDING * mean.square().sum():
                raise InputError(f"all samples of class {label} of task {task} have the same features: no covariance")
            if not self.metric(covariance).isfinite().all():
                raise InputError(
                    f"a feature never varies in class {label} of task {task}: without shrinkage there is no correlation"
                )

    def forget(self, task: int) -> None:
        """Drops a task's statistics, where there are some."""
        self._replace({t: gaussians for t, gaussians in self.of_task.items() if t != task})

    def _replace(self, of_task: dict[int, TaskGaussians]) -> None:
        self.of_task = dict(sorted(of_task.items()))
        self._roots, self._seen = {}, ((), frozenset())

    # -- use ------------------------------------------------------------------------------------------------------

    def distances(self, features: Tensor, task: int) -> Tensor:
        """(C, B) squared distances of features (B, D), made under a task's mask, from its C classes, in order.

        In the features' dtype, float32 at least; the factors are made in float64.
        """
        features = self.compared(features.to(torch.promote_types(features.dtype, torch.float32)))
        centres, roots, signs = self._factors(task, features)
        return squared_distances(features, centres, roots, signs)

    def nearest(self, features: Tensor, task: int) -> tuple[Tensor, Tensor]:
        """(B,) distance from the nearest of a task's classes, and (B,) int64 which one that is."""
        distance, place = self.distances(features, task).min(0)
        return distance, self.of_task[task].labels[place]

    def _factors(self, task: int, like: Tensor) -> tuple[Tensor, ...]:
        """Centres (C, D), roots (C, D, D) and their signs (C, D) of a task in a dtype, made once in float64."""
        gaussians = self.of_task[task]
        if like.shape[1] != gaussians.means.shape[1]:
            raise InputError(
                f"layer {self.layer!r} is given {like.shape[1]} features, {gaussians.means.shape[1]} at fit"
            )
        key = task, like.dtype
        if key not in self._roots or self._roots[key][0].device != like.device:
            roots = [inverse_root(self.metric(covariance)) for covariance in gaussians.covariances]
            centres = self.centres(gaussians.means)
            stacked = (torch.stack(each).to(like) for each in zip(*roots, strict=True))
            self._roots[key] = (centres.to(like), *stacked)
        return self._roots[key]

    def check(self, model: TaskModel, tasks: Iterable[int]) -> None:
        """Raises InputError where a task is not fitted; warns where weights are no longer those, of each task once per
        change."""
        tasks = list(tasks)
        missing = [task for task in tasks if task not in self.of_task]
        if missing:
            kind = type(self).__name__
            raise InputError(
                f"{kind} has not been fitted for task {', '.join(map(str, missing))}: "
                f"model.fitted[{self.name!r}].update(model, {{{missing[0]}: its training data}})"
            )
        now = glance(model)
        looked_at = self._seen[1] if self._seen[0] == now else frozenset()
        new = [task for task in tasks if task not in looked_at]
        if not new:
            return
        self._seen = now, looked_at | set(new)
        if stale := [str(task) for task in self._stale(model, new)]:
            warnings.warn(
                f"weights have changed since {type(self).__name__} was fitted for task {', '.join(stale)}: distances "
                "are from the features as they were then; where the training data are at hand, fit again",
                stacklevel=4,
            )

    def is_of(self, model: TaskModel, tasks: Iterable[int]) -> bool:
        """Whether these tasks are fitted, of the weights that the model has now."""
        return set(tasks) <= set(self.of_task) and not self._stale(model, tasks)

    def _stale(self, model: TaskModel, tasks: Iterable[int]) -> list[int]:
        of_weights = fingerprints(model, tasks)
        return [task for task in tasks if self.of_task[task].fingerprint != of_weights[task]]

    # -- kept with the model --------------------------------------------------------------------------------------

    def to(self, device: torch.device) -> None:
        if any(gaussians.means.device != device for gaussians in self.of_task.values()):
            self._replace({task: gaussians.to(device) for task, gaussians in self.of_task.items()})

    def entries(self) -> dict[str, Tensor]:
        """All of it as tensors: about, JSON as (n,) uint8; of each task labels, counts, means, fingerprint (32,) uint8,
        and covariances (C, D (D + 1) / 2), the rows of the lower triangle one after another."""
        about = json.dumps({"layer": self.layer, "settings": self.settings()}, sort_keys=True)
        found = {"about": torch.tensor(list(about.encode()), dtype=torch.uint8)}
        for task, g in self.of_task.items():
            low = torch.tril_indices(*g.covariances.shape[1:], device=g.covariances.device).unbind()
            found |= {f"{task}.labels": g.labels, f"{task}.counts": g.counts, f"{task}.means": g.means}
            found[f"{task}.covariances"] = g.covariances[:, low[0], low[1]]
            found[f"{task}.fingerprint"] = torch.tensor(list(g.fingerprint), dtype=torch.uint8)
        return found

    @classmethod
    def of_entries(cls: type[_F], entries: Mapping[str, Tensor]) -> _F:
        """What `entries` gave. Raises InputError where they are not such."""
        try:
            about = json.loads(bytes(entries["about"].tolist()))
            made = cls(**about["settings"])
            made.layer = str(about["layer"])
            tasks = sorted({int(name.partition(".")[0]) for name in entries if name != "about"})
            made.of_task = {task: _task_of(entries, task) for task in tasks}
            if len(entries) != 1 + 5 * len(tasks):
                raise ValueError("an entry that does not belong there")
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise InputError(f"statistics of {cls.name} are damaged: {str(error).splitlines()[0]}") from error
        widths = {gaussians.means.shape[1] for gaussians in made.of_task.values()}
        if len(widths) > 1:
            raise InputError(f"statistics of {cls.name} are damaged: features of {sorted(widths)} numbers")
        return made


def _task_of(entries: Mapping[str, Tensor], task: int) -> TaskGaussians:
    labels, counts, means, packed, fingerprint = (
        entries[f"{task}.{name}"] for name in ("labels", "counts", "means", "covariances", "fingerprint")
    )
    classes, width = means.shape
    wanted = {
        "labels": (labels, torch.int64, (classes,)),
        "counts": (counts, torch.int64, (classes,)),
        "means": (means, torch.float64, (classes, width)),
        "covariances": (packed, torch.float64, (classes, width * (width + 1) // 2)),
        "fingerprint": (fingerprint, torch.uint8, (32,)),
    }
    for name, (tensor, dtype, shape) in wanted.items():
        if tensor.dtype != dtype or tensor.shape != shape or not tensor.isfinite().all():
            raise ValueError(f"{name} of task {task} is {tensor.dtype} {tuple(tensor.shape)}, or not finite")
    if classes == 0 or labels.min() < 0 or counts.min() < 2:
        raise ValueError(f"task {task} has classes without samples")
    low = torch.tril_indices(width, width, device=packed.device)
    covariances = packed.new_zeros(classes, width, width)
    covariances[:, low[0], low[1]] = packed
    covariances[:, low[1], low[0]] = packed
    return TaskGaussians(labels.clone(), counts.clone(), means.clone(), covariances, bytes(fingerprint.tolist()))
