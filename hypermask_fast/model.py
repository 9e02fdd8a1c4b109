"""HyperMask: a target network and its hypernetwork as one module."""

import os
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from . import exporting, inference, mask_making, ops, pretrained
from .errors import InputError
from .hypernet import HypernetConfig
from .masking import classes as numbers
from .masking import mixed
from .masking.cache import KeptMask, WeightCache
from .masking.layout import MaskLayout
from .masking.masks import TaskMask
from .masking.selection import Rule, check_values
from .masking.task_batch import TaskBatch, TaskMasks, masks_given, serves
from .ops import registry
from .regularizers import DriftConfig
from .serving import Serving
from .wrapping import check_whole


class HyperMask(Serving):
    """y = net(x; W * m_t), with m_t the semi-binary mask that the hypernetwork makes from task t's embedding.

    `net` is changed in place. Its modules stay, and so do their Parameters and names: an ordinary state_dict loads.
    Within a forward pass of the model every masked parameter reads as W * m_t, whoever reads it. `print(model.layout)`
    shows what is masked. Attributes of the network can be reached through the model (`model.config`).

    Args:
        net: any nn.Module. By default every weight and bias of its linear, convolution, embedding, attention, bilinear
            and recurrent layers is masked; all other parameters are shared by all tasks.
        num_tasks: task embeddings to begin with; `add_task` adds more.
        sparsity: p, percent (0 to 100) of each tensor's entries that the mask sets to 0.
        hypernetwork: its shape.
        beta: weight of the output drift in `regularizer`, from the second task on.
        lam: weight of the weight drift in `regularizer`, from the second task on.
        drift_norm: 1 or 2, the weight drift's norm.
        drift_masked: whether the weight drift counts each weight as much as the running task's mask lets it through.
        include: what to mask in place of the default: patterns of parameter names ("blocks.*.weight"), types of
            modules, or predicates (name, parameter) -> bool. Parameters of normalisations are never masked.
        exclude: what not to mask, by the same kinds of rules.
        per_task: parameters of which every task has its own, by the same kinds of rules; "norm" stands for the affine
            parameters of all normalisations. (Running statistics are per task in any case.)
        heads: patterns of the paths of the output layers ("head", "heads.*"), whose bias is used as it is; None: found
            by the definition where it is plain to see, or else by the first forward pass.
        classes: how many classes each task has, such as [2, 3, 5], where tasks differ in it: a task's outputs beyond
            its classes become the most negative finite number. For a network that returns its output layer's logits:
            (batch, classes), or (batch, classes, height, width, ...). None: every task uses all outputs.
        fidelity: "official" reproduces the authors' code: output drift divided by t twice, batch norm that always uses
            the batch's own statistics. "default": once, and running statistics per task.

    Raises:
        InputError: an argument outside of its range, a rule that matches nothing, a network that can't be masked.

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
        include: Rule | Iterable[Rule] | None = None,
        exclude: Rule | Iterable[Rule] | None = None,
        per_task: Rule | Iterable[Rule] | None = None,
        heads: str | Iterable[str] | None = None,
        classes: Sequence[int] | None = None,
        fidelity: str = "default",
    ) -> None:
        ops.kept_rank(sparsity, 1)
        if 0 < sparsity < 1:
            warnings.warn(f"sparsity is in percent: {sparsity} keeps almost everything", stacklevel=2)
        drift = DriftConfig(beta, lam, drift_norm, drift_masked, fidelity)
        layout = MaskLayout.of(net, include, exclude, per_task=per_task, heads=heads)
        if isinstance(net, nn.DataParallel):
            raise InputError("HyperMask(nn.DataParallel(net)) can't be masked: give it the net without the wrapper")
        if any(isinstance(module, DistributedDataParallel) for module in net.modules()):
            raise InputError(
                "HyperMask(DistributedDataParallel(net)) leaves the hypernetwork to each rank: wrap the other way, "
                "as hmf.distributed.replicate says"
            )
        check_whole(net)
        check_values(net)
        hypernetwork = HypernetConfig() if hypernetwork is None else hypernetwork
        if not isinstance(hypernetwork, HypernetConfig):
            raise InputError(f"hypernetwork must be a HypernetConfig, not {type(hypernetwork).__name__}")
        classes = None if classes is None else numbers.check(classes, num_tasks)
        hypernetwork.check_memory(layout, next(net.parameters()).device)
        sizes = [segment.size for segment in layout.segments]
        parameters = dict(net.named_parameters())
        like = [parameters[name] for name in layout.names]
        dtype = torch.float64 if any(weight.dtype == torch.float64 for weight in like) else torch.float32
        # The last to be refused, also by the device's memory: then the network changes.
        hypernet = hypernetwork.build(layout.size, num_tasks, sizes).to(like[0].device, dtype)
        super().__init__(
            net,
            layout,
            num_tasks,
            batch_statistics=fidelity == "official",
            heads_named=heads is not None,
            classes=classes,
        )
        self.hypernet = hypernet
        self.sparsity, self.drift, self.hypernetwork = sparsity, drift, hypernetwork
        self.fitted = {}
        self.anchor = None  # assigned to when a run resumes within a task
        self._ranks: dict[tuple[MaskLayout, float, torch.device], Tensor] = {}
        self.cache = WeightCache()

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """Asked for by DistributedDataParallel(model); `distributed.replicate` says what it is."""
        left_out = self.__dict__.get("_left_to_replicate")
        if left_out is None or self.hypernet.processes is None:
            raise InputError(
                "DistributedDataParallel would send the output layer's gradient, N x H: "
                "DistributedDataParallel(hmf.distributed.replicate(model)) sends N numbers"
            )
        return left_out

    @_ddp_params_and_buffers_to_ignore.setter
    def _ddp_params_and_buffers_to_ignore(self, names: list[str]) -> None:
        self._left_to_replicate = names

    # -- forward passes -------------------------------------------------------------------------------------------

    def forward(self, *inputs: Any, task: int | Tensor | TaskMask | None = None, **kwargs: Any) -> Any:
        """net(*inputs, **kwargs) under the mask of `task`.

        Args:
            inputs, kwargs: what the network takes. Where `task` is not given by name, the last one of the inputs is it:
                model(x, 2) and model(x, attention_mask=m, task=2).
            task: an int or 0-dim int64 tensor for the whole batch; an int64 tensor (batch,) with one task per
                sample; or a mask from `mask`.

        Returns:
            The target network's output. On a GPU and in a compiled graph, where looking at task ids would mean to
            wait for them, a sample whose task does not exist gives NaN; with HYPERMASK_DEBUG=1 it raises.

        Raises:
            InputError: a task that does not exist, or a task tensor of wrong shape or dtype.
        """
        if task is None:
            if not inputs:
                raise InputError("which task? model(x, task), or by name, model(x, task=0)")
            *inputs, task = inputs  # pyright: ignore[reportAssignmentType]
        if self._records_in_serving():
            with torch.no_grad():
                return self.forward(*inputs, task=task, **kwargs)
        self._look_around(passes=True)
        self._check_network(tuple(inputs), kwargs, task)
        if isinstance(task, Tensor) and task.dim() == 1:
            return self._forward_mixed(tuple(inputs), kwargs, task)
        return self._through(self._kept_one(task) or self._mask_for(task), tuple(inputs), kwargs)

    def _mask_for(self, task: Any) -> TaskMask:
        if not isinstance(task, TaskMask):
            return self.mask(task)
        self._check_mask(task)
        return task

    @contextmanager
    def use_task(self, task: int | Tensor | TaskMask) -> Iterator[TaskMask]:
        """Within the block, in this thread, `model.net` and all of its modules run under the mask of `task`.

        For what is no forward pass of the model, such as `model.generate`, and for threads of one's own. Masks are made
        once for the block: a step of an optimiser within it is not seen.
        """
        self._look_around(passes=True)
        mask = self._mask_for(task)
        with self._under(mask):
            yield mask

    @contextmanager
    def disabled(self) -> Iterator[None]:
        self._look_around(passes=True)
        with super().disabled():
            yield

    disabled.__doc__ = Serving.disabled.__doc__

    def _forward_mixed(self, inputs: tuple, kwargs: dict[str, Any], tasks: Tensor) -> Any:
        count = mixed.samples(inputs, kwargs)
        if tasks.dtype != torch.int64 or tasks.shape[0] != count:
            raise InputError(
                f"one task per sample is an int64 tensor ({count},), not {tasks.dtype} of {tuple(tasks.shape)}"
            )
        if tasks.shape[0] == 0:
            return self._through(self.mask(self.tasks[0]), inputs, kwargs)
        if not kwargs and len(inputs) == 1 and self._in_one_pass(inputs[0]):
            self._check_rows(inputs, kwargs, count)
            return self._forward_rows(inputs[0], tasks)
        return self._group_by_group(inputs, kwargs, tasks, self._masks_of_groups)

    def _in_one_pass(self, x: Any, tasks: int | None = None) -> bool:
        """Whether several tasks pass together: on a GPU, and where a compiled graph can't know the groups' sizes.

        Elsewhere, and for networks that can't, each task's samples pass by themselves: on a CPU as fast.
        """
        if not isinstance(x, Tensor):
            return False
        wanted = x.is_cuda or torch.compiler.is_compiling() or registry.requested() == "triton"
        return wanted and serves(self.net, x, tasks)

    def _forward_rows(self, x: Tensor, tasks: Tensor) -> Tensor:
        """Every sample under its own task's mask; nothing waits for the device, so an unknown task gives NaN."""
        known = self._known(tasks)
        if mask_making.values_at_hand(tasks) and not known.all():
            self._check_task(int(tasks[~known][0]))
        tasks = tasks.where(known, 0)
        if self.num_tasks <= tasks.shape[0] or self.hypernet.processes is not None:
            batch = TaskBatch.mixed(self._masks_of(range(self.num_tasks)), tasks)
        else:  # fewer samples than tasks: a mask per sample
            batch = TaskBatch.mixed(self._masks_of(tasks), torch.arange(tasks.shape[0], device=tasks.device))
        with self._scope.use(batch):
            y = self.net(x)
        unknown = ~known.view(-1, *(1,) * (y.dim() - 1))
        return y.masked_fill(unknown, float("nan") if y.is_floating_point() else -1)

    def all_masks(self, tasks: Iterable[int | Tensor] | None = None) -> TaskMasks:
        """All tasks' masks, from one pass over the hypernetwork; made once, they serve many batches.

        tasks: of which, in this order; None: `model.tasks`. Each mask says whose it is (`mask.task`).

        Raises InputError: a task that does not exist, or none at all.
        """
        chosen = self.check_tasks(tasks)
        if not chosen:
            raise InputError("no task to make a mask of: all_masks() makes all, all_masks([0, 2]) these")
        return self._masks_of(chosen)

    def forward_all_tasks(self, *inputs: Any, masks: Sequence[TaskMask] | None = None, **kwargs: Any) -> Any:
        """(tasks, batch, ...) outputs of every task's masked network on the same batch: row t is task t's.

        Args:
            inputs, kwargs: what the network takes.
            masks: from `all_masks`, or a part of them, whose order the rows then have; any other sequence passes mask
                by mask. Also the last one of the inputs may be it.

        Returns:
            Of a network that returns several tensors (a tuple, a dict, a dataclass) the same with each tensor stacked.
            The row of a removed task is NaN (-1 where outputs are integers).

        Raises:
            InputError: there are no masks, what is given is none, or one is a removed task's.
        """
        if (
            masks is None
            and inputs
            and isinstance(inputs[-1], Sequence)
            and all(isinstance(m, TaskMask) for m in inputs[-1])
        ):
            *inputs, masks = inputs  # pyright: ignore[reportAssignmentType]
        masks = None if masks is None else masks_given(masks)
        self._look_around(passes=True)
        self._check_network(tuple(inputs), kwargs, masks and masks[0])
        if self._records_in_serving():
            with torch.no_grad():
                return self.forward_all_tasks(*inputs, masks=masks, **kwargs)
        if masks is None:
            together = len(inputs) == 1 and self._in_one_pass(inputs[0], len(self.tasks))
            kept = None if together else self._kept(self.tasks)
            outputs = self._all(kept or self.all_masks(), tuple(inputs), kwargs, for_one_use=True)
            return mixed.spread(outputs, self.tasks, self.num_tasks) if self.hypernet.removed else outputs
        for mask in masks:
            self._check_mask(mask)
        return self._all(masks, tuple(inputs), kwargs)

    def _all(
        self, masks: Sequence[TaskMask | KeptMask], inputs: tuple, kwargs: dict[str, Any], for_one_use: bool = False
    ) -> Any:
        alone = len(inputs) == 1 and not kwargs
        x: Any = inputs[0] if alone else None
        if (
            isinstance(masks, TaskMasks)
            and len(masks) > 1
            and self._in_one_pass(x, len(masks))
            and self._rows_are_samples((x,), {}, x.shape[0])
        ):
            repeated = x.expand(len(masks), *x.shape).flatten(0, 1)
            with self._scope.use(TaskBatch.every(masks, x, repeated)):
                y = self.net(repeated)
            return y.view(len(masks), x.shape[0], *y.shape[1:])
        each = masks.for_one_use() if for_one_use and isinstance(masks, TaskMasks) else masks
        return mixed.stacked([self._through(mask, inputs, kwargs) for mask in each])

    def infer_task(
        self,
        *inputs: Any,
        method: str | None = None,
        select: Callable[[Any], Tensor] | None = None,
        k: int = 2,
        **kwargs: Any,
    ) -> Tensor:
        """(batch,) int64: per sample, the task that a method of `inference.predict` finds, where all is explained.

        Args:
            method: None is "mahalanobis" where that was fitted, otherwise "entropy": the task of lowest softmax
                entropy.
            select: of what the network returns for one task, the (batch, classes) logits; by default it is the tensor
                that it returns, or its `logits`.
            k: how many tasks "gradient+entropy" decides between.
        """
        return inference.infer(self, inputs, kwargs, None, method, select, k).task

    # -- away from here -------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes the model to a folder: weights as safetensors, tied ones once, and hypermask.json, which says what it
        is: masked parameters, sparsity, all settings, tasks. Its network's code is not in it. Whole at every moment.

        Raises:
            InputError: it can't be written; a model that was there before still is.
        """
        pretrained.save(self, self.drift, self.hypernetwork, Path(folder))

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], net: nn.Module) -> "HyperMask":
        """The model that `save_pretrained` wrote, on the device of `net`. Nothing is unpickled.

        Args:
            net: a network like the one that was saved; it gets the weights, in the dtypes that they were saved in.

        Raises:
            InputError: no such model, a damaged one, or another network: then the line names the first difference.
                The network is left as it was.
        """
        saved = pretrained.Saved(Path(folder))
        model = cls(net, **saved.settings(net))
        try:
            saved.fill(model)
        except (InputError, RuntimeError) as error:
            model.unconvert()
            raise InputError(textwrap.shorten(str(error), 300)) from error
        return model

    @overload
    def export(self, task: int, format: Literal["module"] = "module") -> nn.Module: ...
    @overload
    def export(
        self,
        task: int,
        format: str,
        path: str | os.PathLike[str],
        inputs: tuple | Tensor = (),
        kwargs: dict[str, Any] | None = None,
        *,
        dynamic: bool = True,
    ) -> Path: ...
    @torch.no_grad()
    def export(
        self,
        task: int,
        format: str = "module",
        path: str | os.PathLike[str] | None = None,
        inputs: tuple | Tensor = (),
        kwargs: dict[str, Any] | None = None,
        *,
        dynamic: bool = True,
    ) -> nn.Module | Path:
        """A plain copy of the target network with task t's mask multiplied into its weights: the same outputs.

        Batch norm carries the task's statistics. Nothing of this library is left in the copy.

        Args:
            format: "module", the copy itself; or a file at `path`, of the copy in evaluation mode: "safetensors", its
                state_dict; "pt2", for torch.export.load; "onnx" (needs onnx and onnxscript).
            inputs, kwargs: for pt2 and onnx, an example of what the network takes, of two samples or more.
            dynamic: whether the file takes batches (the first dimension) of any size, or only of the example's.

        Returns:
            The copy, or the path.

        Raises:
            InputError: no such task or format, a network that PyTorch can't export so, or a file that can't be written.
        """
        exporting.check(format, path, inputs, kwargs, dynamic)
        net = self._exported(task, self.mask(task).effective)
        if path is None:
            return net
        write = partial(exporting.write, net, format, path, inputs, kwargs, dynamic=dynamic)
        if self.hypernet.processes is None:
            return write()
        self.hypernet.processes.on_first(write)
        return Path(path)
