"""Pass: one forward pass of a network under one task's mask, and what the backward pass computes of it again."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only  # noqa: PLC2701

from .. import ops
from .access import parameter_of
from .cache import KeptMask
from .masks import Convolution, Layer, TaskMask, check_exchanged
from .norms import TaskNorm
from .scope import tensors_of


class Pass:
    """A forward pass under `mask`: what modules read as their parameters, and what masked layers do when called.

    W * m of all layers is made before the network runs, unless layers may run fused. A network that computes
    activations again in the backward pass (torch.utils.checkpoint) then finds the same tensors in both passes.

    Attributes:
        mask: of the task.
        read: numbers of the segments that have been read so far; None where nobody asks.
        row: the task's id as a tensor, for a network that was compiled by itself: an integer would be compiled in.
    """

    def __init__(self, mask: TaskMask | KeptMask, read: set[int] | None = None, row: Tensor | None = None) -> None:
        self.mask, self.read, self.row = mask, read, row
        self._with_grad = torch.is_grad_enabled()
        self._quiet: set[int] = set()  # segments read without gradients: that part may be computed again in backward
        self._leaves: dict[int, Tensor] = {}
        self._gathered: dict[tuple[object, str], Tensor] = {}
        self._effective = None if mask.may_fuse else mask.effective
        self._weights = None if torch.compiler.is_compiling() else mask.weights

    @property
    def effective(self) -> tuple[Tensor, ...]:
        if self._effective is None:
            with torch.set_grad_enabled(self._with_grad):
                self._effective = self.mask.effective
        return self._effective

    # -- what modules read ----------------------------------------------------------------------------------------

    def parameter(self, segment: int, plain: Tensor) -> Tensor:
        """W * m of the task; the output layer's bias as it is."""
        if self._weights is not None and plain is not self._weights[segment]:
            check_exchanged(self.mask, segment, plain)
        if self.read is not None:
            self.read.add(segment)
        if self._with_grad and not torch.is_grad_enabled():
            self._quiet.add(segment)
        return (self._effective or self.effective)[segment]

    def tasks(self) -> int | Tensor:
        """The id of the task; see `Running.tasks`."""
        return self.row if torch.compiler.is_compiling() and self.row is not None else self.mask.task

    def own(self, values: nn.ParameterList, plain: Tensor) -> Tensor:
        """The task's own value of a parameter that is not shared."""
        task = self.tasks()
        return (
            torch.stack(list(values)).index_select(0, task.reshape(1))[0] if isinstance(task, Tensor) else values[task]
        )

    def statistic(self, module: nn.Module, name: str, stacked: Tensor, plain: Tensor) -> Tensor | None:
        """The task's row of a running statistic; the copy that `batch_norm` works on, where there is one."""
        if self._gathered and (module, name) in self._gathered:
            return self._gathered[module, name]
        task = self.tasks()
        return stacked.index_select(0, task.reshape(1))[0] if isinstance(task, Tensor) else stacked[task]

    # -- what masked layers do when called ------------------------------------------------------------------------

    def linear(self, layer: Layer, x: Tensor) -> Tensor:
        """x (W * m)^T + b, fused or with `effective`, as `Op.fused` says for this call."""
        y = None if self._effective is not None else self._fused(ops.masked_linear, layer, x)
        return F.linear(x, *self._of(layer)) if y is None else y

    def conv2d(self, layer: Convolution, x: Tensor) -> Tensor:
        """conv2d(x, W * m) + b, chosen likewise."""
        geometry = layer.geometry(x)
        y = None if geometry is None else self._fused(ops.masked_conv2d, layer, x, *geometry)
        return layer.convolve(x, *self._of(layer)) if y is None else y

    def _of(self, layer: Layer) -> tuple[Tensor, Tensor | None]:
        """What a layer reads as its weight and bias, without asking for the running pass once more."""
        segments = layer.mask_segments
        weight, bias = segments.get("weight"), segments.get("bias")
        return (
            layer.weight if weight is None else self.parameter(weight, parameter_of(layer, "weight")),
            layer.bias if bias is None else self.parameter(bias, parameter_of(layer, "bias")),
        )

    def batch_norm(self, layer: TaskNorm, x: Tensor, *args: Any) -> Tensor:
        """Batch norm with this task's statistics, which training moves, unless the task is frozen."""
        task, stacked = self.tasks(), layer.stacked()
        if isinstance(task, Tensor):  # rows are gathered and put back, without a wait for the device
            row = task.reshape(1)
            before = {name: buffer.index_select(0, row)[0] for name, buffer in stacked.items()}
        elif layer.training and task in layer.frozen:
            row, before = None, {name: buffer[task] for name, buffer in stacked.items()}
        else:
            return layer.normalise(x, *args)
        self._gathered |= {(layer, name): value.clone() for name, value in before.items()}
        y = layer.normalise(x, *args)
        for name, buffer in stacked.items():
            value = self._gathered.pop((layer, name))
            if row is not None and layer.training:
                for frozen in layer.frozen:
                    value = value.where(row[0] != frozen, before[name])
                buffer.index_copy_(0, row, value[None])
        return y

    def _fused(self, op: ops.Op, layer: Layer, x: Tensor, *geometry: object) -> Tensor | None:
        """The layer's output by an op of its own; None where it should use `effective`.

        Without gradients within a pass that has them, the layer's part may be computed again in backward with
        `effective`, so it uses that too.
        """
        if self._effective is not None or (self._with_grad and not torch.is_grad_enabled()):
            return None
        for name, segment in layer.mask_segments.items() if self._weights is not None else ():
            check_exchanged(self.mask, segment, parameter_of(layer, name))
        y = self.mask.fused(op, layer, x, *geometry)
        if y is not None and self.read is not None:
            self.read.update(s for s in (layer.segment("weight"), layer.segment("bias")) if s is not None)
        return y

    # -- the backward pass ----------------------------------------------------------------------------------------

    @property
    def again(self) -> "Pass | Again":
        """What parts of the network run under that the backward pass computes again."""
        return Again(self) if self._quiet else self

    def leaf(self, segment: int) -> Tensor:
        """W * m for a part that has a backward pass of its own, within the backward pass of everything else.

        A leaf: its gradient is collected, and added to that of W * m before W * m's own node is visited.
        """
        if segment not in self._leaves:
            made = self.effective[segment]
            if made.grad_fn is None:
                return made
            leaf = self._leaves[segment] = made.detach().requires_grad_()
            made.grad_fn.register_prehook(partial(_add_gradient, leaf, made.output_nr))
        return self._leaves[segment]

    def tied(self, output: Any) -> Any:
        """The network's output, with W * m in its graph also where every part of the network is computed again."""
        if not self._quiet:
            return output
        known = [tensor for tensor in tensors_of(output) if tensor.requires_grad]
        made = [self.effective[s] for s in sorted(self._quiet) if self.effective[s].grad_fn is not None]
        if not known or not made:
            return output
        tied = iter(_Tie.apply(len(known), *known, *made))
        by_id = {id(tensor): new for tensor, new in zip(known, tied, strict=True)}
        return tree_map_only(Tensor, lambda tensor: by_id.get(id(tensor), tensor), output)


