"""Which task is this? The task and the class of samples whose task is unknown, by one of several methods."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..errors import InputError
from ..masking import mixed
from ..masking.masks import TaskMask
from ..masking.task_batch import TaskMasks, masks_given
from . import gradient
from .distances import FeCAM, Mahalanobis
from .features import TaskModel, features_of
from .fitted import ClassGaussians

METHODS = (
    "entropy",
    "max_softmax",
    "energy",
    "fecam",
    "fecam_task",
    "mahalanobis",
    "gradient",
    "gradient+entropy",
)
FITTED: dict[str, type[FeCAM] | type[Mahalanobis]] = {  # what methods need to be fitted before
    "fecam": FeCAM,
    "fecam_task": FeCAM,
    "mahalanobis": Mahalanobis,
}
_NEVER = -torch.inf  # the score of a task that can't be chosen


class Prediction(NamedTuple):
    """Per sample: the task chosen and that task's class, both (batch,) int64, and every task's score.

    score: (batch, tasks), the higher the likelier; the task chosen has the highest. Column t is task t's, or the t-th
        mask's where masks were given; a task that is not asked (removed, or not among the best of
        "gradient+entropy") has -inf. Scores of one method compare with each other, those of two don't.
    """

    task: Tensor
    label: Tensor
    score: Tensor

    @property
    def rejection(self) -> Tensor:
        """(batch,) how little a sample is like any of the tasks: minus the highest score. A threshold is for the user
        to choose, such as what 95 % of validation samples stay below."""
        return -self.score.max(-1).values

    def absolute(self, classes_per_task: int | Sequence[int]) -> Tensor:
        """(batch,) int64 class among all tasks' classes: classes_per_task * task + label.

        classes_per_task: or the number of classes of each task, removed ones included, where tasks differ in it.
        """
        if isinstance(classes_per_task, int):
            return classes_per_task * self.task + self.label
        before = torch.tensor([0, *classes_per_task], device=self.task.device).cumsum(0)
        return before[self.task] + self.label


@torch.no_grad()
def predict(
    model: TaskModel,
    x: Any,
    masks: Sequence[TaskMask] | None = None,
    *,
    method: str | None = None,
    select: Callable[[Any], Tensor] | None = None,
    k: int = 2,
    halving: bool = False,
    **kwargs: Any,
) -> Prediction:
    """The task, and the class within it, of every sample of a batch.

    Args:
        model: a HyperMask, in evaluation mode, as is usual for predictions.
        x: a batch for the target network; kwargs: what it takes besides.
        masks: from `model.all_masks()`, which spares making them for each batch; or of the tasks to choose from.
        method: of `METHODS`; None: "mahalanobis" where it was fitted, "entropy" otherwise.
            - "entropy": lowest softmax entropy; "max_softmax": highest probability of a class; "energy": highest
              logsumexp of the logits. One pass per task. Where tasks have different numbers of classes n, each is
              compared with what a uniform softmax of n classes gives: entropy / log n, log probability / log n,
              logsumexp - log n. (A task of one class has nothing to be unsure of: it is divided by 1.)
            - "fecam", "mahalanobis": nearest class of all tasks, which is also the label; "fecam_task": its task, and
              that task's argmax. One pass per task; `FeCAM.fit` or `Mahalanobis.fit` before.
            - "gradient": one task for the whole batch, by one pass under all masks at once; see `gradient.scores`.
              "gradient+entropy": the batch's k best by that, of which each sample takes that of lowest entropy.
        select: of what the network returns for one task, the (batch, classes) logits; by default it is the tensor that
            it returns, or its `logits`.
        k: for "gradient+entropy", from 1 to the number of tasks.
        halving: for "gradient": leave out the worse half of the tasks again and again, in log2(tasks) passes.

    Returns:
        Ids of tasks, whichever masks are given.

    Raises:
        InputError: no such method, one that is not fitted, k out of range, an empty batch.

    Source: HyperMask (arXiv 2310.00113) for entropy and FeCAM; Liu et al. (2020) for energy; SupSup, Wortsman et al.
        (2020), for the gradient.
    """
    return infer(model, (x,), kwargs, masks, method, select, k, halving)


@torch.no_grad()
def infer(
    model: TaskModel,
    inputs: tuple,
    kwargs: dict[str, Any],
    masks: Sequence[TaskMask] | None,
    method: str | None,
    select: Callable[[Any], Tensor] | None,
    k: int,
    halving: bool = False,
) -> Prediction:
    """`predict` for any inputs that the network takes."""
    if method is None:
        method = "mahalanobis" if "mahalanobis" in model.fitted else "entropy"
    if halving and method != "gradient":
        raise InputError(f"halving is for the gradient, not for {method}")
    masks = None if masks is None else masks_given(masks)
    _check(model, inputs, kwargs, method, k, len(model.tasks if masks is None else masks))
    if masks is None and model.heads() is None:
        model.output_layers(inputs, kwargs)  # a mask that was made before the first pass would not do
    if method in FITTED:
        return _by_distance(model, inputs, kwargs, masks, select, method)
    if method in ("gradient", "gradient+entropy"):
        return _by_gradient(model, inputs, kwargs, masks, select, k if method == "gradient+entropy" else None, halving)
    return _by_logits(model, inputs, kwargs, masks, select, method)


def _check(model: TaskModel, inputs: tuple, kwargs: dict[str, Any], method: str, k: int, tasks: int) -> None:
    if method not in METHODS:
        raise InputError(f"method must be one of {', '.join(METHODS)}, not {method!r}")
    if method in FITTED and FITTED[method].name not in model.fitted:
        kind = FITTED[method].__name__
        raise InputError(f"method {method} needs training data first: hmf.inference.{kind}.fit(model, data)")
    if method == "gradient+entropy" and (isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= tasks):
        raise InputError(f"k must be a whole number from 1 to the number of tasks, {tasks}, not {k!r}")
    if mixed.samples(inputs, kwargs) == 0:
        raise InputError("an empty batch has no task to infer: give it a sample or more")


def _ids(model: TaskModel, masks: Sequence[TaskMask] | None) -> list[int]:
    return list(model.tasks) if masks is None else [int(mask.task) for mask in masks]


def _logits(
    model: TaskModel,
    inputs: tuple,
    kwargs: dict[str, Any],
    masks: Sequence[TaskMask] | None,
    select: Callable[[Any], Tensor] | None,
) -> Tensor:
    """(rows, batch, classes) of every task's network, in rows as `forward_all_tasks` has them."""
    outputs = model.forward_all_tasks(*inputs, masks=masks, **kwargs)
    if select is None:
        return mixed.logits(outputs, None)
    rows = range(model.num_tasks if masks is None else len(masks))
    return torch.stack([mixed.logits(mixed.of_task(outputs, row), select) for row in rows])


