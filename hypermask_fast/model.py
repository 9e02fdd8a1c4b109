"""HyperMask: a target network and its hypernetwork as one module."""

import copy
import functools
import warnings
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from . import ops, regularizers
from .errors import InputError
from .hypernet import HypernetConfig, OutputStepper
from .masking import layers
from .masking.layout import MaskLayout
from .masking.masks import TaskMask, use_mask
from .masking.norms import TaskBatchNorm
from .masking.task_batch import TaskBatch, TaskMasks, serves
from .ops import registry
from .regularizers import Anchor, DriftConfig, Drifts


def _without_autocast(method: Callable) -> Callable:
    """For who has autocast on around a whole forward pass: logits, thresholds and drifts keep their dtype."""

    @functools.wraps(method)
    def in_own_dtype(self: "HyperMask", *args, **kwargs):
        kind = self.hypernet.output.weight.device.type
        if not torch.amp.is_autocast_available(kind):  # meta tensors
            return method(self, *args, **kwargs)
        with torch.autocast(kind, enabled=False):
            return method(self, *args, **kwargs)

    return in_own_dtype


class HyperMask(nn.Module):
    """y = net(x; W * m_t), with m_t the semi-binary mask that the hypernetwork makes from task t's embedding.

    `net` is changed in place: its nn.Linear, nn.Conv2d and BatchNorm modules become masked layers and batch norm
    with statistics per task. Parameters are shared and keep their names, so an ordinary state_dict loads.
    A layer whose weight the network uses without calling the layer is not reached by the mask.

    Args:
        net: any nn.Module made of Linear, Conv2d and other layers.
        num_tasks: task embeddings to begin with; `add_task` adds more.
        sparsity: p, percent (0 to 100) of each tensor's entries that the mask sets to 0.
        hypernetwork: its shape.
        beta, lam: weights of the output drift and of the weight drift in `regularizer`, both from the second task on.
        drift_norm: 1 or 2, the weight drift's norm; drift_masked: whether it is weighed with the mask.
        include, exclude: shell patterns of parameter names to mask and to leave out; see `MaskLayout.of`.
        fidelity: "official" reproduces the authors' code: output drift divided by t twice, batch norm that always uses
            the batch's own statistics. "default": once, and running statistics per task.

    Raises:
        InputError: an argument outside of its range, or nothing to mask.

    Source: HyperMask, arXiv 2310.00113.
    """

    def __init__(
        self,
        net: nn.Module,
        num_tasks: int,
        sparsity: float = 0.0,
        hypernetwork: HypernetConfig | None = None,
        *,
        beta: float = 0.01,
        lam: float = 0.01,
        drift_norm: int = 1,
        drift_masked: bool = True,
        include: Iterable[str] | None = None,
        exclude: Iterable[str] | None = None,
        fidelity: str = "default",
    ) -> None:
        super().__init__()
        ops.kept_rank(sparsity, 1)
        if 0 < sparsity < 1:
            warnings.warn(f"sparsity is in percent: {sparsity} keeps almost everything", stacklevel=2)
        self.sparsity = sparsity
        self.drift = DriftConfig(beta, lam, drift_norm, drift_masked, fidelity)
        self.layout = MaskLayout.of(net, include, exclude)
        if any(isinstance(module, DistributedDataParallel) for module in net.modules()):
            raise InputError(
                "HyperMask(DistributedDataParallel(net)) leaves the hypernetwork to each rank: wrap the other way, "
                "as hmf.distributed.replicate says"
            )
        hypernetwork = HypernetConfig() if hypernetwork is None else hypernetwork
        if not isinstance(hypernetwork, HypernetConfig):
            raise InputError(f"hypernetwork must be a HypernetConfig, not {type(hypernetwork).__name__}")
        self.hypernet = hypernetwork.build(self.layout.size, num_tasks)
        layers.swap_in(net, num_tasks, batch_statistics=fidelity == "official")
        self.net = net
        self._owners = self._assign_segments()
        like = self.weights()[0]
        self.hypernet.to(like.device, like.dtype)
        self.anchor: Anchor | None = None  # what `begin_task` captured; assigned to when a run resumes within a task
        self._ranks: dict[tuple[float, torch.device], Tensor] = {}

    def _assign_segments(self) -> list[tuple[nn.Module, str]]:
        """Tells each layer its segments; returns who owns each segment's Parameter, by module and attribute."""
        number = {id(self.net.get_parameter(name)): s for s, name in enumerate(self.layout.names)}
        owners: dict[int, tuple[nn.Module, str]] = {}
        for module in self.net.modules():
            if not getattr(module, "is_masked_layer", False):
                continue
            for name in ("weight", "bias"):
                segment = number.get(id(getattr(module, name)))
                setattr(module, f"{name}_segment", segment)
                if segment is not None:
                    owners[segment] = (module, name)
        return [owners[segment] for segment in range(len(number))]

    @property
    def num_tasks(self) -> int:
        return self.hypernet.num_tasks

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """Asked for by DistributedDataParallel(model); `distributed.replicate` says what it is."""
        left_out = self.__dict__.get("_left_to_replicate")
        if left_out is None or self.hypernet.averaging is None:
            raise InputError(
                "DistributedDataParallel would send the output layer's gradient, N x H: "
                "DistributedDataParallel(hmf.distributed.replicate(model)) sends N numbers"
            )
        return left_out

    @_ddp_params_and_buffers_to_ignore.setter
    def _ddp_params_and_buffers_to_ignore(self, names: list[str]) -> None:
        self._left_to_replicate = names

    def weights(self) -> list[nn.Parameter]:
        """The masked Parameters of the target network, one per segment of `layout`."""
        return [getattr(module, name) for module, name in self._owners]

    def add_task(self, optimizer: Optimizer | None = None) -> int:
        """One more task embedding (and batch-norm statistics), at any time; returns the new task's id.

        Existing Parameters stay the same objects, so a running optimiser goes on working; given here, it also gets
        the new embedding, in the group of the task before and right behind it: schedulers find as many groups as they
        know, and the order is that of a new optimiser's.
        """
        embedding = self.hypernet.add_task()
        for module in self.net.modules():
            if isinstance(module, TaskBatchNorm):
                module.add_task()
        if optimizer is not None:
            _enter(optimizer, self.hypernet.embeddings[-2], embedding)
        return self.num_tasks - 1

    # -- masks ----------------------------------------------------------------------------------------------------

    @_without_autocast
    def mask(self, task: int | Tensor, sparsity: float | None = None, ranks: Tensor | None = None) -> TaskMask:
        """The mask of one task: one pass over the hypernetwork, and thresholds. Layers multiply as `TaskMask` says.

        Args:
            task: an int, or a 0-dim int64 tensor (which a compiled graph takes without recompiling). On a GPU and in a
                compiled graph, which don't look at its value, a task that does not exist gives NaN.
            sparsity: percent, in place of the model's own (a sparsity ramp).
            ranks: (S,) int64 in place of sparsity, for who keeps them on the device; see `MaskLayout.ranks`.

        Raises:
            InputError: the task does not exist, or sparsity is not from 0 to 100.
        """
        stepper = self._stepper_in_training()
        if isinstance(task, Tensor) and (stepper is None or not _values_at_hand(task) or not _is_id(task)):
            return self._mask_by_tensor(task, sparsity, ranks)
        task = int(task) if isinstance(task, Tensor) else task
        self._check_task(task)
        anchor = self._anchor_in_training(task) if stepper is None else self._anchor_of_mask(task)
        if anchor is None:
            hidden = self.hypernet.hidden([task])
            if stepper is None:
                logits = self.hypernet.logits(hidden).squeeze(0)
            else:
                logits, _ = self.hypernet.factored_logits(hidden, (), task, stepper)
            return self._mask_of(task, logits, sparsity, ranks)
        hidden = self.hypernet.hidden(range(task + 1))
        for_drifts: dict[str, Any] = {}
        if stepper is None:
            logits, for_drifts["earlier_hidden"] = self.hypernet.logits(hidden[task:]).squeeze(0), hidden[:task]
        else:
            logits, for_drifts["output_drift"] = self.hypernet.factored_logits(hidden, anchor.targets, task, stepper)
        if self.drift.masked and self.drift.weight_scale(task) > 0:
            for_drifts["drift_from"] = anchor.weights, self.drift.norm
        return self._mask_of(task, logits, sparsity, ranks, **for_drifts)

    def _mask_by_tensor(self, task: Tensor, sparsity: float | None, ranks: Tensor | None) -> TaskMask:
        """`mask` of a task whose id is a tensor, which is looked at where that costs no host sync."""
        if not _is_id(task):
            raise InputError(
                "a task tensor is int64, 0-dim (or, for a forward pass, one id per sample), "
                f"not {task.dtype} of {tuple(task.shape)}"
            )
        ids = task.reshape(1)
        if _values_at_hand(task):
            self._check_task(int(task))
            return self._mask_of(task, self.hypernet(ids).squeeze(0), sparsity, ranks)
        known = self._known(ids)
        ids = ids.where(known, 0)
        hidden = self.hypernet.hidden(ids).where(known[:, None, None], float("nan"))
        return self._mask_of(ids[0], self.hypernet.logits(hidden).squeeze(0), sparsity, ranks)

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
        """Who takes the output layer's gradient in factors; in a compiled graph it is an ordinary one."""
        if not self.training or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        return self.hypernet.stepper

    def _anchor_of_mask(self, task: int) -> Anchor | None:
        """The anchor of the task that is being trained, which begins here if it is the next; None of an earlier one."""
        if self.anchor is not None and task < self.anchor.task:
            return None
        return self._anchor_of(task)

    def _anchor_in_training(self, task: int) -> Anchor | None:
        """The anchor of the task that is being trained; None of any other."""
        anchor = self.anchor
        if anchor is None or anchor.task != task:
            return None
        return anchor if torch.is_grad_enabled() else None

    @_without_autocast
    def _masks_of(self, tasks: range | Tensor) -> TaskMasks:
        logits = self.hypernet(tasks)
        return TaskMasks(tasks, self.layout, logits, self._thresholds(logits), tuple(self.weights()))

    def _thresholds(self, logits: Tensor, sparsity: float | None = None, ranks: Tensor | None = None) -> Tensor:
        if ranks is None:
            ranks = self._ranks_of(self.sparsity if sparsity is None else sparsity, logits.device)
        return ops.mask_thresholds(logits, self.layout.offsets, ranks)

    def _ranks_of(self, sparsity: float, device: torch.device) -> Tensor:
        """`layout.ranks`, kept on a GPU, for copying them there is a wait."""
        if device.type == "cpu" or torch.compiler.is_compiling():
            return self.layout.ranks(sparsity, device)
        key = sparsity, device
        if key not in self._ranks:
            self._ranks[key] = self.layout.ranks(sparsity, device)
        return self._ranks[key]

    def _known(self, tasks: Tensor) -> Tensor:
        """Which task ids exist, without a wait for the device."""
        return (tasks >= 0) & (tasks < self.num_tasks)

    def _check_task(self, task: int) -> None:
        if isinstance(task, bool) or not isinstance(task, Integral):
            raise InputError(f"a task is an integer from 0 to {self.num_tasks - 1}, not {task!r}")
        if not 0 <= task < self.num_tasks:
            raise InputError(
                f"task {task} does not exist: this model has tasks 0 to {self.num_tasks - 1} (add_task adds one)"
            )

    # -- forward passes -------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, task: int | Tensor | TaskMask) -> Tensor:
        """net(x) under the mask of `task`.

        Args:
            x: a batch for the target network.
            task: an int or 0-dim int64 tensor for the whole batch; an int64 tensor (batch,) with one task per
                sample; or a mask from `mask`.

        Returns:
            The target network's output. On a GPU and in a compiled graph, where looking at task ids would mean to
            wait for them, a sample whose task does not exist gives NaN; with HYPERMASK_DEBUG=1 it raises.

        Raises:
            InputError: a task that does not exist, or a task tensor of wrong shape or dtype.
        """
        if isinstance(task, Tensor) and task.dim() == 1:
            return self._forward_mixed(x, task)
        mask = task if isinstance(task, TaskMask) else self.mask(task)
        with use_mask(mask):
            return self.net(x)

    def _forward_mixed(self, x: Tensor, tasks: Tensor) -> Tensor:
        if tasks.dtype != torch.int64 or tasks.shape[0] != x.shape[0]:
            raise InputError(
                f"one task per sample is an int64 tensor ({x.shape[0]},), not {tasks.dtype} of {tuple(tasks.shape)}"
            )
        if tasks.shape[0] == 0:
            return self(x, task=0)
        if self._in_one_pass(x):
            return self._forward_rows(x, tasks)
        order = tasks.argsort(stable=True)
        present, counts = tasks[order].unique_consecutive(return_counts=True)
        ids = present.tolist()
        for task in ids:
            self._check_task(task)
        averages = self.hypernet.averaging is not None  # over the ranks, which may have other tasks in their batches
        logits = self.hypernet(range(self.num_tasks))[ids] if averages else self.hypernet(ids)
        groups = zip(ids, x[order].split(counts.tolist()), logits, strict=True)
        sorted_outputs = [self(group, self._mask_of(task, logits)) for task, group, logits in groups]
        return torch.cat(sorted_outputs)[order.argsort()]

    def _in_one_pass(self, x: Tensor, tasks: int | None = None) -> bool:
        """Whether several tasks pass together: on a GPU, and where a compiled graph can't know the groups' sizes.

        Elsewhere, and for networks that can't, each task's samples pass by themselves: on a CPU as fast.
        """
        wanted = x.is_cuda or torch.compiler.is_compiling() or registry.requested() == "triton"
        return wanted and serves(self.net, x, tasks)

    def _forward_rows(self, x: Tensor, tasks: Tensor) -> Tensor:
        """Every sample under its own task's mask; nothing waits for the device, so an unknown task gives NaN."""
        known = self._known(tasks)
        if _values_at_hand(tasks) and not known.all():
            self._check_task(int(tasks[~known][0]))
        tasks = tasks.where(known, 0)
        if self.num_tasks <= tasks.shape[0] or self.hypernet.averaging is not None:
            batch = TaskBatch.mixed(self._masks_of(range(self.num_tasks)), tasks)
        else:  # fewer samples than tasks: a mask per sample
            batch = TaskBatch.mixed(self._masks_of(tasks), torch.arange(tasks.shape[0], device=tasks.device))
        with use_mask(batch):
            y = self.net(x)
        unknown = ~known.view(-1, *(1,) * (y.dim() - 1))
        return y.masked_fill(unknown, float("nan") if y.is_floating_point() else -1)

    def all_masks(self) -> TaskMasks:
        """Every task's mask, from one pass over the hypernetwork; made once, they serve many batches."""
        return self._masks_of(range(self.num_tasks))

    def forward_all_tasks(self, x: Tensor, masks: Sequence[TaskMask] | None = None) -> Tensor:
        """(tasks, batch, ...) outputs of every task's masked network on the same batch.

        Args:
            x: a batch for the target network.
            masks: from `all_masks`, or a part of them; any other sequence passes mask by mask.
        """
        masks = self.all_masks() if masks is None else masks
        if isinstance(masks, TaskMasks) and len(masks) > 1 and self._in_one_pass(x, len(masks)):
            repeated = x.expand(len(masks), *x.shape).flatten(0, 1)
            with use_mask(TaskBatch.every(masks, x, repeated)):
                y = self.net(repeated)
            return y.view(len(masks), x.shape[0], *y.shape[1:])
        return torch.stack([self(x, mask) for mask in masks])

    def infer_task(self, x: Tensor) -> Tensor:
        """(batch,) int64: per sample, the task of lowest softmax entropy; see `ops.entropy_select`."""
        return ops.entropy_select(self.forward_all_tasks(x))

    # -- regularisers ---------------------------------------------------------------------------------------------

    def begin_task(self, task: int) -> None:
        """Captures what the regularisers of task t compare with: output of tasks 0..t-1 and the weights, as of now.

        `regularizer` does this by itself at its first call for a task; call it where another moment is meant.
        """
        self.anchor = self._captured(task)

    def _captured(self, task: int) -> Anchor:
        self._check_task(task)
        return regularizers.anchor(self.hypernet, self.layout, self.weights(), task)

    def _anchor_of(self, task: int) -> Anchor:
        anchor = self.anchor
        if anchor is None or anchor.task != task:
            anchor = self.anchor = self._captured(task)
        return anchor

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "HyperMask":
        """Moves the anchor with the Parameters, wherever nn.Module takes them."""
        super()._apply(fn, recurse)
        if self.anchor is not None:
            self.anchor = self.anchor.map(fn)
        return self

    @_without_autocast
    def drifts(self, task: int | TaskMask) -> Drifts:
        """R = sum_{j<t} ||h*(e*_j) - h(e_j)||^2 and D = sum_s ||(W_s - W_prev_s) m_s||_norm, unscaled.

        Args:
            task: the task being trained, or its mask, which spares generating it again.
        """
        mask, number = (task, int(task.task)) if isinstance(task, TaskMask) else (None, task)
        anchor = self._anchor_of(number)
        if mask is None and self.drift.masked:
            mask = self.mask(number)
        weight = None if mask is None else mask.weight_drift(anchor.weights)
        if weight is None:
            of_mask = mask if self.drift.masked else None
            logits, thresholds = (None, None) if of_mask is None else (of_mask.logits, of_mask.thresholds)
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.drift.weight_scale(anchor.task) > 0):
                weight = ops.weight_drift(
                    self.weights(), anchor.weights, self.layout.offsets, self.drift.norm, logits, thresholds
                )
        if mask is not None and mask.output_drift is not None:
            return Drifts(mask.output_drift, weight)
        hidden = None if mask is None else mask.earlier_hidden
        return Drifts(regularizers.output_drift(self.hypernet, anchor, hidden), weight)

    def regularizer(self, task: int | TaskMask) -> Tensor:
        """beta R / t + lam D, what task t > 0 adds to its cross-entropy; see `DriftConfig` for the official fidelity.

        Args:
            task: the task being trained, or its mask, which spares generating it again.

        Returns:
            Scalar with gradient to both networks and all embeddings of tasks 0..t.
        """
        drifts = self.drifts(task)
        assert self.anchor is not None, "drifts made it"
        return self.drift.loss(drifts, self.anchor.task)

    # -- export ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def export(self, task: int) -> nn.Module:
        """A plain copy of the target network with task t's mask multiplied into its weights: the same outputs.

        Batch norm carries the task's statistics. Nothing of this library is left in the copy.
        """
        effective = self.mask(task).effective
        plain = copy.deepcopy(self.net)
        for module in plain.modules():
            for name in ("weight", "bias"):
                segment = getattr(module, f"{name}_segment", None)
                if segment is not None:
                    setattr(module, name, nn.Parameter(effective[segment].clone()))
        layers.swap_out(plain, task)
        return plain


def _enter(optimizer: Optimizer, before: nn.Parameter, embedding: nn.Parameter) -> None:
    """Lets the optimiser train one more embedding, behind the one before."""
    for group in optimizer.param_groups:
        for i, parameter in enumerate(group["params"]):
            if parameter is before:
                group["params"].insert(i + 1, embedding)
                if "param_names" in group:
                    start, _, number = group["param_names"][i].rpartition(".")
                    group["param_names"].insert(i + 1, f"{start}.{int(number) + 1}")
                return
    settings = {k: v for k, v in optimizer.param_groups[0].items() if k not in ("params", "param_names")}
    optimizer.add_param_group({**settings, "params": [embedding]})


def _is_id(task: Tensor) -> bool:
    """Whether it can be one task's id."""
    return task.dtype == torch.int64 and task.dim() <= 1 and task.numel() == 1


def _values_at_hand(tensor: Tensor) -> bool:
    """Whether its values may be looked at: on the CPU without a wait; on a GPU with HYPERMASK_DEBUG=1 only."""
    return (tensor.device.type == "cpu" or registry.debug()) and not torch.compiler.is_compiling()