class Again:
    """A part of a pass that torch.utils.checkpoint (use_reentrant=True) computes again, with its own backward pass."""

    def __init__(self, first: Pass) -> None:
        self._first = first

    def parameter(self, segment: int, plain: Tensor) -> Tensor:
        return self._first.leaf(segment)

    def tasks(self) -> int | Tensor:
        return self._first.tasks()

    def own(self, values: nn.ParameterList, plain: Tensor) -> Tensor:
        return self._first.own(values, plain)

    def statistic(self, module: nn.Module, name: str, stacked: Tensor, plain: Tensor) -> Tensor | None:
        return self._first.statistic(module, name, stacked, plain)

    def linear(self, layer: Layer, x: Tensor) -> Tensor:
        return F.linear(x, layer.weight, layer.bias)

    def conv2d(self, layer: Convolution, x: Tensor) -> Tensor:
        return layer.convolve(x, layer.weight, layer.bias)

    def batch_norm(self, layer: TaskNorm, x: Tensor, *args: Any) -> Tensor:
        return self._first.batch_norm(layer, x, *args)


class _Tie(torch.autograd.Function):
    """Passes the first tensors on; the others only take part in the graph, with a gradient of 0."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.others = tensors[count:]
        ctx.set_materialize_grads(False)
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *grads, *(tensor.new_zeros(()).expand_as(tensor) for tensor in ctx.others)


def _add_gradient(leaf: Tensor, output: int, grads: tuple) -> tuple:
    """A hook of the node that made W * m: adds what the leaf has collected to the gradient of its `output`."""
    if leaf.grad is None:
        return grads
    collected, leaf.grad = grads[output] + leaf.grad, None
    return (*grads[:output], collected, *grads[output + 1 :])
