"""HyperMask as a model of Avalanche, and what its experiences say of their tasks, classes and benchmark."""

import weakref
from typing import Any

from torch import Tensor

from ..errors import InputError
from ..extras import needed_for
from ..model import HyperMask

with needed_for("the Avalanche adapter", "avalanche"):
    from avalanche.models import DynamicModule, MultiTaskModule

HOW_TO_LABEL = (
    "give the benchmark task labels (return_task_id=True, task_labels=True), or have tasks inferred: "
    'HyperMaskStrategy(..., task_inference="entropy")'
)


class HyperMaskModule(MultiTaskModule):
    """A HyperMask model as Avalanche's MultiTaskModule: a task label is the model's task of the same number.

    Samples of several tasks pass in one call of the model. Where training meets the label that follows the model's last
    task, the model gets that task; Avalanche tells the optimizer. All strategies that train it share its attributes.

    Args:
        hypermask: the model; its attributes stay its own: `module.hypermask.export(task)`.

    Attributes:
        begun: the last task that training began, and the number of its experience; -1 before the first.
        begun_with: refers to the benchmark of that experience; None where it isn't known, as after a checkpoint.
        outputs: how many the network has, as a pass has shown; None before the first.
        unlabelled: whether an experience is being trained whose task labels are not the model's tasks.

    Raises:
        InputError: it is no HyperMask, or there are modules in its network that Avalanche changes from task to task.
    """

    # At the class, where models that were pickled before these were there find them.
    begun: tuple[int, int] = (-1, -1)
    begun_with: "weakref.ref[Any] | None" = None
    outputs: int | None = None
    unlabelled: bool = False

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

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "begun_with"}  # no pickle refers to it

    def last_task(self) -> int:
        """The last task that has begun, here or before the model came here; -1 where none is known to have."""
        anchor = self.hypermask.anchor
        return self.begun[0] if anchor is None else max(self.begun[0], anchor.task)

    def adaptation(self, experience: Any) -> None:
        """Called by Avalanche before each experience: adds its task where training begins it.

        Raises:
            InputError: a task label that the model has no task for. In training one task more than it has is no such.
        """
        labels = labels_of(experience)
        if labels is None:
            raise InputError(f"experience {number_of(experience)} has no task labels: {HOW_TO_LABEL}")
        for label in labels:
            self.need_task(label, classes_of(experience))
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
            InputError: a label that the model has no task for; on a GPU, where labels are not looked at, NaN. Or a
                plugin's pass, while a strategy trains by task_inference on a benchmark without task labels.
        """
        if task_labels is None:
            return self.forward_all_tasks(x)
        if self.unlabelled:
            raise InputError(
                "a plugin passes samples under their task labels, which in this benchmark are not the model's tasks: "
                "give the benchmark task labels (return_task_id=True, task_labels=True), or leave the plugin out"
            )
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


def labels_of(experience: Any) -> list[int] | None:
    """The task labels of an experience; None where it has none."""
    labels = getattr(experience, "task_labels", None)
    return None if labels is None else sorted({int(label) for label in labels})


def classes_of(experience: Any) -> int | None:
    """How many outputs its class labels need; None where it doesn't say, as parts of an experience don't."""
    classes = getattr(experience, "classes_in_this_experience", None)
    return None if classes is None else max(classes) + 1


def number_of(experience: Any) -> int:
    """The number of an experience in its stream; of a part of one (OnlineCLExperience) that of the whole."""
    return getattr(experience, "origin_experience", experience).current_experience


def origin_of(experience: Any) -> Any:
    """What tells an experience's benchmark from others: itself or, where streams name none, the experience's data."""
    whole = getattr(experience, "origin_experience", experience)
    try:
        benchmark = whole.origin_stream.benchmark
    except (AttributeError, AssertionError):  # how Avalanche says that it is of no stream
        benchmark = None
    return whole.dataset if benchmark is None else benchmark
