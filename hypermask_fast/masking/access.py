"""Masks at the parameter: modules whose `weight`, `bias`, ... read as the running task's W * m within a forward pass.

A module's class is exchanged for one that has a property per masked name. The module itself stays: its Parameters and
their names, hooks, state_dict, optimisers, `setattr` and whoever holds the module see what they saw before.
"""

import copyreg
import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from ..errors import InputError
from .scope import PLAIN, Scope


class MaskedModule:
    """What every module with masked parameters has; outside of a model, as here, nothing is masked."""

    mask_scope: Scope | None = None
    mask_segments: Mapping[str, int] = MappingProxyType({})  # attribute -> segment of the model's layout
    mask_own: Mapping[str, nn.ParameterList] = MappingProxyType({})  # attribute -> every task's own value
    mask_plain: type  # the class that the module had

    def segment(self, name: str) -> int | None:
        """The number of the segment that the attribute `name` is in the model's layout; None where it is not masked."""
        return self.mask_segments.get(name)


def masked_parameter(name: str) -> property:
    """A class attribute that reads the Parameter `name` as the running pass has it, and sets it as nn.Module does."""

    def get(self: Any) -> Any:
        try:
            plain = self._parameters[name]
        except KeyError:
            if name in self.__dict__:  # set to something else than a Parameter, as some hooks do
                if (name in self.mask_segments or name in self.mask_own) and _masks(self):
                    raise _exchanged(self, name) from None
                return self.__dict__[name]
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}") from None
        segment, own = self.mask_segments.get(name), self.mask_own.get(name)
        if (segment is None and own is None) or plain is None:
            return plain
        running = self.mask_scope.running
        if running is None:
            return plain
        return running.parameter(segment, plain) if own is None else running.own(own, plain)

    def put(self: Any, value: Any) -> None:  # nn.Module has taken every Parameter before
        self.__dict__[name] = value

    def drop(self: Any) -> None:
        del self.__dict__[name]

    return property(get, put, drop)


class _MaskedRecurrent:
    """nn.RNN, nn.LSTM and nn.GRU keep a list of their weights; within a pass it is made of what they read."""

    _flat_weights_names: list[str]

    @property
    def _flat_weights(self) -> list:
        return [getattr(self, name) for name in self._flat_weights_names] if _running(self) else self.__dict__[_FLAT]

    @_flat_weights.setter
    def _flat_weights(self, value: list) -> None:
        self.__dict__[_FLAT] = value

    def _update_flat_weights(self) -> None:
        if not _running(self):
            super()._update_flat_weights()  # pyright: ignore[reportAttributeAccessIssue]


_FLAT = "_flat_weights"


def _running(module: Any) -> bool:
    scope = module.mask_scope
    return scope is not None and scope.running is not None


def _masks(module: Any) -> bool:
    """Whether the module is read under a mask."""
    return module.mask_scope is not None and module.mask_scope.running not in (None, PLAIN)


def check_called(module: Any) -> None:
    """Raises InputError where a module with masked parameters is called and no pass is under way: a part of a network
    that is called on its own, whose parameters nobody would mask."""
    if (module.mask_segments or module.mask_own) and not _running(module):
        raise InputError(
            f"{type(module).__name__} is masked and is called outside of a forward pass: call model(x, task), or work "
            "inside `with model.use_task(task):` or `with model.disabled():`"
        )


def _checked(base: Any) -> Callable:
    """The class's forward, after `check_called`."""

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        check_called(self)
        return base.forward(self, *args, **kwargs)

    return forward


def _exchanged(module: Any, name: str) -> InputError:
    return InputError(
        f"{name} of {type(module).__name__} has been exchanged for a tensor within a pass, where it would not be masked"
    )


def replicate(self: Any) -> Any:
    """What nn.DataParallel makes replicas by, whose parameters are copies that no mask reaches."""
    if is_attached(self):
        raise InputError(
            "a masked network can't be replicated by nn.DataParallel: its replicas would have no mask (use "
            "torch.nn.parallel.DistributedDataParallel, one model per process)"
        )
    return nn.Module._replicate_for_data_parallel(self)  # pyright: ignore[reportPrivateUsage]


@functools.cache
def class_with(base: type, names: frozenset[str], *mixins: type) -> type:
    """`base` with a masked parameter for each of `names`; made once, so that equal modules have equal classes."""
    names = frozenset(name for name in names if not isinstance(getattr(base, name, None), property))
    if not names and not mixins and issubclass(base, MaskedModule):
        return base
    recurrent = (_MaskedRecurrent,) if issubclass(base, nn.RNNBase) else ()
    attributes: dict[str, Any] = {name: masked_parameter(name) for name in names}
    attributes |= {"__module__": base.__module__, "__doc__": base.__doc__, "__reduce_ex__": _reduced}
    attributes["_replicate_for_data_parallel"] = replicate
    # Others have a forward of their own, and a parametrisation is called by whoever reads its weight.
    if not mixins and not issubclass(base, (MaskedModule, parametrize.ParametrizationList)):
        attributes["forward"] = _checked(base)
    attributes["mask_parts"] = (base, names, *mixins)
    metaclass: Any = type(base)
    return metaclass(f"Masked{base.__name__}", (*mixins, *recurrent, base, MaskedModule), attributes)


def _reduced(self: Any, protocol: Any) -> tuple:
    """A copy or a pickle names the class by its parts."""
    function, arguments, *state = super(type(self), self).__reduce_ex__(max(int(protocol), 2))
    if function is not copyreg.__newobj__:  # pyright: ignore[reportAttributeAccessIssue]
        raise TypeError(f"{type(self).__name__} can't be copied: its class makes copies in a way of its own")
    return (_new, (*arguments[1:], *type(self).mask_parts), *state)


def _new(*parts: Any) -> Any:
    made: Any = class_with(*parts)
    return made.__new__(made)


def exchange_class(module: nn.Module, name: str, base: type, names: frozenset[str], *mixins: type) -> None:
    """Gives the module the class `class_with(base, names, *mixins)`. Raises InputError where Python can't, or the class
    allows no subclass."""
    try:
        module.__class__ = class_with(base, names, *mixins)
    except Exception as error:
        raise InputError(f"module {name!r} ({type(module).__name__}) can't be masked: {error}") from error


def is_attached(module: nn.Module) -> bool:
    """Whether a HyperMask model reads this module's parameters under its masks."""
    return "mask_scope" in vars(module)


def scope_of(net: nn.Module) -> Scope:
    """The scope of the model that has masked this network."""
    for module in net.modules():
        if is_attached(module):
            return vars(module)["mask_scope"]
    raise InputError("the network is no HyperMask model's")


def parameter_of(module: Any, name: str) -> nn.Parameter:
    """The Parameter itself, within a pass too; what has taken its place, where a hook has exchanged it for a tensor."""
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)
