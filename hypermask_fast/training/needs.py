"""What a run's tensors take at least: settings that no memory can hold are refused, and a lack of memory is told."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from math import prod
from typing import NamedTuple

import torch
from torch import nn

from ..data import Scenario
from ..errors import InputError
from ..hypernet import HypernetConfig
from ..masking.layout import MaskLayout
from ..own_code import is_own
from ..sizing import readable
from ..sizing import total_memory as memory
from .config import RunConfig
from .targets import TargetConfig, build_target

_FLOAT, _INDEX = 4, 8  # bytes
_COPIES = 3  # of a trained tensor: its value and Adam's two moments
_COPIES_ROUNDED = 2  # where the moments are in bfloat16
_UNALLOCATED = ("can't allocate memory", "not enough memory", "Storage size calculation overflowed")


class Need(NamedTuple):
    """A part of a run's memory: bytes, what they hold, and the settings that make it smaller."""

    size: int
    what: str
    settings: str


def needs(config: RunConfig, scenario: Scenario, training: bool = True) -> list[Need]:
    """The large tensors of a run while it trains its last task, or of its model alone; nothing is allocated.

    Each takes at least as much as is said here.

    Raises:
        InputError: a target that does not take the scenario's inputs.
    """
    net, outputs = _measured(config.target, scenario.input_shape, scenario.num_classes)
    copies = _COPIES if training else 1
    tasks, batch = (len(scenario.tasks), config.training.batch_size) if training else (1, 1)
    layout = MaskLayout.of(net)
    shape = {"mlp": "target.hidden", "resnet20": "target.width"}.get(config.target.name, "target.name")
    inputs, weights = prod(scenario.input_shape), sum(parameter.numel() for parameter in net.parameters())
    batch_settings = "training.batch_size" + (f" or {shape}" if outputs > inputs else "")
    return [
        *_hypernet_needs(config.hypernet, layout, tasks, copies, shape, config.training.moments == "bfloat16"),
        Need(_FLOAT * copies * weights, "the target network's weights", shape),
        Need(batch * (_FLOAT * (inputs + outputs) + _INDEX), f"a batch of {batch} samples", batch_settings),
    ]


def _hypernet_needs(
    config: HypernetConfig, layout: MaskLayout, tasks: int, copies: int, shape: str, rounded: bool
) -> list[Need]:
    """Of the hypernetwork of a layout; shape: the setting that its mask entries follow from; rounded: whether its
    output layer's moments are."""
    entries = layout.size
    of_output = min(copies, _COPIES_ROUNDED) if rounded else copies
    if config.chunk_size is None:
        rows, chunks, chunk_embedding = entries, 1, 0
        others, fewer = f"embeddings of {tasks} tasks", "hypernet.embedding"
        made = (tasks * entries, f"mask logits of {tasks} tasks", shape)
        layer = f"{shape} or hypernet.hidden, or set hypernet.chunk_size"
    else:
        tensors = config.tensors(layout)
        rows = min(config.chunk_size, max(tensors))
        chunks, chunk_embedding = sum(-(-size // rows) for size in tensors), config.chunk_embedding
        others = f"embeddings of {tasks} tasks and {chunks} chunks"
        fewer = "hypernet.embedding or hypernet.chunk_embedding, or raise hypernet.chunk_size"
        made = (
            tasks * chunks * sum(config.hidden),
            f"hidden layers of {chunks} chunks",
            "hypernet.hidden or raise hypernet.chunk_size",
        )
        layer = "hypernet.chunk_size or hypernet.hidden"
    widths = (config.embedding + chunk_embedding, *config.hidden)
    trunk = " x ".join(map(str, widths[:6])) + (" ..." if len(widths) > 6 else "")
    parts = [
        (of_output * rows * (widths[-1] + 1), f"the hypernetwork's output layer, {rows} x {widths[-1]}", layer),
        (
            copies * sum(a * b + b for a, b in pairwise(widths)),
            f"the hypernetwork's trunk, {trunk}",
            "hypernet.hidden or hypernet.embedding",
        ),
        (copies * (tasks * config.embedding + chunks * chunk_embedding), others, fewer),
        made,
    ]
    return [Need(_FLOAT * numbers, what, settings) for numbers, what, settings in parts]


def check_memory(config: RunConfig, scenario: Scenario, device: torch.device | str, training: bool = True) -> None:
    """Raises InputError where the run, or its model alone, needs more memory than the device has in all."""
    parts = needs(config, scenario, training)
    total, there = sum(part.size for part in parts), memory(torch.device(device))
    if total > there:
        raise InputError(
            f"these settings need at least {readable(total)} of memory, and there are {readable(there)}: "
            f"{_largest(parts)}"
        )


@contextmanager
def lack_of_memory_told(config: RunConfig, scenario: Scenario) -> Iterator[None]:
    """Within the block, memory that can't be had is an InputError, which names the run's largest tensors."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        allocation = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not allocation and not any(text in str(error) for text in _UNALLOCATED):
            raise
        parts = needs(config, scenario)
        total = readable(sum(part.size for part in parts))
        raise InputError(f"out of memory; these settings need at least {total}: {_largest(parts)}") from error


def _largest(parts: list[Need]) -> str:
    most = max(parts)
    return f"{most.what}, takes {readable(most.size)}: lower {most.settings}"


def _measured(config: TargetConfig, input_shape: tuple[int, ...], num_classes: int) -> tuple[nn.Module, int]:
    """The target network without memory for its weights, and the numbers per sample that its layers put out.

    One of the user's own is made as it is: its function may do what needs real tensors, such as read weights.
    """
    outputs: list[int] = []

    def count(module: nn.Module, args: object, output: torch.Tensor) -> None:
        outputs.append(output.numel())

    with torch.device("cpu" if is_own(config.name) else "meta"):
        net = build_target(config, input_shape, num_classes).eval()
        layers = [module for module in net.modules() if next(module.children(), None) is None]
        # A scripted layer takes no hook; HyperMask refuses it.
        layers = [layer for layer in layers if not isinstance(layer, torch.jit.ScriptModule)]
        hooks = [layer.register_forward_hook(count) for layer in layers if next(layer.parameters(), None) is not None]
        with torch.no_grad():
            net(torch.empty(1, *input_shape))
    for hook in hooks:
        hook.remove()
    return net, sum(outputs)