def _by_logits(
    model: TaskModel,
    inputs: tuple,
    kwargs: dict[str, Any],
    masks: Sequence[TaskMask] | None,
    select: Callable[[Any], Tensor] | None,
    method: str,
) -> Prediction:
    logits = _logits(model, inputs, kwargs, masks, select)
    ids = None
    if masks is not None:
        ids = masks.ids() if isinstance(masks, TaskMasks) else torch.tensor(_ids(model, masks), device=logits.device)
    score = _sureness(logits, method, _log_classes(model, ids, logits))
    score = torch.where(score.isnan(), _NEVER, score)
    row = ops.entropy_select(logits) if method == "entropy" and _alike(model) else score.argmax(0)
    label = logits[row, torch.arange(len(row), device=row.device)].argmax(-1)
    return Prediction(row if ids is None else ids[row], label, score.T)


def _alike(model: TaskModel) -> bool:
    """Whether all tasks have the same number of classes."""
    return model.classes is None or len(set(model.classes)) == 1


def _log_classes(model: TaskModel, ids: Tensor | None, logits: Tensor) -> Tensor | None:
    """(rows, 1) logarithm of how many classes each row's task has; None where all have the same number.

    ids: (rows,) int64 of the tasks; None for all of the model's.
    """
    if model.classes is None or _alike(model):
        return None
    counts = torch.tensor(model.classes, device=logits.device, dtype=torch.promote_types(logits.dtype, torch.float32))
    return (counts if ids is None else counts[ids]).log().unsqueeze(1)


