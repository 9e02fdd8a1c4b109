"""Scope: which pass a read of a masked parameter belongs to."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from functools import partial
from typing import Any, Protocol, TypeVar
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves  # noqa: PLC2701

from ..errors import InputError

_T = TypeVar("_T")


class Running(Protocol):
    """What a forward pass of a network runs under: one task's mask, many tasks' masks, or none (`PLAIN`)."""

    def parameter(self, segment: int, plain: Tensor) -> Tensor:
        """What a module reads as its parameter, the `segment`-th of the layout; plain: the Parameter itself."""
        ...

    def own(self, values: nn.ParameterList, plain: Tensor) -> Tensor:
        """What a module reads as a parameter of which every task has its own value."""
        ...

    def tasks(self) -> int | Tensor | None:
        """The task of all samples, an int or a 0-dim int64 tensor; of each row (rows,) int64; None: of none."""
        ...

    def statistic(self, module: nn.Module, name: str, stacked: Tensor, plain: Tensor) -> Tensor | None:
        """What batch norm reads as a running statistic; stacked: (tasks, ...), plain: the network's own."""
        ...


class _Plain:
    """The network as it would be without this library: every parameter and statistic is its own."""

    def parameter(self, segment: int, plain: Tensor) -> Tensor:
        return plain

    def own(self, values: nn.ParameterList, plain: Tensor) -> Tensor:
        return plain

    def tasks(self) -> None:
        return None

    def statistic(self, module: nn.Module, name: str, stacked: Tensor, plain: Tensor) -> Tensor | None:
        return plain


PLAIN = _Plain()


class _Local(threading.local):
    """Per thread, so that two threads can run two tasks through one model; torch.compile traces through it."""

    running: Running | None
    again: bool  # whether something was read as torch.utils.checkpoint reads it, who will run that part again
    unwinding: "ref[Any] | None"  # the pass whose graph this thread's backward pass is in

    def __init__(self) -> None:  # in every thread: a compiled graph expects to find them
        self.running = self.unwinding = None
        self.again = False


class Scope:
    """The passes through one model's network.

    A pass belongs to the thread that runs it. A masked parameter that is read where no pass can be meant, such as by
    an optimiser, is the Parameter itself. Where a pass is meant and can't be known (a thread that was started within a
    pass, a backward pass that computes activations again) the read raises InputError: it never gives the unmasked
    parameter silently.
    """

    def __init__(self) -> None:
        self._local = _Local()
        self._threads: list[int] = []  # of the passes under way, one entry per pass

    def __reduce__(self) -> tuple:
        """A copy, or what is unpickled, begins with no pass under way, so none is made within a pass."""
        if self._local.running not in (None, PLAIN):
            raise InputError(
                "a module with masked parameters is copied or pickled within a pass, and the copy would not be masked: "
                "use the module itself, or copy it outside of the pass or inside `with model.disabled():`"
            )
        return (Scope, ())

    @property
    def running(self) -> Running | None:
        """What a read in this thread happens under; None outside of a pass. Raises InputError: see `Scope`."""
        local = self._local
        running = local.running
        if torch.compiler.is_compiling():
            return running
        if running is not None:
            if not local.again and (not torch.is_grad_enabled() or _has_saved_tensor_hooks()):
                local.again = True
            return running
        if _graph_task() != -1:
            return self._unwinding()
        if self._threads:
            raise InputError(
                "a masked parameter is read in a thread that has no mask while another thread is inside a forward "
                "pass: run the thread's work inside `with model.use_task(task):` (or `with model.disabled():`)"
            )
        return None

    @contextmanager  # not a class of one's own, whose block a compiled graph leaves where it breaks
    def use(self, running: Running) -> Iterator[None]:
        """Reads inside, in this thread, happen under `running`; afterwards nothing of it is left behind."""
        local = self._local
        before, counted = local.running, not torch.compiler.is_compiling()
        thread = threading.get_ident() if counted else 0
        local.running = running
        if counted:
            self._threads.append(thread)
            _forget_parametrised()
        try:
            yield
        finally:
            local.running = before
            if counted:
                self._threads.remove(thread)
                _forget_parametrised()

    # -- the backward pass ----------------------------------------------------------------------------------------

    def announce(self, output: Any, one: Any) -> None:
        """Has the backward pass through `output` know the pass `one`, for activations that it computes again.

        The backward pass visits nodes from the newest to the oldest: between the hook of one pass's output and that
        of an older pass all nodes are the first one's.
        """
        if not self._local.again:  # nothing is computed again
            return
        self._local.again = False
        for tensor in tensors_of(output):
            if tensor.grad_fn is not None:
                tensor.grad_fn.register_prehook(partial(self._enter, one))

    def _enter(self, one: Any, grads: tuple) -> None:
        if self._local.unwinding is None:
            torch.autograd.Variable._execution_engine.queue_callback(self._leave)  # pyright: ignore # noqa: SLF001
        self._local.unwinding = ref(one)

    def _leave(self) -> None:
        self._local.unwinding = None

    def _unwinding(self) -> Running | None:
        found = self._local.unwinding
        one = None if found is None else found()
        if one is None:
            raise InputError(
                "a masked parameter is read in a backward pass, and the forward pass that it belongs to is not known: "
                "run the network by model(x, task), whose output the backward pass begins at"
            )
        return one.again


def _forget_parametrised() -> None:
    """Within `torch.nn.utils.parametrize.cached()` weights are kept that may be computed from another task's W * m."""
    if parametrize._cache_enabled:  # noqa: SLF001 # pyright: ignore
        parametrize._cache.clear()  # noqa: SLF001 # pyright: ignore


def _has_saved_tensor_hooks() -> bool:
    """Whether somebody keeps in a way of its own what the backward pass needs, as torch.utils.checkpoint does."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None  # noqa: SLF001 # pyright: ignore


def unhooked(make: Callable[[], _T]) -> _T:
    """What `make` makes, whose backward pass keeps its tensors as it does by itself.

    For what is made once, by the first pass that needs it: within torch.utils.checkpoint around the whole model the
    second computation finds it made, and has to save as many tensors as the first.
    """
    if torch.compiler.is_compiling():
        return make()
    hooks, keeping = [], torch._C._autograd  # noqa: SLF001 # pyright: ignore
    try:
        while (top := keeping._top_saved_tensors_default_hooks(False)) is not None:  # noqa: SLF001
            keeping._pop_saved_tensors_default_hooks()  # noqa: SLF001
            hooks.append(top)
        return make()
    finally:
        for pair in reversed(hooks):
            keeping._push_saved_tensors_default_hooks(*pair)  # noqa: SLF001


def _graph_task() -> int:
    """The number of the backward pass that this thread is in; -1 outside of one."""
    return torch._C._current_graph_task_id()  # noqa: SLF001 # pyright: ignore


def tensors_of(output: Any) -> list[Tensor]:
    """All tensors in what a network returns: a tensor, or tuples, lists, dicts and dataclasses of them."""
    if isinstance(output, Tensor):
        return [output]
    found: list[Tensor] = []
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            found += tensors_of(list(vars(leaf).values()))
    return found
