"""FeCAM as it is published, and Mahalanobis, our own: the nearest class names the task."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_whole
from ..errors import InputError
from .features import TaskModel, features_of
from .fitted import ClassGaussians
from .fitting import TasksData, batches, by_task, check_read_again, evaluating
from .gaussians import correlation, shrunk

SHRINKAGES = (0.001, 0.003, 0.01, 0.03, 0.1)
_EVERYWHERE = 1e-8  # what the published code adds to every entry of the correlation matrix


class FeCAM(ClassGaussians):
    """d(x) = delta' pinv(R_c + 1e-8 1 1') delta, delta = f / |f| - mu_c / |mu_c|, R_c the correlation of shrunk S_c.

    f are features under the class's own task's mask, mu_c and S_c their mean and unbiased covariance. S is shrunk
    twice, S <- S + a d I + b o (1 1' - I), with d the mean of its diagonal and o that of its non-zero off-diagonal
    entries, both of the S at hand.

    Args:
        shrinkage: a and b.
        times: how often S is shrunk; 0: not at all.
        tukey: lambda of Tukey's transform f^lambda (0: log f) of all features before anything else; None: no transform.

    Source: Goswami et al. 2023; the defaults are those of HyperMask's published runs.
    """

    name = "fecam"

    def __init__(
        self, *, shrinkage: tuple[float, float] = (1.0, 1.0), times: int = 2, tukey: float | None = None
    ) -> None:
        super().__init__()
        a, b = (_number("shrinkage", each) for each in shrinkage)
        self.shrinkage, self.times = (a, b), check_whole("times", times, 0)
        self.tukey = None if tukey is None else _number("tukey", tukey)

    @classmethod
    def fit(
        cls, model: TaskModel, data: TasksData, *, layer: str | None = None, batch_size: int = 1000, **settings: Any
    ) -> "FeCAM":
        """Collects mean and covariance of every class in a stream, in float64, and keeps them in `model.fitted`.

        Args:
            model: a HyperMask; data pass through it in evaluation mode, each under its task's mask.
            data: a Scenario (of which the training splits are taken, not augmented), or {task: data} or a list of
                data, each a Split, two tensors (inputs, labels), or (inputs, labels) batches such as a DataLoader's.
            layer: path of the layer whose input the features are, (batch, D); None: the output layer.
            batch_size: samples per batch, of splits and tensors.
            settings: of the class.

        Returns:
            What is in `model.fitted["fecam"]`: (D + 1) D / 2 float64 numbers per class, twice that in memory.

        Raises:
            InputError: no such layer, a class with one sample or whose features don't vary, features that are not
                finite. The model is then as it was.
        """
        fitted = cls(**settings)
        fitted._collect(model, data, layer, batch_size)
        model.fitted[cls.name] = fitted
        return fitted

    def settings(self) -> dict[str, Any]:
        return {"shrinkage": list(self.shrinkage), "times": self.times, "tukey": self.tukey}

    def collected(self, features: Tensor) -> Tensor:
        if self.tukey is None:
            return features
        if (features < 0).any() or (self.tukey == 0 and (features == 0).any()):
            limit = "above 0" if self.tukey == 0 else "of 0 or more"
            raise InputError(
                f"Tukey's transform of power {self.tukey:g} takes features {limit}: tukey=None does without"
            )
        return features.log() if self.tukey == 0 else features.pow(self.tukey)

    def compared(self, features: Tensor) -> Tensor:
        return F.normalize(self.collected(features), dim=-1)

    def centres(self, means: Tensor) -> Tensor:
        return F.normalize(means, dim=-1)

    def metric(self, covariance: Tensor) -> Tensor:
        for _ in range(self.times):
            covariance = shrunk(covariance, *self.shrinkage)
        return correlation(covariance) + _EVERYWHERE


class Mahalanobis(ClassGaussians):
    """d(x) = (z - mu_c)' (S_c + a d I)^-1 (z - mu_c), with z = f / |f| from the beginning.

    f are features under the class's own task's mask, mu_c and S_c the mean and unbiased covariance of z in the class,
    d the mean of S_c's diagonal.

    Args:
        shrinkage: the factor a, which `fit(..., validation=...)` chooses.
    """

    name = "mahalanobis"

    def __init__(self, *, shrinkage: float = 0.01) -> None:
        super().__init__()
        self.shrinkage = _number("shrinkage", shrinkage)

    @classmethod
    def fit(
        cls,
        model: TaskModel,
        data: TasksData,
        *,
        validation: TasksData | None = None,
        layer: str | None = None,
        batch_size: int = 1000,
        **settings: Any,
    ) -> "Mahalanobis":
        """As `FeCAM.fit`, into `model.fitted["mahalanobis"]`.

        Args:
            validation: further data of these tasks, by which the shrinkage is chosen among `SHRINKAGES`: the one of
                most samples whose task and class are found. They are read once for each of these. Of a Scenario the
                validation splits, which must not be empty. None: the shrinkage is the setting's.
        """
        fitted = cls(**settings)
        if validation is not None:
            check_read_again(by_task(model, validation, "validation"))
        fitted._collect(model, data, layer, batch_size)
        if validation is not None:
            right = {a: fitted._right(model, validation, a, batch_size) for a in SHRINKAGES}
            fitted = fitted._with(max(right, key=right.__getitem__))
        model.fitted[cls.name] = fitted
        return fitted

    def _with(self, shrinkage: float) -> "Mahalanobis":
        """The same statistics with another shrinkage."""
        other = Mahalanobis(shrinkage=shrinkage)
        other.layer, other.of_task = self.layer, self.of_task
        return other

    @torch.no_grad()
    def _right(self, model: TaskModel, validation: TasksData, shrinkage: float, batch_size: int) -> int:
        """Of how many validation samples task and class are found."""
        other, right = self._with(shrinkage), 0
        masks = model.all_masks(list(self.of_task))
        with evaluating(model):
            for task, data in by_task(model, validation, "validation").items():
                if task not in self.of_task:
                    raise InputError(f"validation data of task {task}, which is not among the tasks fitted")
                seen = 0
                for inputs, kwargs, labels in batches(data, batch_size, f"validation of task {task}"):
                    each = [
                        other.nearest(features_of(model, mask, self.layer, inputs, kwargs)[0], of)
                        for of, mask in zip(self.of_task, masks, strict=True)
                    ]
                    row = torch.stack([distance for distance, _ in each]).argmin(0)
                    found = torch.stack([label for _, label in each]).gather(0, row[None])[0]
                    here = row == list(self.of_task).index(task)
                    right += int((here & (found == labels.to(found.device))).sum())
                    seen += len(labels)
                if not seen:
                    raise InputError(f"task {task} has no validation samples to choose by: validation=None")
        return right

    def settings(self) -> dict[str, Any]:
        return {"shrinkage": self.shrinkage}

    def collected(self, features: Tensor) -> Tensor:
        return F.normalize(features, dim=-1)

    def compared(self, features: Tensor) -> Tensor:
        return F.normalize(features, dim=-1)

    def centres(self, means: Tensor) -> Tensor:
        return means

    def metric(self, covariance: Tensor) -> Tensor:
        d = covariance.diagonal().mean()
        return covariance + self.shrinkage * d * torch.eye(len(covariance), dtype=d.dtype, device=d.device)


KINDS: dict[str, type[ClassGaussians]] = {kind.name: kind for kind in (FeCAM, Mahalanobis)}


def restored(found: Mapping[str, Mapping[str, Tensor]], tasks: Sequence[int]) -> dict[str, ClassGaussians]:
    """What `ClassGaussians.entries` gave, by method. Raises InputError: damaged, or of other methods or tasks."""
    made = {}
    for method, entries in found.items():
        if method not in KINDS:
            raise InputError(f"the state has statistics of {method!r}, which this version does not know")
        made[method] = KINDS[method].of_entries(entries)
        if not set(made[method].of_task) <= set(tasks):
            raise InputError(
                f"the state has {method} statistics of tasks that this model lacks: {[*made[method].of_task]}"
            )
    return made


def _number(name: str, value: Any) -> float:
    """A finite number of 0 or more."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise InputError(f"{name} must be a number of 0 or more, not {value!r}")
    return float(value)
