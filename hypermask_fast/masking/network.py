"""A network's modules turned into masked ones, in place, and back."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn

from ..errors import InputError
from ..wrapping import refuse_ddp_of_network
from .access import MaskedModule, exchange_class, is_attached
from .layers import CALLED
from .layout import MaskLayout
from .norms import TaskStatistics, tracks
from .scope import Scope
from .selection import PER_TASK, check_modules


def attach(
    net: nn.Module, layout: MaskLayout, scope: Scope, num_tasks: int, batch_statistics: bool
) -> dict[str, nn.ParameterList]:
    """Has every module of `net` read its masked parameters under the passes of `scope`.

    A module's class is changed, not the module: Parameters, hooks and whoever holds the module stay as they are.

    Returns:
        Of each parameter that is per task, by name, every task's value; they begin as copies of the network's own.

    Raises:
        InputError: a module that can't be masked. Whatever is raised, the network is as it was.
    """
    parameters = dict(net.named_parameters())
    segments = {id(parameters[name]): number for number, name in enumerate(layout.names)}
    check_modules(net, set(segments))
    own = {
        row.name: nn.ParameterList(_copied(parameters[row.name]) for _ in range(num_tasks))
        for row in layout.rows
        if row.kind == PER_TASK
    }
    of_id = {id(parameters[name]): values for name, values in own.items()}
    try:
        for path, module in net.named_modules():
            masked, apart = _attributes(module, segments), _attributes(module, of_id)
            norm = tracks(module)
            if not (masked or apart or norm or type(module) in CALLED):
                continue
            base, mixins = CALLED.get(type(module), type(module)), (TaskStatistics,) if norm else ()
            plain = type(module)
            exchange_class(module, path, base, frozenset(masked | apart), *mixins)
            one = cast(MaskedModule, module)
            one.mask_plain = plain
            one.mask_scope, one.mask_segments, one.mask_own = scope, masked, apart
            if norm:
                cast(TaskStatistics, module).begin(num_tasks, batch_statistics)
    except BaseException:
        detach(net)
        raise
    return own


def detach(net: nn.Module, task: int | None = None, values: Sequence[Tensor] | None = None) -> None:
    """The way back: every module of its own class again, and nothing of this library in it.

    Args:
        task: whose statistics and own parameters the network is left with; None: the network's own.
        values: one per segment of the layout, in place of the masked parameters; tied ones stay tied.
    """
    new: dict[int, nn.Parameter] = {}
    module: Any
    for module in net.modules():
        if not is_attached(module):
            continue
        one = cast(MaskedModule, module)
        segments, own = one.mask_segments, one.mask_own
        if isinstance(module, TaskStatistics):
            module.end(task)
        module.__class__ = one.mask_plain
        for name in ("mask_scope", "mask_segments", "mask_own", "mask_plain"):
            vars(module).pop(name)
        for name in ("ranks", "ranks_in_evaluation"):
            vars(module).pop(name, None)
        if values is not None:
            for name, number in segments.items():
                if number not in new:
                    trained = getattr(module, name).requires_grad
                    new[number] = nn.Parameter(values[number].detach().clone(), trained)
                setattr(module, name, new[number])
        if task is not None:
            for name, tasks in own.items():
                setattr(module, name, new.setdefault(~id(tasks), _copied(tasks[task])))


def exported(net: nn.Module, guard: int, task: int, values: Sequence[Tensor]) -> nn.Module:
    """A plain copy of `net` with one task's values in place of the masked parameters; guard: its hook's number."""
    # What a hook (weight_norm, prune) has computed can't be copied as it is: it has a gradient.
    made = [value for module in net.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    plain: Any = copy.deepcopy(net, {id(tensor): tensor.detach().clone() for tensor in made if not tensor.is_leaf})
    for hooks in (plain._forward_pre_hooks, plain._forward_pre_hooks_with_kwargs):
        hooks.pop(guard, None)
    detach(plain, task, values)
    return plain


def refuse_outside(scope: Scope, net: nn.Module, args: tuple, kwargs: dict) -> None:
    """A hook of the network: it is called by its model, or inside a block that says under which mask."""
    if scope.running is None:
        raise InputError(
            "the network on its own has no mask: call model(x, task), or work inside `with model.use_task(task):`, or "
            "`with model.disabled():` for the plain network"
        )
    refuse_ddp_of_network(net)


class Links:
    """The modules on the paths to all masked parameters, to see that none of them has been replaced."""

    def __init__(self, net: nn.Module, names: Sequence[str]) -> None:
        self._links: list[tuple[dict, str, Any, str]] = []
        seen: set[str] = set()
        for name in names:
            *path, attribute = name.split(".")
            module: Any = net
            where = ""
            for part in path:
                where = f"{where}.{part}".lstrip(".")
                if where not in seen:
                    seen.add(where)
                    self._links.append((module._modules, part, module._modules[part], where))
                module = module._modules[part]
            self._links.append((module._parameters, attribute, None, name))

    def check(self) -> None:
        """Raises InputError where a module with masked parameters, or such a parameter, is no longer the network's."""
        for container, key, child, where in self._links:
            found = container.get(key)
            if found is None or (child is not None and found is not child):
                raise InputError(
                    f"{where} has been replaced since the model was made, so it would not be masked: "
                    "exchange it before, or use model.unconvert() and make a new model"
                )


def _attributes(module: nn.Module, values: Mapping[int, Any]) -> dict[str, Any]:
    """Attribute -> what `values` has for the Parameter that it is."""
    held = module.named_parameters(recurse=False, remove_duplicate=False)
    return {name: values[id(parameter)] for name, parameter in held if id(parameter) in values}


def _copied(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
