"""What a layer of the network is given, under each task's mask: the features that distances are taken of."""

import threading
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..masking.masks import TaskMask
from ..masking.scope import Running


class TaskModel(Protocol):
    """What this room needs of a `HyperMask`, which says what each member is."""

    net: nn.Module
    training: bool
    hypernet: Any
    fitted: dict[str, Any]

    @property
    def tasks(self) -> tuple[int, ...]: ...

    @property
    def num_tasks(self) -> int: ...

    @property
    def classes(self) -> tuple[int, ...] | None: ...

    def __call__(self, *inputs: Any, **kwargs: Any) -> Any: ...

    def all_masks(self, tasks: Any = None) -> Sequence[TaskMask]: ...

    def forward_all_tasks(self, *inputs: Any, masks: Sequence[TaskMask] | None = None, **kwargs: Any) -> Any: ...

    def heads(self) -> list[str] | None: ...

    def pass_under(self, running: Running) -> Any: ...

    def output_layers(self, inputs: tuple, kwargs: dict[str, Any]) -> list[str]: ...

    def named_parameters(self) -> Any: ...

    def named_buffers(self) -> Any: ...

    def statistics(self) -> Any: ...

    def own_values(self) -> Any: ...

    def modules(self) -> Any: ...

    def eval(self) -> Any: ...


def feature_layer(model: TaskModel, layer: str | None, inputs: tuple, kwargs: dict[str, Any]) -> str:
    """The path of the layer whose input the features are; None: the output layer, which is then found.

    Raises:
        InputError: the network has no such layer, or several output layers.
    """
    if layer is None:
        found = model.output_layers(inputs, kwargs)
        if len(found) != 1:
            raise InputError(
                f"features are the input of the last layer, and here are {len(found)} that could be it "
                f"({', '.join(map(repr, found)) or 'none'}): name one, layer='...'"
            )
        return found[0]
    names = dict(model.net.named_modules())
    if model.heads() is None:
        model.output_layers(inputs, kwargs)  # the first pass, which finds them, calls every layer more than once
    if layer not in names or not layer:
        linear = [name for name, module in names.items() if isinstance(module, nn.Linear)] or list(names)[1:]
        raise InputError(f"the network has no layer {layer!r} to take features of; it has {_some(linear)}")
    return layer


def _some(names: Sequence[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f", ... ({len(names)} in all)" if len(names) > most else "")


def features_of(
    model: TaskModel, mask: TaskMask, layer: str, inputs: tuple, kwargs: dict[str, Any]
) -> tuple[Tensor, Any]:
    """(batch, D) input of `layer` in a pass under a task's mask, and the network's output.

    Raises:
        InputError: the pass calls the layer never or several times, what it is given is not (batch, D) floating
            point numbers, or some of them are not finite.
    """
    seen: list[Any] = []
    thread = threading.get_ident()

    def note(module: nn.Module, args: tuple, named: dict[str, Any]) -> None:
        if threading.get_ident() == thread:  # another thread's pass has features of its own
            seen.append(next(iter((*args, *named.values())), None))

    hook = model.net.get_submodule(layer).register_forward_pre_hook(note, with_kwargs=True)
    try:
        output = model(*inputs, task=mask, **kwargs)
    finally:
        hook.remove()
    if len(seen) != 1:
        times = "never" if not seen else f"{len(seen)} times"
        raise InputError(f"a pass calls layer {layer!r} {times}, and features are what it is given once: name another")
    features = seen[0]
    if not isinstance(features, Tensor) or features.dim() != 2 or not features.is_floating_point():
        what = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise InputError(f"layer {layer!r} is given {what}, and features are (batch, D): name another layer")
    if not torch.isfinite(features).all():
        raise InputError(f"features of layer {layer!r} are not finite under task {int(mask.task)}'s mask")
    return features.detach(), output
