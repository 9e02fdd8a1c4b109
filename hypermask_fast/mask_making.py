"""How a model makes its tasks' masks: from a task's id over the hypernetwork to thresholds."""

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from . import ops, regularizers
from .anchored import Anchored, without_autocast
from .errors import InputError
from .life import is_id
from .masking.layout import MaskLayout
from .masking.masks import TaskMask
from .masking.scope import unhooked
from .masking.task_batch import TaskMasks
from .ops import registry
from .output_layer import OutputStepper
from .ranks import in_a_group
from .transforming import stands_for_others, transforming
from .wrapping import active_ddp, check_whole


class GradientReducer(Protocol):
    """Who averages the target network's gradients over processes; see `distributed.reducer.Reducer`."""

    def watch(self) -> None: ...

    def passes(self) -> None: ...

    def follow(self, mask: TaskMask) -> None: ...

    def check_same_tasks(self, tasks: Sequence[int], count: int, training: bool) -> None: ...


_TOGETHER = 32  # tasks that one read of a dense output layer serves, by the extension


class MaskMaking(Anchored):
    """Tasks with an anchor, and their masks.

    Attributes:
        reducer: averages the gradients of the target network over processes; None for one process.
    """

    reducer: GradientReducer | None = None
    _said_alone = False
    _ranks: dict[tuple[MaskLayout, float, torch.device], Tensor]

    @without_autocast
    def mask(
        self,
        task: int | Tensor,
        sparsity: float | None = None,
        ranks: Tensor | None = None,
        *,
        drift_tasks: int | None = None,
    ) -> TaskMask:
        """The mask of one task: one pass over the hypernetwork, and thresholds. Layers multiply as `TaskMask` says.

        Args:
            task: an int, or a 0-dim int64 tensor (which a compiled graph takes without recompiling). On a GPU and in a
                compiled graph, which don't look at its value, a task that does not exist gives NaN.
            sparsity: percent, in place of the model's own (a sparsity ramp).
            ranks: (S,) int64 in place of sparsity, for who keeps them on the device; see `MaskLayout.ranks`.
            drift_tasks: how many of the earlier tasks `regularizer(mask)` draws for the output drift; None: all.

        Raises:
            InputError: the task does not exist, sparsity is not from 0 to 100, or drift_tasks no positive integer.
        """
        self._look_around()
        regularizers.check_drift_tasks(drift_tasks)
        made = unhooked(partial(self._mask, task, sparsity, ranks, drift_tasks))
        if self.reducer is not None and not torch.compiler.is_compiling():
            self.reducer.follow(made)
        return made

    def _mask(
        self, task: int | Tensor, sparsity: float | None, ranks: Tensor | None, drift_tasks: int | None
    ) -> TaskMask:
        stepper = self._stepper_in_training()
        for_drifts: dict[str, Any] = {"drift_tasks": drift_tasks}
        if isinstance(task, Tensor) and (stepper is None or not values_at_hand(task) or not is_id(task)):
            return self._mask_by_tensor(task, sparsity, ranks, **for_drifts)
        task = self._check_task(task)
        anchor = self._anchor_in_training(task)
        if anchor is None:
            if stepper is None:
                logits = self.hypernet.logits(*self.hypernet.generating([task])).squeeze(0)
            else:
                logits, _ = self.hypernet.factored_logits([task], (), task, stepper)
            return self._mask_of(task, logits, sparsity, ranks, **for_drifts)
        tasks = self.hypernet.tasks(task)
        drawn = for_drifts["drawn"] = regularizers.draw(self.hypernet, task, drift_tasks)
        if stepper is None:
            hidden, layer = self.hypernet.generating(tasks)
            logits, for_drifts["earlier"] = self.hypernet.logits(hidden[-1:], layer).squeeze(0), (hidden[:-1], layer)
        else:
            logits, for_drifts["output_drift"] = self.hypernet.factored_logits(
                tasks, anchor.targets, task, stepper, drawn
            )
        if self.drift.masked and self.drift.weight_scale(self.position(task)) > 0:
            for_drifts["drift_from"] = anchor.weights, self.drift.norm
        return self._mask_of(task, logits, sparsity, ranks, **for_drifts)

    def _mask_by_tensor(
        self, task: Tensor, sparsity: float | None, ranks: Tensor | None, **for_drifts: Any
    ) -> TaskMask:
        """`mask` of a task whose id is a tensor, which is looked at where that costs no host sync."""
        if not is_id(task):
            raise InputError(
                "a task tensor is int64, 0-dim (or, for a forward pass, one id per sample), "
                f"not {task.dtype} of {tuple(task.shape)}"
            )
        ids = task.reshape(1)
        if values_at_hand(task):  # then only this task's own get a gradient
            number = self._check_task(task)
            return self._mask_of(number, self.hypernet([number]).squeeze(0), sparsity, ranks, **for_drifts)
        known = self._known(ids)
        ids = ids.where(known, 0)
        hidden, layer = self.hypernet.generating(ids)
        hidden = hidden.where(known[:, None, None], float("nan"))
        return self._mask_of(ids[0], self.hypernet.logits(hidden, layer).squeeze(0), sparsity, ranks, **for_drifts)

    def _mask_of(
        self,
        task: int | Tensor,
        logits: Tensor,
        sparsity: float | None = None,
        ranks: Tensor | None = None,
        **for_drifts: Any,
    ) -> TaskMask:
        thresholds = self._thresholds(logits, sparsity, ranks)
        return TaskMask(task, self.layout, logits, thresholds, tuple(self.weights()), **for_drifts)

    def _stepper_in_training(self) -> OutputStepper | None:
        """Who takes the output layer's gradient in factors; compiled or transformed it is an ordinary one."""
        if not self.training or not torch.is_grad_enabled() or torch.compiler.is_compiling() or transforming():
            return None
        return self.hypernet.stepper

    @without_autocast
    def _masks_of(self, tasks: Sequence[int] | Tensor) -> TaskMasks:
        self._look_around()
        logits = self._logits_of(tasks)
        return TaskMasks(tasks, self.layout, logits, self._thresholds(logits), tuple(self.weights()))

    def _logits_of(self, tasks: Sequence[int] | Tensor) -> Tensor:
        """(T, N) logits. On the CPU, where no gradient is recorded, each task's are made as `mask` makes them, to the
        bit where the extension is there: a pass gives the same numbers whether its masks are kept or made, with
        whichever others."""
        net = self.hypernet
        recorded = torch.is_grad_enabled() or torch.compiler.is_compiling()
        if isinstance(tasks, Tensor) or recorded or net.processes is not None or net.output.weight.device.type != "cpu":
            return unhooked(partial(net, tasks))
        size = _TOGETHER if net.factored else 1
        if len(tasks) > size:
            logits = net.output.weight.new_empty(len(tasks), net.size)
            for begin in range(0, len(tasks), size):
                logits[begin : begin + size] = self._logits_of(tasks[begin : begin + size])
            return logits
        made = [net.generating([task]) for task in tasks]
        return net.logits(torch.cat([hidden for hidden, _ in made]), made[0][1])

    def _thresholds(self, logits: Tensor, sparsity: float | None = None, ranks: Tensor | None = None) -> Tensor:
        if ranks is None:
            ranks = self._ranks_of(self.sparsity if sparsity is None else sparsity, logits.device)
        return ops.mask_thresholds(logits, self.layout.offsets, ranks)

    def _look_around(self, passes: bool = False) -> None:
        """In a group of processes: are Parameters whole, and will all gradients be averaged, and by whom?

        passes: whether a forward pass is to come.
        """
        if torch.compiler.is_compiling() or not in_a_group():
            return
        check_whole(self.net, self, self.hypernet, self.hypernet.output)
        if self.reducer is not None and torch.is_grad_enabled():
            self.reducer.watch()
            if passes or active_ddp() is not None:
                self.reducer.passes()
        elif passes and self.training and torch.is_grad_enabled() and active_ddp() is None:
            self._say_alone()

    def _say_alone(self) -> None:
        if not self._said_alone:
            self._said_alone = True
            warnings.warn(
                "this model is trained by each process alone: hmf.distributed.replicate(model) before has all of them "
                "train one",
                stacklevel=4,
            )

    def _ranks_of(self, sparsity: float, device: torch.device) -> Tensor:
        """`layout.ranks`, kept on a GPU, for copying them there is a wait."""
        if device.type == "cpu" or torch.compiler.is_compiling():
            return self.layout.ranks(sparsity, device)
        key = self.layout, sparsity, device
        if key not in self._ranks:
            self._ranks[key] = self.layout.ranks(sparsity, device)
        return self._ranks[key]


def values_at_hand(tensor: Tensor) -> bool:
    """Whether its values may be looked at: on the CPU without a wait; on a GPU with HYPERMASK_DEBUG=1 only."""
    if torch.compiler.is_compiling() or stands_for_others(tensor):
        return False
    return tensor.device.type == "cpu" or registry.debug()
