"""Means over the ranks of all gradients outside of the hypernetworks, at the end of every backward pass."""

import weakref
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import InputError
from ..masking.masks import TaskMask
from ..masking.norms import STATISTICS, TaskStatistics, TrackingNorm
from ..model import HyperMask
from ..ranks import Ranks
from ..wrapping import active_ddp, is_dtensor

_copy_each: Any = torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage, reportPrivateUsage]


class Reducer:
    """Averages `p.grad` of every trained Parameter of some modules, besides those of hypernetworks, over the ranks.

    A hook of each Parameter notes that the backward pass has given it a gradient, and has the engine call back when the
    pass is over. Then one all-reduce per dtype and device averages them all. What it holds is decided by the modules,
    not by the pass, so that ranks agree about it: each trained Parameter's gradient (0 where there is none yet) with
    whether there is one, and the running statistics of batch norm. A Parameter that one rank alone has a gradient of
    gets its mean everywhere. Averaging again changes nothing, so gradients may be accumulated. Along goes of which
    tasks the pass was; where ranks differ in it, all of them say so (on a GPU it is not looked at, which is a wait).

    Where the pass is that of a DistributedDataParallel, gradients are left to it.

    Args:
        modules: whose Parameters; the HyperMask models in them have it as their `reducer`.
        ranks: all that train them.
    """

    def __init__(self, modules: Sequence[nn.Module], ranks: Ranks) -> None:
        self.ranks = ranks
        self.modules = tuple(modules)
        # The modes, training (True) and evaluation (False), in which batch norm takes all ranks' batches as one.
        self.shares: set[bool] = set()
        self._begin()
        self.watch()

    def _begin(self) -> None:
        self._watched: dict[int, weakref.ref[Tensor]] = {}
        self._noted: dict[int, list[tuple[weakref.ref[Tensor], int]]] = {}  # by the engine's number of the pass
        self._tasks: list[int] = []  # whose masks the backward pass has reached
        self._buffers: dict[Any, Tensor] = {}
        self._holds: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()
        self._ddp, self._ddp_syncs, self._went_back = False, False, False

    def __deepcopy__(self, memo: dict) -> "Reducer":
        """Of those modules that are copied with it, whose Parameters are found at their next mask."""
        copied = object.__new__(Reducer)
        copied.ranks, copied.shares = self.ranks, set(self.shares)
        copied.modules = tuple(memo[id(module)] for module in self.modules if id(module) in memo)
        copied._begin()
        return copied

    def __reduce__(self) -> tuple[type, tuple]:
        return type(None), ()  # what is loaded is in a process of its own

    # -- forward passes -------------------------------------------------------------------------------------------

    def watch(self) -> None:
        """Puts hooks on Parameters that are new: of a copy, of a task added, loaded by assignment."""
        for parameter in self._parameters():
            known = self._watched.get(id(parameter))
            if known is None or known() is not parameter:
                parameter.register_post_accumulate_grad_hook(partial(_note, weakref.ref(self)))
                self._watched[id(parameter)] = weakref.ref(parameter)

    def follow(self, mask: TaskMask) -> None:
        """Has the backward pass say when it is of this mask."""
        if mask.logits.requires_grad and isinstance(mask.task, int):
            mask.logits.register_hook(partial(_follow, weakref.ref(self), mask.task))

    def passes(self) -> None:
        """Told of every forward pass with gradients: whether they are a DistributedDataParallel's to average.

        They are if the latest pass was within its forward pass. And also as long as one with gradients has not been
        followed by a backward pass: then it averages at the next one, wherever that comes from.
        """
        self._noted.clear()  # of a backward pass that has failed
        self._tasks.clear()
        ddp = active_ddp()
        if ddp is not None and self._held_by(ddp):
            self._ddp, self._ddp_syncs, self._went_back = True, ddp.require_backward_grad_sync, False
        elif self._went_back or not self._ddp_syncs:
            self._ddp = False

    def _held_by(self, ddp: DistributedDataParallel) -> bool:
        """Whether it averages these modules' gradients. Raises InputError where it would do that wrong."""
        if ddp not in self._holds:
            held = [part for part in ddp.module.modules() if part in set(self._models())]
            for model in held:
                _check_ddp(ddp, model)
            self._holds[ddp] = bool(held)
        return self._holds[ddp]

    def check_same_tasks(self, tasks: Sequence[int], count: int, training: bool) -> None:
        """Where batch norm takes all ranks' batches as one, each of them is to have samples of the same tasks.

        tasks: of this rank's batch; count: how many there can be; training: the mode of the pass.

        Raises:
            InputError: on every rank.
        """
        if training not in self.shares:
            return
        device = next(self.modules[0].parameters()).device
        mine = torch.zeros(count, device=device)
        mine[list(tasks)] = 1
        self.ranks.mean_(mine)
        if bool(((mine > 0) & (mine < 1 - 0.5 / self.ranks.size)).any()):
            raise InputError(
                "synchronised batch norm needs samples of the same tasks on every rank: give each rank's batch all of "
                "the tasks, or pass one task per batch"
            )

    # -- backward passes ------------------------------------------------------------------------------------------

    def reached(self, task: int) -> None:
        """Called when the backward pass under way has come to a task's mask."""
        self._tasks.append(task)

    def note(self, parameter: Tensor) -> None:
        """Called when the backward pass under way has added a gradient to `parameter.grad`."""
        self._went_back = True
        number = torch._C._current_graph_task_id()  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
        if number not in self._noted:  # one that has failed never calls back, nor does its number come again
            self._noted[number] = []
            engine: Any = torch.autograd.Variable._execution_engine  # noqa: SLF001  # pyright: ignore
            engine.queue_callback(partial(self._finish, number))
        self._noted[number].append((weakref.ref(parameter), parameter._version))  # noqa: SLF001

    @torch.no_grad()
    def _finish(self, number: int) -> None:
        noted = self._noted.pop(number, [])
        if not self._ddp:
            _check_not_stepped(noted)
        parameters = [] if self._ddp else list(self._parameters())
        of: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
        for parameter in parameters:
            of.setdefault((parameter.dtype, parameter.device), ([], []))[0].append(parameter)
        for statistic in self._statistics():
            of.setdefault((statistic.dtype, statistic.device), ([], []))[1].append(statistic)
        tasks = tuple(self._tasks)
        self._tasks.clear()
        for kind, (some, statistics) in of.items():
            self._average(kind, some, statistics, tasks)

    def _average(self, kind: Any, parameters: list[Tensor], statistics: list[Tensor], tasks: tuple[int, ...]) -> None:
        """One all-reduce: gradients, running statistics, and of each gradient whether there is one."""
        everything = [*parameters, *statistics]
        sizes = [*(tensor.numel() for tensor in everything), len(parameters)]
        self.ranks.meet(
            ("gradients", kind[0], sizes, tasks),
            f"ranks make backward passes of different tasks, here of {', '.join(map(str, tasks)) or 'none'}: all ranks "
            "train one task at a time together, or samples of several by model(x, tasks)",
        )
        flat = self._buffer(kind, sum(sizes))
        *parts, has = flat.split(sizes)
        parts = [part.view(tensor.shape) for part, tensor in zip(parts, everything, strict=True)]
        missing = []
        for number, (part, parameter) in enumerate(zip(parts, parameters, strict=False)):
            if parameter.grad is None:
                missing.append(number)
                part.zero_()
            elif parameter.grad.layout is not torch.strided:  # an embedding's with sparse=True
                parameter.grad = parameter.grad.to_dense()
        there = [number for number in range(len(parameters)) if number not in set(missing)]
        grads: list[Any] = [parameters[number].grad for number in there]
        filled = [*(parts[number] for number in there), *parts[len(parameters) :]]
        _copy_each(filled, [*grads, *statistics])
        has.fill_(1)
        if missing:
            has[missing] = 0
        self.ranks.mean_(flat)
        _copy_each([*grads, *statistics], filled)
        if missing:  # only then are the flags looked at: on a GPU that is a wait
            for number, others_have in zip(missing, (has[missing] > 0).tolist(), strict=True):
                if others_have:
                    parameters[number].grad = torch.empty_like(parameters[number]).copy_(parts[number])

    def _buffer(self, kind: Any, size: int) -> Tensor:
        """Kept from pass to pass: new memory costs time."""
        if kind not in self._buffers or len(self._buffers[kind]) != size:
            self._buffers[kind] = torch.empty(size, dtype=kind[0], device=kind[1])
        return self._buffers[kind]

    # -- what there is, in the same order on every rank -----------------------------------------------------------

    def _models(self) -> Iterator[HyperMask]:
        for module in self.modules:
            for part in module.modules():
                if isinstance(part, HyperMask):
                    yield part

    def _parameters(self) -> Iterator[nn.Parameter]:
        """Those that are trained, each once; not DTensors, whose gradients belong to who has made them."""
        seen = {id(parameter) for model in self._models() for parameter in model.hypernet.parameters()}
        for module in self.modules:
            for parameter in module.parameters():
                if id(parameter) not in seen and parameter.requires_grad and not is_dtensor(parameter):
                    seen.add(id(parameter))
                    yield parameter

    def _statistics(self) -> Iterator[Tensor]:
        """Running means and variances that training moves apart."""
        seen = set()
        for module in self.modules:
            for part in module.modules():
                if isinstance(part, TrackingNorm) and part not in seen:
                    seen.add(part)
                    yield from _moved(part)


