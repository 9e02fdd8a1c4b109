"""MaskedNetwork: any network, run under the masks that it is given."""

import warnings
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves  # noqa: PLC2701

from ..errors import InputError
from ..transforming import transforming
from . import mixed, network, output
from .access import parameter_of
from .cache import KeptMask
from .classes import Classes, check_export, narrow
from .layout import MaskLayout
from .masks import TaskMask
from .norms import TaskStatistics, with_one_sample
from .passes import Pass
from .scope import PLAIN, Running, Scope, unhooked
from .selection import owners, summary


class MaskedNetwork(nn.Module):
    """`net`, changed in place so that its masked parameters read as W * m within a pass; what `HyperMask` is built on.

    Attributes:
        net: the network.
        layout: which of its parameters are masked.
        own: of each parameter that is per task, every task's value; by the parameter's name with "/" for ".".
    """

    def __init__(
        self,
        net: nn.Module,
        layout: MaskLayout,
        num_tasks: int,
        *,
        batch_statistics: bool,
        heads_named: bool,
        classes: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if left := summary(layout.rows):
            warnings.warn(left + " (print(model.layout) shows all)", stacklevel=3)
        self.layout = layout
        self._heads_known = heads_named or output.is_plain_to_see(net)
        self._scope, self._unread = Scope(), set(range(len(layout.segments)))
        own = network.attach(net, layout, self._scope, num_tasks, batch_statistics)
        self.net = net
        self.own = nn.ModuleDict({name.replace(".", "/"): values for name, values in own.items()})
        self._links = network.Links(net, layout.names)
        self._guard = net.register_forward_pre_hook(partial(network.refuse_outside, self._scope), with_kwargs=True).id
        self._classes = None if classes is None else Classes(classes, self._scope)
        if self._classes is not None:
            self._hook = net.register_forward_hook(self._classes).id
        self._owners = self._assigned()
        self.register_load_state_dict_post_hook(_tie_again)
        self._looks_at_task = bool(own) or bool(self.statistics())
        self._ids: dict[tuple[int, torch.device], Tensor] = {}  # as `_row` has made them
        self._independent: dict[Any, bool] = {}  # kind of inputs -> whether rows of a batch are independent samples

    def _assigned(self) -> list[tuple[nn.Module, str]]:
        """Who owns each segment's Parameter, by module and attribute."""
        held, parameters = owners(self.net), dict(self.net.named_parameters())
        return [(held[id(parameters[name])][0].module, name.rpartition(".")[2]) for name in self.layout.names]

    def __getattr__(self, name: str) -> Any:
        """The network's attributes, where the model has none of this name."""
        modules = self.__dict__.get("_modules", {})
        if name in modules:  # each pass asks for some
            return modules[name]
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "net" and "own" in modules:
                raise InputError("unconvert() has given this model's network back: make a new model of it") from None
            if name.startswith("_") or "net" not in modules:
                raise
            return getattr(self.net, name)

    def weights(self) -> list[nn.Parameter]:
        """The masked Parameters of the target network, one per segment of `layout`."""
        return [parameter_of(module, name) for module, name in self._owners]

    def heads(self) -> list[str] | None:
        """Paths of the output layers with a bias; None where they are not known before the first pass."""
        return [name.rpartition(".")[0] for name in self.layout.heads] if self._heads_known else None

    def output_layers(self, inputs: tuple, kwargs: dict[str, Any]) -> list[str]:
        """Paths of the output layers: those of `heads`, or where they have no bias, as a plain run on inputs shows."""
        self._check_network(inputs, kwargs)
        if known := self.heads():
            return known
        with self._scope.use(PLAIN):
            found = output.parameters_found(self.net, self.layout.rows, inputs, kwargs)
        return list(dict.fromkeys(name.rpartition(".")[0] for name in found))

    def statistics(self) -> list[TaskStatistics]:
        """The network's normalisations with running statistics per task."""
        return [module for module in self.net.modules() if isinstance(module, TaskStatistics)]

    def own_values(self) -> list[tuple[nn.Parameter, Any]]:
        """Of each parameter that is per task: the network's own, and the list of every task's."""
        parameters = dict(self.net.named_parameters())
        return [(parameters[name.replace("/", ".")], values) for name, values in self.own.items()]

    def _replicate_for_data_parallel(self) -> Any:
        raise InputError(
            "nn.DataParallel can't make replicas of a HyperMask model: use torch.nn.parallel.DistributedDataParallel, "
            "one model per process"
        )

    # -- passes ---------------------------------------------------------------------------------------------------

    def _through(self, mask: TaskMask | KeptMask, inputs: tuple, kwargs: dict[str, Any]) -> Any:
        """One pass under one task's mask."""
        compiling = torch.compiler.is_compiling()
        read: set[int] | None = set() if not compiling and self._unread else None
        one = Pass(mask, read, None if compiling else self._row(mask))
        with self._scope.use(one):
            if self.training and not compiling and mixed.is_one_sample(inputs, kwargs):
                with with_one_sample(self.net):
                    y = self.net(*inputs, **kwargs)
            else:
                y = self.net(*inputs, **kwargs)
        if not compiling and not isinstance(y, Tensor):
            _refuse_later(y)
        if read is not None:
            self._report_unread(read)
        if torch.is_grad_enabled() and not compiling:
            y = one.tied(y)
            self._scope.announce(y, one)
        return y

    def _group_by_group(
        self,
        inputs: tuple,
        kwargs: dict[str, Any],
        tasks: Tensor,
        masks_of: Callable[[list[int]], Sequence[TaskMask | KeptMask]],
    ) -> Any:
        """Every sample under its own task's mask, a task's samples together; tasks: (samples,) int64."""
        count = tasks.shape[0]
        order = tasks.argsort(stable=True)
        present, counts = tasks[order].unique_consecutive(return_counts=True)
        masks = masks_of(present.tolist())
        if len(masks) == 1:
            return self._through(masks[0], inputs, kwargs)
        self._check_rows(inputs, kwargs, count)
        groups = order.split(counts.tolist())
        with with_one_sample(self.net) if self.training and 1 in counts else nullcontext():
            parts = [
                self._through(mask, *mixed.rows((inputs, kwargs), group, count))
                for mask, group in zip(masks, groups, strict=True)
            ]
        return mixed.joined(parts, [len(group) for group in groups], order.argsort())

    def _check_rows(self, inputs: tuple, kwargs: dict[str, Any], count: int) -> None:
        if not self._rows_are_samples(inputs, kwargs, count):
            raise InputError(
                "the rows of the inputs' first dimension are no samples of their own in this network (alone they give "
                "other outputs than within the batch): put samples first (such as batch_first=True), or pass one task "
                "per batch"
            )

    def _row(self, mask: TaskMask | KeptMask) -> Tensor | None:
        """The task's id as a tensor, made once, where modules look at it."""
        if isinstance(mask.task, Tensor) or not self._looks_at_task:
            return None
        module, name = self._owners[0]
        key = mask.task, parameter_of(module, name).device
        if key not in self._ids:
            self._ids[key] = torch.tensor(mask.task, device=key[1])
        return self._ids[key]

    def _rows_are_samples(self, inputs: tuple, kwargs: dict[str, Any], count: int) -> bool:
        """Whether each of `count` rows is a sample of its own, tried once for each kind of inputs."""
        if torch.compiler.is_compiling() or count < 2:
            return True
        kind = mixed.kind(inputs, kwargs, count)
        if kind not in self._independent:
            with self._scope.use(PLAIN):
                self._independent[kind] = mixed.independent(self.net, inputs, kwargs, count)
        return self._independent[kind]

    def _report_unread(self, read: set[int]) -> None:
        """After the first pass: which masked parameters it did not read, said once."""
        unread, self._unread = sorted(self._unread - read), set()
        if unread:
            names = [self.layout.segments[number].name for number in unread]
            some = ", ".join(names[:8]) + (f", ... ({len(names)} in all)" if len(names) > 8 else "")
            warnings.warn(
                f"the first forward pass did not use these masked parameters: {some}: their masks had no effect on it",
                stacklevel=4,
            )

    def _check_network(self, inputs: tuple, kwargs: dict[str, Any], mask: Any = None) -> None:
        """What a pass needs: the network as it was masked, and knowledge of its output layers.

        mask: a `TaskMask` that was made before, if it is one.
        """
        if torch.compiler.is_compiling():
            if not self._heads_known:
                raise InputError(
                    "which layer is the output layer is found in the first ordinary pass: run one batch before "
                    "compiling, or name it: HyperMask(net, ..., heads='...')"
                )
            return
        self._links.check()
        if self._heads_known:
            return
        if transforming():
            raise InputError(
                "which layer is the output layer is found in the first ordinary pass: run one batch outside of "
                "torch.func's transforms before, or name it: HyperMask(net, ..., heads='...')"
            )
        with self._scope.use(PLAIN):
            found = unhooked(partial(output.biases_found, self.net, self.layout.rows, inputs, kwargs))
        self._heads_known, before = True, self.layout
        self.layout = before.with_output_biases(found)
        if self.layout != before and isinstance(mask, TaskMask):
            raise InputError(
                f"the output layer's bias is {' and '.join(found) or 'none'}, as this first pass shows: make the mask "
                "again, or name the layer at construction (heads='...')"
            )

    def _under(self, mask: TaskMask) -> AbstractContextManager[None]:
        """The network and all of its modules run under `mask`."""
        return self.pass_under(Pass(mask, row=self._row(mask)))

    @contextmanager
    def pass_under(self, running: Running) -> Iterator[None]:
        """Within the block, in this thread, `model.net` and all of its modules run under `running`."""
        self._links.check()
        with self._scope.use(running):
            yield

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within the block, in this thread, `model.net` is the plain network: no mask, and batch norm with the
        statistics that it came with."""
        with self._scope.use(PLAIN):
            yield

    # -- the way back ---------------------------------------------------------------------------------------------

    def _exported(self, task: int, values: Sequence[Tensor]) -> nn.Module:
        """A plain copy of the network with one task's values in place of the masked parameters."""
        if self._classes is None:
            with self._scope.use(PLAIN):
                return network.exported(self.net, self._guard, task, values)
        count, width = self._classes.counts[task], self._classes.width
        narrower = width is None or count < width
        if narrower:
            check_export(self.net, self.layout.heads, count)
        with self._scope.use(PLAIN):
            plain = network.exported(self.net, self._guard, task, values)
        plain._forward_hooks.pop(self._hook)
        if narrower:
            narrow(plain, self.layout.heads, count)
        return plain

    def unconvert(self) -> nn.Module:
        """Gives the plain network back: its modules of their own classes, unmasked, with the statistics that it came
        with. The model can't be used afterwards."""
        net = self.net
        network.detach(net)
        net._forward_pre_hooks.pop(self._guard)
        net._forward_pre_hooks_with_kwargs.pop(self._guard)
        if self._classes is not None:
            net._forward_hooks.pop(self._hook)
        del self.net
        return net


# What computes when it is asked to.
_LATER = (Iterator, AsyncIterator, Coroutine, FunctionType, MethodType, partial)


def _refuse_later(output: Any) -> None:
    """Raises InputError for outputs that are computed when the pass is over, and with it the mask."""
    for leaf in tree_leaves(output):
        if isinstance(leaf, _LATER):
            raise InputError(
                f"the network returns a {type(leaf).__name__}, which would run after the pass, unmasked: use it inside "
                "`with model.use_task(task):`, as model.net(...)"
            )


def _tie_again(model: MaskedNetwork, incompatible_keys: Any) -> None:
    """A hook of load_state_dict, whose assign=True gives each module of tied parameters one of its own."""
    weights = model.weights()
    modules: Any = model.net.modules()
    for module in modules:
        for name, segment in getattr(module, "mask_segments", {}).items():
            module._parameters[name] = weights[segment]
