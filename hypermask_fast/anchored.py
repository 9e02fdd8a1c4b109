"""Regularisers of a model: what its tasks compare with, from when, and both drifts."""

import functools
from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from . import ops, regularizers
from .errors import InputError
from .life import TaskLife
from .masking.masks import TaskMask, is_another
from .output_layer import Pending
from .regularizers import Anchor, DriftConfig, Drifts
from .transforming import transforming


def without_autocast(method: Callable) -> Callable:
    """For who has autocast on around a whole forward pass: logits, thresholds and drifts keep their dtype."""

    @functools.wraps(method)
    def in_own_dtype(self: "Anchored", *args, **kwargs):
        kind = self.hypernet.output.weight.device.type
        # Of meta tensors there is none. Where it is off, as in most steps, turning it off is most of a small op's time.
        if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
            return method(self, *args, **kwargs)
        with torch.autocast(kind, enabled=False):
            return method(self, *args, **kwargs)

    return in_own_dtype


class Anchored(TaskLife):
    """Tasks with an anchor: how things stood as the task that is being trained began.

    Attributes:
        drift: strength and kind of both regularisers.
    """

    drift: DriftConfig

    @abstractmethod
    def mask(self, task: int | Tensor) -> TaskMask:
        """The mask of one task."""

    def _check_mask(self, mask: TaskMask) -> None:
        """Raises InputError for a mask that is another model's, or of a task that has been removed meanwhile."""
        if torch.compiler.is_compiling():
            return
        weights = self.weights()
        if len(weights) != len(mask.weights) or any(map(is_another, weights, mask.weights)):
            raise InputError(
                "the mask was made by another model, or of other weights than this model's now: make it anew, "
                "mask = model.mask(task)"
            )
        if not isinstance(mask.task, Tensor) and mask.task in self.hypernet.removed:
            self._check_task(mask.task)

    def _anchor_in_training(self, task: int) -> Anchor | None:
        """The anchor of the task that is being trained; None of any other."""
        anchor = self.anchor
        if anchor is None or anchor.task != task:
            return None
        return anchor if torch.is_grad_enabled() else None

    def begin_task(self, task: int) -> None:
        """Captures what the regularisers of task t compare with: output of tasks 0..t-1 and the weights, as of now.

        `regularizer` does this by itself at its first call for a task; call it where another moment is meant.
        """
        self.anchor = self._captured(task)

    def _captured(self, task: int) -> Anchor:
        task = self._check_task(task)
        return regularizers.anchor(self.hypernet, self.layout, self.weights(), task)

    def _anchor_of(self, task: int) -> Anchor:
        anchor = self.anchor
        if anchor is not None and task < anchor.task:
            raise InputError(
                f"the drifts of task {task} compare with how things stood as it began, which is gone since task "
                f"{anchor.task} began: begin_task({task}) begins it anew"
            )
        if anchor is None or anchor.task != task:
            anchor = self.anchor = self._captured(task)
        return anchor

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Anchored":
        """Moves the anchor with the Parameters, wherever nn.Module takes them, and what is fitted to their device."""
        super()._apply(fn, recurse)
        for fitted in self.fitted.values():
            fitted.to(self.weights()[0].device)
        if self.anchor is not None:
            self.anchor = self.anchor.map(fn)
        return self

    @without_autocast
    def drifts(self, task: int | TaskMask, tasks: int | None = None) -> Drifts:
        """R = sum_{j<t} ||h*(e*_j) - h(e_j)||^2 and D = sum_s ||(W_s - W_prev_s) m_s||_norm, unscaled.

        Args:
            task: the task being trained, or its mask, which spares generating it again.
            tasks: see `regularizer`.

        Raises:
            InputError: `tasks` is no positive integer, or the mask's R is over another number of tasks.
        """
        if isinstance(task, TaskMask):
            mask, number = task, int(task.task)
            self._check_mask(mask)
        else:
            mask, number = None, self._check_task(task)
        before, anchor = self.anchor, self._anchor_of(number)
        drawn = self._drawn_for(mask, number, tasks)
        if mask is None and self.drift.masked:
            mask = self.mask(number)
        weight = None if mask is None else mask.weight_drift(anchor.weights)
        if weight is None:
            of_mask = mask if self.drift.masked else None
            logits, thresholds = (None, None) if of_mask is None else (of_mask.logits, of_mask.thresholds)
            scale = self.drift.weight_scale(self.position(anchor.task))
            with torch.set_grad_enabled(torch.is_grad_enabled() and scale > 0):
                weights = [weight.to(anchor.weights.dtype) for weight in self.weights()]
                weight = ops.weight_drift(
                    weights, anchor.weights, self.layout.offsets, self.drift.norm, logits, thresholds
                )
        if mask is not None and mask.output_drift is not None:
            return Drifts(mask.output_drift, weight)
        earlier = None if mask is None else mask.earlier
        stepper = self.hypernet.stepper
        if anchor is not before and stepper is not None:
            return Drifts(self._nothing_yet(anchor), weight)
        output = regularizers.output_drift(self.hypernet, anchor, earlier, drawn)
        if stepper is not None and output.requires_grad:
            pending = Pending()  # held by the graph: it gives the output layer a gradient of its own
            output.register_hook(lambda grad, _held=pending: None)
            stepper.announce(pending)
        return Drifts(output, weight)

    def _nothing_yet(self, anchor: Anchor) -> Tensor:
        """R as a task begins: 0, with gradients of 0 but for the output layer's, which would be all of N x H."""
        earlier = [self.hypernet.embeddings[task] for task in self.hypernet.tasks(anchor.task)[:-1]]
        return sum((0 * embedding.sum() for embedding in earlier), anchor.weights.new_zeros(()))

    def _drawn_for(self, mask: TaskMask | None, task: int, tasks: int | None) -> Tensor | None:
        """Which earlier tasks R is over: those that the mask's own is, or else as many as are asked for."""
        regularizers.check_drift_tasks(tasks)
        if mask is None or (mask.output_drift is None and mask.drawn is None):
            asked = mask.drift_tasks if mask is not None and tasks is None else tasks
            return regularizers.draw(self.hypernet, task, asked)
        earlier = len(self.hypernet.tasks(task)) - 1
        made = earlier if mask.drawn is None else len(mask.drawn)
        if tasks is not None and min(tasks, earlier) != made:
            raise InputError(
                f"the output drift of {tasks} tasks was asked for, and this mask has been made with that of {made}: "
                f"model.mask({task}, drift_tasks={tasks}) draws them"
            )
        return mask.drawn

    def regularizer(self, task: int | TaskMask, tasks: int | None = None) -> Tensor:
        """beta R / t + lam D, what task t > 0 adds to its cross-entropy; 0 for the first task.

        R = sum_{j<t} ||h*(e*_j) - h(e_j)||^2 is the output drift of the earlier tasks' logits and D = ||(W - W*) m||
        the weight drift, both since the task began (the stars). The official fidelity divides R by t^2.

        Args:
            task: the task being trained, or its mask, which spares generating it again.
            tasks: K, R over so many of the t earlier tasks alone, drawn anew without replacement from PyTorch's default
                generator, times t / K: value and gradients are R's on average. None: all, or as many as the mask was
                made with. Where `optim.Adam` steps the output layer, R comes with the mask, which then is to be made
                with the same number: `model.mask(task, drift_tasks=K)`.

        Returns:
            Scalar with gradient to both networks and all embeddings of tasks 0..t (0 of those that were not drawn). The
            first task's has none to give; `backward()` may be called on it all the same.

        Raises:
            InputError: `tasks` is no positive integer, or the mask's R is over another number of tasks.
        """
        drifts = self.drifts(task, tasks)
        assert self.anchor is not None, "drifts made it"
        position = self.position(self.anchor.task)
        loss = self.drift.loss(drifts, position) if position else drifts.weight.new_zeros(())
        if torch.is_grad_enabled() and not (loss.requires_grad or torch.compiler.is_compiling() or transforming()):
            loss.requires_grad_()  # backward() from it alone finds nothing to do, and does not fail
        return loss