def _moved(norm: nn.Module) -> Iterator[Tensor]:
    """A normalisation's running statistics, but for those that are equal on all ranks anyway."""
    unused: tuple[str, ...] = ()
    if isinstance(norm, TaskStatistics):
        if norm.ranks is not None:
            return
        unused = STATISTICS if norm.batch_statistics else ()
    for name, buffer in norm.named_buffers(recurse=False):
        if name.endswith(STATISTICS) and name not in unused and buffer.is_floating_point():
            yield buffer


def _check_ddp(ddp: DistributedDataParallel, model: Any) -> None:
    """Raises InputError where it would send a model's whole output layer, or wait for other tasks' parameters."""
    kind = type(ddp.module).__name__
    inner = {id(parameter) for parameter in model.hypernet.parameters()}
    left_out = ddp.parameters_to_ignore
    if any(id(p) in inner and name not in left_out for name, p in ddp.module.named_parameters()):
        raise InputError(
            f"DistributedDataParallel({kind}) would send the output layer's gradient, N x H: "
            f"hmf.distributed.replicate (or shard) takes the {kind} that has the model in it"
        )
    own = sum(parameter.requires_grad for parameter in model.own.parameters())
    if own > len(model.own) and not (ddp.find_unused_parameters or ddp.static_graph):
        raise InputError(
            "parameters of each task's own are not in other tasks' passes: "
            "DistributedDataParallel(..., find_unused_parameters=True), or leave it out: gradients are averaged anyway"
        )


