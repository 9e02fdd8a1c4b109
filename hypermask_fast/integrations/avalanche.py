"""HyperMask as a model and a strategy of Avalanche, beside its benchmarks, metrics, plugins and checkpoints.

    model = HyperMaskModule(hmf.HyperMask(net, num_tasks=5, sparsity=30))
    strategy = HyperMaskStrategy(model=model, optimizer=hmf.optim.Adam(model, lr=1e-3), train_mb_size=128)
    for experience in benchmark.train_stream:
        strategy.train(experience)
        strategy.eval(benchmark.test_stream)

Needs avalanche-lib: pip install "hypermask-fast[avalanche]".
"""

import inspect
import weakref
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
from .avalanche_model import HOW_TO_LABEL, HyperMaskModule, classes_of, labels_of, number_of, origin_of

with needed_for("the Avalanche adapter", "avalanche"):
    from avalanche.training.templates import SupervisedTemplate

__all__ = ["HyperMaskModule", "HyperMaskStrategy"]


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
        self._mask: TaskMask | None = None  # of the step that is under way
        self._label: int | None = None  # of a batch of one task
        self._unpacked: tuple[int, Any] = (0, None)  # of the batch as it came: how many samples, and their task labels
        self._candidates: Sequence[TaskMask] = ()  # of the tasks to find a sample's among

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes the state of a pickle, also of one from before the model kept what has begun."""
        self.__dict__.update({"_unpacked": (0, None), **state})
        self.model.unlabelled = False
        if "_task" in state:
            self.model.begun = self.__dict__.pop("_task"), self.__dict__.pop("_begun_by")
            self.model.outputs = self.__dict__.pop("_outputs", None)

    # -- where an experience begins -------------------------------------------------------------------------------

    def check_model_and_optimizer(self, reset_optimizer_state: bool | None = None, **kwargs: Any) -> None:
        """Avalanche's, before it trains on an experience; also begins the experience's task.

        reset_optimizer_state: whether the optimizer forgets its moments; None: where a new task begins.
        """
        task, number = self._task_to_train(), number_of(self.experience)
        if self.model.outputs is None and classes_of(self.experience) is not None:
            self.model.outputs = self._shown_outputs()
        self._check_classes(task, self.model.outputs)
        begins = (task, number) != self.model.begun
        fresh = begins if reset_optimizer_state is None else reset_optimizer_state
        super().check_model_and_optimizer(reset_optimizer_state=fresh, **kwargs)
        anchor = self.model.hypermask.anchor
        if anchor is None or anchor.task != task:
            self.model.hypermask.begin_task(task)
        self.model.begun, self.model.begun_with = (task, number), weakref.ref(origin_of(self.experience))
        self.model.unlabelled = self.task_inference is not None and labels_of(self.experience) != [task]

    def _shown_outputs(self) -> int | None:
        """How many outputs the network has, as a pass of one sample shows; None where such a pass can't be made."""
        model, data = self.model.hypermask, self.experience.dataset.eval()
        modes = {module: module.training for module in model.modules()}
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                return model.eval()(data[0][0][None].to(self.device), task=model.tasks[-1]).shape[1]
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
            return None  # a plugin, or a collate_fn, may make of the data set's samples what the network takes
        finally:
            for module, mode in modes.items():
                module.training = mode

    def _task_to_train(self) -> int:
        """The task of the experience that training begins. Raises InputError where it can't be trained now."""
        number = number_of(self.experience)
        if self.task_inference is not None:
            task = number
        else:
            labels = labels_of(self.experience)
            if not labels:
                raise InputError(f"experience {number} has no task labels: {HOW_TO_LABEL}")
            if len(labels) > 1:
                raise InputError(
                    f"experience {number} has task labels {', '.join(map(str, labels))}: HyperMask trains one task "
                    "after another, one per experience"
                )
            (task,) = labels
        begun, with_it = self.model.begun, self.model.begun_with
        if task == begun[0] and number != begun[1]:
            raise InputError(
                f"experience {number} has task label {task}, which experience {begun[1]} had, whose classes its "
                f"mask would forget: {HOW_TO_LABEL}"
            )
        if task == begun[0] and with_it is not None and with_it() is not origin_of(self.experience):
            raise InputError(
                f"experience {number} is of another benchmark than the one that task {task} began with, whose data its "
                f"mask would forget: go on with that benchmark, or count this one's tasks from {task + 1}"
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
            model.need_task(number_of(self.experience), classes_of(self.experience))
            model.known_train_tasks_labels.add(number_of(self.experience))
        return model.to(self.device)

    def _before_training_exp(self, **kwargs: Any) -> None:
        super()._before_training_exp(**kwargs)
        parts = getattr(self.dataloader, "datasets", ())  # where replay has put in its memory
        if self.model.unlabelled and sum(map(len, parts)) > len(self.experience.dataset):
            self._refuse_rehearsal()

    def _refuse_rehearsal(self) -> None:
        raise InputError(
            f"experience {number_of(self.experience)} is trained together with samples of others, whose tasks are not "
            "told: give the benchmark task labels (return_task_id=True, task_labels=True), or train without replay"
        )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().train(*args, **kwargs)
        finally:
            self.model.unlabelled = False

    # -- a step -----------------------------------------------------------------------------------------------------

    def _unpack_minibatch(self) -> None:
        told = self.task_inference is None or (self.is_training and not self.model.unlabelled)
        labels = self.mbatch[-1] if told and len(self.mbatch) > 2 else None
        if labels is not None:  # looked at before they are on the GPU: no wait for it
            self._label = int(labels[0]) if bool((labels == labels[0]).all()) else None
            self._check_labels(self.mbatch[1], labels)
        super()._unpack_minibatch()
        self._unpacked = len(self.mb_x), self.mbatch[-1]

    def forward(self) -> Any:
        """The outputs on the current batch: in training under one mask, which the regulariser then takes as well."""
        output = self._trained_outputs() if self.is_training else self._evaluated_outputs()
        self._check_classes(self.model.begun[0] if self.is_training else None, output.shape[1])
        if self.is_training:
            self.model.outputs = output.shape[1]
        return output

    def _trained_outputs(self) -> Any:
        model, task = self.model.hypermask, self.model.begun[0]
        count, labels = self._unpacked
        if self.model.unlabelled and len(self.mb_x) > count:
            self._refuse_rehearsal()
        self._find_heads()
        self._mask = model.mask(task)
        alone = self._label == task and self.mbatch[-1] is labels  # no plugin has put in other samples
        return model(self.mb_x, self._mask if self.model.unlabelled or alone else self.mb_task_id)

    def _evaluated_outputs(self) -> Any:
        model = self.model.hypermask
        if self.task_inference is None:
            told = self._label is None or self.mbatch[-1] is not self._unpacked[1]
            return self.model(self.mb_x, self.mb_task_id if told else self._label)
        if not self._candidates:
            self._find_heads()
            trained = [task for task in model.tasks if task <= self.model.last_task()]
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
        needed, counts = classes_of(self.experience), self.model.hypermask.classes
        if counts is not None and task is not None and task < len(counts):
            outputs = counts[task]
        if needed is not None and outputs is not None and needed > outputs:
            raise InputError(
                f"experience {number_of(self.experience)} has class {needed - 1}, and the network {outputs} outputs: "
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
                f"experience {number_of(self.experience)} has class {int(y[beyond][0])} in task {task}, which has "
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
