"""Tasks with different numbers of classes on one output layer: what is beyond a task's classes can't be chosen."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..checks import is_whole, shown
from ..errors import InputError
from .access import parameter_of
from .scope import Scope


class Classes:
    """A forward hook of the network: outputs beyond the running task's classes become the dtype's lowest number.

    That is the most negative finite number. Its softmax is 0 and it adds nothing to an entropy, where -inf would make
    NaN of both.

    Args:
        counts: of every task, how many classes it has.
        scope: which pass is under way.
    """

    def __init__(self, counts: Sequence[int], scope: Scope) -> None:
        self.counts, self._scope = tuple(counts), scope
        self.width: int | None = None  # of the network's output, once it has been seen
        self._tables: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}

    def __call__(self, net: nn.Module, args: tuple, output: Any) -> Any:
        running = self._scope.running
        tasks = None if running is None else running.tasks()
        if tasks is None:  # the plain network
            return output
        if isinstance(output, Tensor):
            return self._narrowed(output, tasks)
        one: Any = output
        if isinstance(output, dict) and isinstance(output.get("logits"), Tensor):
            output["logits"] = self._narrowed(output["logits"], tasks)
        elif isinstance(getattr(output, "logits", None), Tensor) and not isinstance(output, tuple):
            one.logits = self._narrowed(one.logits, tasks)
        else:
            raise InputError(
                f"classes=... needs a network that returns its logits, as a tensor or by that name, "
                f"not {type(output).__name__}"
            )
        return output

    def _narrowed(self, logits: Tensor, tasks: int | Tensor) -> Tensor:
        """logits: (classes,), (batch, classes) or (batch, classes, height, width, ...)."""
        if logits.dim() in (0, 3) or not logits.is_floating_point():
            raise InputError(
                "classes=... needs logits (batch, classes) or (batch, classes, height, width, ...), "
                f"not {logits.dtype} of {tuple(logits.shape)}"
            )
        along = 0 if logits.dim() == 1 else 1
        width = logits.shape[along]
        if width < max(self.counts):
            raise InputError(f"the network has {width} outputs, and a task of {max(self.counts)} classes")
        if not torch.compiler.is_compiling():
            self.width = width
        if isinstance(tasks, Tensor):
            limits = self._table(logits.device).index_select(0, tasks.reshape(-1))
            limits = limits.view(-1, *(1,) * (logits.dim() - 1))
        else:
            limits = self.counts[tasks]
            if limits == width:
                return logits
        numbers = torch.arange(width, device=logits.device).view(width, *(1,) * (logits.dim() - 1 - along))
        return logits.masked_fill(numbers >= limits, torch.finfo(logits.dtype).min)

    def _table(self, device: torch.device) -> Tensor:
        """The counts on the device, where copying them is a wait: once."""
        if torch.compiler.is_compiling():
            return torch.tensor(self.counts, device=device)
        key = self.counts, device
        if key not in self._tables:
            self._tables[key] = torch.tensor(self.counts, device=device)
        return self._tables[key]


def check(classes: Sequence[int], num_tasks: int) -> tuple[int, ...]:
    """The numbers of classes of all tasks, if they are that. Raises InputError otherwise."""
    values = classes.tolist() if isinstance(classes, Tensor | np.ndarray) else classes
    if not isinstance(values, Sequence) or not all(is_whole(n) and n >= 1 for n in values):
        raise InputError(f"classes must be one whole number >= 1 per task, such as [2, 3, 5], not {shown(classes)}")
    counts = tuple(map(int, values))
    if len(counts) != num_tasks:
        raise InputError(f"classes must be one number per task: {num_tasks}, not {len(counts)}")
    return counts


def check_export(net: nn.Module, heads: Sequence[str], classes: int) -> None:
    """Raises InputError where `narrow` could not give the exported network the model's outputs.

    heads: names of the output layers' biases.
    """
    for name in heads:
        bias = parameter_of(net.get_submodule(name.rpartition(".")[0]), "bias")
        if len(bias) >= classes:
            return
    raise InputError(
        "a task with fewer classes than the output layer has outputs is exported by that layer's bias, and the "
        "network has none, or it is not known yet: run one batch, or name the layer (heads='...')"
    )


@torch.no_grad()
def narrow(plain: nn.Module, heads: Sequence[str], classes: int) -> None:
    """Has a plain network give the lowest number beyond `classes`, by its output layers' biases."""
    held = [id(p) for module in plain.modules() for p in module.parameters(recurse=False)]
    for name in heads:
        layer: Any = plain.get_submodule(name.rpartition(".")[0])
        layer.bias[classes:] = torch.finfo(layer.bias.dtype).min
        if held.count(id(layer.weight)) == 1 and len(layer.weight) == len(layer.bias):
            layer.weight[classes:] = 0  # of a tied one the bias alone outweighs all products