def _check_not_stepped(noted: Sequence[tuple["weakref.ref[Tensor]", int]]) -> None:
    """Raises InputError where a Parameter is no longer what it was as it got its gradient, or has none any more."""
    for found, version in noted:
        parameter = found()
        if parameter is not None and (parameter.grad is None or parameter._version != version):  # noqa: SLF001
            raise InputError(
                "a hook has stepped a parameter within the backward pass, or taken its gradient, which the ranks "
                "average when the pass is over: step in the loop, after loss.backward()"
            )


def average_gradients(module: nn.Module, group: Any = None) -> None:
    """Gives every rank the first one's Parameters and buffers outside of hypernetworks, and has them trained as one.

    Args:
        module: one with HyperMask models in it, of one shape on every rank.
        group: of all ranks that train it; None for all processes.
    """
    ranks, models = Ranks.of(group), [part for part in module.modules() if isinstance(part, HyperMask)]
    inner = {id(tensor) for model in models for tensor in (*model.hypernet.parameters(), *model.hypernet.buffers())}
    ranks.make_equal(t for t in (*module.parameters(), *module.buffers()) if id(t) not in inner and not is_dtensor(t))
    known = {id(parameter) for parameter in module.parameters()}
    before = [part for model in models if isinstance(model.reducer, Reducer) for part in model.reducer.modules]
    others = [part for part in before if any(id(parameter) not in known for parameter in part.parameters())]
    reducer = Reducer(list(dict.fromkeys([module, *models, *others])), ranks)
    for model in models:
        model.reducer = reducer


def _follow(reducer: "weakref.ref[Reducer]", task: int, grad: Tensor) -> None:
    one = reducer()
    if one is not None:
        one.reached(task)


def _note(reducer: "weakref.ref[Reducer]", parameter: Tensor) -> None:
    one = reducer()
    if one is not None:
        one.note(parameter)