def _sureness(logits: Tensor, method: str, log_classes: Tensor | None) -> Tensor:
    """(rows, batch) how sure each task's softmax is, by entropy, max_softmax or energy; see `predict`."""
    if log_classes is not None:
        logits = logits.to(log_classes.dtype)
    if method == "energy":
        energy = logits.logsumexp(-1)
        return energy if log_classes is None else energy - log_classes
    score = -_entropy(logits) if method == "entropy" else logits.log_softmax(-1).max(-1).values
    return score if log_classes is None else score / torch.where(log_classes == 0, 1, log_classes)


def _entropy(logits: Tensor) -> Tensor:
    """-sum_c p log p of a softmax over the last dimension, with 0 log 0 = 0."""
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    return -torch.where(p == 0, 0.0, p * log_p).sum(-1)


def _by_distance(
    model: TaskModel,
    inputs: tuple,
    kwargs: dict[str, Any],
    masks: Sequence[TaskMask] | None,
    select: Callable[[Any], Tensor] | None,
    method: str,
) -> Prediction:
    fitted: ClassGaussians = model.fitted[FITTED[method].name]
    ids = _ids(model, masks)
    fitted.check(model, ids)
    nearest, labels = [], []
    for task, mask in zip(ids, model.all_masks(ids) if masks is None else masks, strict=True):
        features, output = features_of(model, mask, fitted.layer, inputs, kwargs)
        distance, label = fitted.nearest(features, task)
        nearest.append(distance)
        labels.append(mixed.logits(output, select).argmax(-1) if method == "fecam_task" else label)
    score = -torch.stack(nearest)
    return _chosen(model, ids, score, torch.stack(labels), spread=masks is None)


def _by_gradient(
    model: TaskModel,
    inputs: tuple,
    kwargs: dict[str, Any],
    masks: Sequence[TaskMask] | None,
    select: Callable[[Any], Tensor] | None,
    k: int | None,
    halving: bool,
) -> Prediction:
    ids = _ids(model, masks)
    masks_of = model.all_masks(ids) if masks is None else masks
    of_batch = gradient.scores(model, inputs, kwargs, masks_of, select, halving)
    best = of_batch.topk(k or 1).indices.tolist()
    logits = _logits(model, inputs, kwargs, [masks_of[i] for i in best], select)
    if k is None:
        score = of_batch[:, None].expand(-1, logits.shape[1])
    else:
        chosen = torch.tensor([ids[i] for i in best], device=logits.device)
        of_best = _sureness(logits, "entropy", _log_classes(model, chosen, logits))
        score = of_best.new_full((len(ids), logits.shape[1]), _NEVER)
        score[best] = of_best
    labels = score.new_zeros(score.shape, dtype=torch.int64)
    labels[best] = logits.argmax(-1)
    return _chosen(model, ids, score, labels, spread=masks is None)


def _chosen(model: TaskModel, ids: Sequence[int], score: Tensor, labels: Tensor, spread: bool) -> Prediction:
    """The task of the highest score, from score and labels (rows, batch), whose rows are these tasks'."""
    row = score.argmax(0)
    label = labels.gather(0, row[None])[0]
    task = torch.tensor(list(ids), device=row.device)
    if spread and len(ids) < model.num_tasks:
        score = score.new_full((model.num_tasks, score.shape[1]), _NEVER).index_copy(0, task, score)
    return Prediction(task[row], label, score.T)
