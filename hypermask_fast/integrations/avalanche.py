"""HyperMask as a model and a strategy of Avalanche, beside its benchmarks, metrics, plugins and checkpoints.

    model = HyperMaskModule(hmf.HyperMask(net, num_tasks=5, sparsity=30))
    strategy = HyperMaskStrategy(model=model, optimizer=hmf.optim.Adam(model, lr=1e-3), train_mb_size=128)
    for experience in benchmark.train_stream:
        strategy.train(experience)
        strategy.eval(benchmark.test_stream)

Needs avalanche-lib: pip install "hypermask-fast[avalanche]".
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import inference
from ..errors import InputError
from ..extras import needed_for
from ..masking.masks import TaskMask
from ..model import HyperMask

with needed_for("the Avalanche adapter", "avalanche"):
    from avalanche.models import DynamicModule, MultiTaskModule
    from avalanche.training.templates import SupervisedTemplate

__all__ = ["HyperMaskModule", "HyperMaskStrategy"]

_HOW_TO_LABEL = (
    "give the benchmark task labels (return_task_id=True, task_labels=True), or have tasks inferred: "
    'HyperMaskStrategy(..., task_inference="entropy")'
)


class HyperMaskModule(MultiTaskModule):
    """A HyperMask model as Avalanche's MultiTaskModule: a task label is the model's task of the same number.

    Samples of several tasks pass in one call of the model. Where training meets the label that follows the model's last
    task, the model gets that task; Avalanche tells the optimizer.

    Args:
        hypermask: the model; its attributes stay its own: `module.hypermask.export(task)`.

    Raises:
        InputError: it is no HyperMask, or there are modules in its network that Avalanche changes from task to task.
    """

    def __init__(self, hypermask: HyperMask) -> None:
        if not isinstance(hypermask, HyperMask):
            raise InputError(
                f"HyperMaskModule takes a model, HyperMask(net, num_tasks=...), not {type(hypermask).__name__}"
            )
        for path, module in hypermask.net.named_modules():
            if isinstance(module, DynamicModule):
                raise InputError(
                    f"Avalanche changes {path or 'the network'} ({type(module).__name__}) from task to task: HyperMask "
                    "masks a plain network with one head (per_task=['head.*'] gives each task its own)"
                )
        super().__init__()
        self.hypermask = hypermask

    def adaptation(self, experience: Any) -> None:
        """Called by Avalanche before each experience: adds its task where training begins it.

        Raises:
            InputError: a task label that the model has no task for. In training one task more than it has is no such.
        """
        labels = _labels_of(experience)
        if labels is None:
            raise InputError(f"experience {_number(experience)} has no task labels: {_HOW_TO_LABEL}")
        for label in labels:
            self.need_task(label, _classes_of(experience))
        if self.training:
            self.known_train_tasks_labels.update(labels)

    def need_task(self, task: int, classes: int | None) -> None:
        """In training mode adds the task if it is the next one.

        Args:
            classes: how many it has then, in a model that was given `classes`.

        Raises:
            InputError: the model has no such task.
        """
        model = self.hypermask
        if task in model.tasks:
            return
        if self.training and task == model.num_tasks:
            model.add_task(classes=None if model.classes is None else classes)
            return
        there = ", ".join(map(str, model.tasks))
        if 0 <= task < model.num_tasks:
            raise InputError(f"task {task} was removed: this model has tasks {there}")
        known = f"no task for task label {task}: this model has tasks {there}"
        if self.training:
            raise InputError(f"{known}, and the next label in training is {model.num_tasks}")
        raise InputError(f"{known}; HyperMask(net, num_tasks=...) can have tasks that are trained later")

    def forward(self, x: Tensor, task_labels: Tensor | int | None) -> Tensor | dict[int, Tensor]:
        """Outputs of the network under the masks of the samples' tasks.

        Args:
            x: (batch, ...).
            task_labels: (batch,) int64, one per sample, in any order; or an int for the whole batch.

        Returns:
            (batch, outputs). Where task_labels is None: {task label: its outputs}, of all that were trained here.

        Raises:
            InputError: a label that the model has no task for; on a GPU, where labels are not looked at, NaN.
        """
        if task_labels is None:
            return self.forward_all_tasks(x)
        return self.hypermask(x, task=task_labels)

    def forward_single_task(self, x: Tensor, task_label: int) -> Tensor:
        return self.hypermask(x, task=task_label)

    def forward_all_tasks(self, x: Tensor) -> dict[int, Tensor]:
        """{task label: (batch, outputs)}, of all labels that were trained here."""
        labels = sorted(self.known_train_tasks_labels)
        if not labels:
            return {}
        outputs = self.hypermask.forward_all_tasks(x, masks=self.hypermask.all_masks(labels))
        return dict(zip(labels, outputs, strict=True))


class HyperMaskStrategy(SupervisedTemplate):
    """Trains a HyperMaskModule: loss = criterion(y, labels) + beta R / t + lam D, one mask per step serving both.

    Each experience is a task of its own. When it begins, the model's regularisers begin to compare with the model as it
    is then (`HyperMask.begin_task`), and the optimizer forgets its moments. Everything else is Avalanche's.

    Args:
        model: a HyperMaskModule.
        optimizer: of this model, such as hmf.optim.Adam(model); its learning rate and settings are kept.
        task_inference: None: task labels say which task a sample is of. Or a method of `inference.METHODS`, for
            benchmarks without task labels: then experience 0, 1, ... is task 0, 1, ... in training, and in evaluation
            the model finds each sample's task among those trained so far. Labels are absolute then, so the network has
            an output for every class of the benchmark.
        settings: of avalanche.training.templates.SupervisedTemplate (train_mb_size, train_epochs, evaluator, ...).

    Raises:
        InputError: another model or optimizer, or no such method. In training: an experience without a task label or
            with several, or whose task has been trained before others, which only a later task's mask holds.

    Source: HyperMask (arXiv 2310.00113).
    """

    model: HyperMaskModule

    def __init__(
        self, *, model: HyperMaskModule, optimizer: Optimizer, task_inference: str | None = None, **settings: Any
    ) -> None:
        if isinstance(model, HyperMask):
            raise InputError("the strategy takes the model as one of Avalanche: model=HyperMaskModule(model)")
        if not isinstance(model, HyperMaskModule):
            raise InputError(f"the strategy takes a HyperMaskModule, not {type(model).__name__}")
        _check_optimizer(optimizer, model)
        if task_inference is not None and task_inference not in inference.METHODS:
            methods = ", ".join(inference.METHODS)
            raise InputError(f"task_inference must be one of {methods}, or None, not {task_inference!r}")
        super().__init__(model=model, optimizer=optimizer, **settings)
        self.task_inference = task_inference
        self._task, self._begun_by = -1, -1  # the last task that began, and the number of its experience
        self._mask: TaskMask | None = None  # of the step that is under way
        self._label: int | None = None  # of a batch of one task
        self._candidates: Sequence[TaskMask] = ()  # of the tasks to find a sample's among
        self._outputs: int | None = None  # of the network, as its last pass in training showed

    # -- where an experience begins -------------------------------------------------------------------------------

    def check_model_and_optimizer(self, reset_optimizer_state: bool | None = None, **kwargs: Any) -> None:
        """Avalanche's, before it trains on an experience; also begins the experience's task.

        reset_optimizer_state: whether the optimizer forgets its moments; None: where a new task begins.
        """
        task, number = self._task_to_train(), _number(self.experience)
        self._check_classes(task, self._outputs)
        begins = (task, number) != (self._task, self._begun_by)
        fresh = begins if reset_optimizer_state is None else reset_optimizer_state
        super().check_model_and_optimizer(reset_optimizer_state=fresh, **kwargs)
        anchor = self.model.hypermask.anchor
        if anchor is None or anchor.task != task:
            self.model.hypermask.begin_task(task)
        self._task, self._begun_by = task, number

    def _task_to_train(self) -> int:
        """The task of the experience that training begins. Raises InputError where it can't be trained now."""
        number = _number(self.experience)
        if self.task_inference is not None:
            task = number
        else:
            labels = _labels_of(self.experience)
            if not labels:
                raise InputError(f"experience {number} has no task labels: {_HOW_TO_LABEL}")
            if len(labels) > 1:
                raise InputError(
                    f"experience {number} has task labels {', '.join(map(str, labels))}: HyperMask trains one task "
                    "after another, one per experience"
                )
            (task,) = labels
        if task == self._task and number != self._begun_by:
            raise InputError(
                f"experience {number} has task label {task}, which experience {self._begun_by} had, whose classes its "
                f"mask would forget: {_HOW_TO_LABEL}"
            )
        anchor = self.model.hypermask.anchor
        if anchor is not None and task < anchor.task:
            raise InputError(
                f"experience {number} is of task {task}, and task {anchor.task} has been trained: only tasks that come "
                "before the trained one are held, so labels must ascend in the order of training"
            )
        return task

    def model_adaptation(self, model: Any = None) -> Any:
        if self.task_inference is None:
            return super().model_adaptation(model)
        model = self.model if model is None else model
        if self.is_training:
            model.need_task(_number(self.experience), _classes_of(self.experience))
        return model.to(self.device)

    # -- a step -----------------------------------------------------------------------------------------------------

    def _unpack_minibatch(self) -> None:
        labels = self.mbatch[-1] if self.task_inference is None and len(self.mbatch) > 2 else None
        if labels is not None:  # looked at before they are on the GPU: no wait for it
            self._label = int(labels[0]) if bool((labels == labels[0]).all()) else None
            self._check_labels(self.mbatch[1], labels)
        super()._unpack_minibatch()

    def forward(self) -> Any:
        """The outputs on the current batch: in training under one mask, which the regulariser then takes as well."""
        output = self._trained_outputs() if self.is_training else self._evaluated_outputs()
        self._check_classes(self._task if self.is_training else None, output.shape[1])
        if self.is_training:
            self._outputs = output.shape[1]
        return output

    def _trained_outputs(self) -> Any:
        model = self.model.hypermask
        self._find_heads()
        self._mask = model.mask(self._task)
        alone = self.task_inference is not None or self._label == self._task
        return model(self.mb_x, self._mask if alone else self.mb_task_id)

    def _evaluated_outputs(self) -> Any:
        model = self.model.hypermask
        if self.task_inference is None:
            return self.model(self.mb_x, self.mb_task_id if self._label is None else self._label)
        if not self._candidates:
            self._find_heads()
            trained = [task for task in model.tasks if task <= self._task]
            self._candidates = model.all_masks(trained or model.tasks)
        found = inference.predict(model, self.mb_x, self._candidates, method=self.task_inference)
        return model(self.mb_x, found.task)

    def _find_heads(self) -> None:
        """Has the model find its output layer, where it isn't known: a mask made before its first pass would not do."""
        if self.model.hypermask.heads() is None:
            self.model.hypermask.output_layers((self.mb_x,), {})

    def _check_classes(self, task: int | None, outputs: int | None) -> None:
        """Raises InputError where a class of the experience is none of the network's outputs, or not of the task's.

        task: that is trained; None in evaluation. outputs: None where they are not known yet.
        """
        needed, counts = _classes_of(self.experience), self.model.hypermask.classes
        if counts is not None and task is not None and task < len(counts):
            outputs = counts[task]
        if needed is not None and outputs is not None and needed > outputs:
            raise InputError(
                f"experience {_number(self.experience)} has class {needed - 1}, and the network {outputs} outputs: "
                "count classes from 0 in each experience (class_ids_from_zero_in_each_exp=True), or give each an output"
            )

    def _check_labels(self, y: Any, tasks: Tensor) -> None:
        """Raises InputError where a sample's class is not one of its task's, in a model that was given `classes`."""
        counts = self.model.hypermask.classes
        if counts is None or not isinstance(y, Tensor) or y.shape != tasks.shape or y.is_floating_point():
            return
        if int(tasks.min()) < 0 or int(tasks.max()) >= len(counts):
            return  # the pass refuses them
        beyond = y >= torch.tensor(counts, device=tasks.device)[tasks]
        if bool(beyond.any()):
            task = int(tasks[beyond][0])
            raise InputError(
                f"experience {_number(self.experience)} has class {int(y[beyond][0])} in task {task}, which has "
                f"{counts[task]}: count classes from 0 in each experience (class_ids_from_zero_in_each_exp=True), or "
                "give the task more, HyperMask(..., classes=[...])"
            )

    def criterion(self) -> Tensor:
        """Avalanche's; in training with the regulariser: + beta R / t + lam D."""
        loss = super().criterion()
        if self.is_training and self._mask is not None:
            loss = loss + self.model.hypermask.regularizer(self._mask)
        return loss

    # -- what is over -----------------------------------------------------------------------------------------------

    def _train_cleanup(self) -> None:
        super()._train_cleanup()
        self._mask = None  # its graph is not for a checkpoint

    def _before_eval(self, **kwargs: Any) -> None:
        self._candidates = ()  # an evaluation that was interrupted has left its own
        super()._before_eval(**kwargs)

    def _eval_cleanup(self) -> None:
        super()._eval_cleanup()
        self._candidates = ()


def _labels_of(experience: Any) -> list[int] | None:
    """The task labels of an experience; None where it has none."""
    labels = getattr(experience, "task_labels", None)
    return None if labels is None else sorted({int(label) for label in labels})


def _classes_of(experience: Any) -> int | None:
    """How many outputs its class labels need; None where it doesn't say, as parts of an experience don't."""
    classes = getattr(experience, "classes_in_this_experience", None)
    return None if classes is None else max(classes) + 1


def _number(experience: Any) -> int:
    """The number of an experience in its stream; of a part of one (OnlineCLExperience) that of the whole."""
    return getattr(experience, "origin_experience", experience).current_experience


def _check_optimizer(optimizer: Any, model: HyperMaskModule) -> None:
    if not isinstance(optimizer, Optimizer):
        raise InputError(f"optimizer must be one of this model, such as hmf.optim.Adam(model), not {optimizer!r:.80}")
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise InputError(
            f"{type(optimizer).__name__} needs a closure for each step, and Avalanche gives none: take an optimizer "
            "such as hmf.optim.Adam(model)"
        )
    own = {id(parameter) for parameter in model.parameters()}
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not trained <= own:
        raise InputError("the optimizer trains Parameters that are not this model's: make it hmf.optim.Adam(model)")
