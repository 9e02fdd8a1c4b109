"""What is trained in the whole-step benchmarks: the presets' networks and settings, and every initial value by name.

All contenders begin from the same numbers, so that one step of each can be compared, tensor by tensor. The names are
embedding.j, chunk_embeddings, trunk.i.weight, trunk.i.bias, output.weight, output.bias, target.s (masked tensor s of
the target network) and shared.i (its parameters that are not masked).
"""

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import ceil, prod, sqrt
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hypermask_fast.masking.layout import MaskLayout
from hypermask_fast.training.config import RunConfig, load_preset
from hypermask_fast.training.targets import build_target

from .op_cases import BLOCK


class TensorSpec(NamedTuple):
    """Shape and range of the initial values, uniform on (low, high)."""

    shape: tuple[int, ...]
    low: float
    high: float


class Piece(NamedTuple):
    """One named tensor as a contender holds it: entries start to stop of a flattened Parameter."""

    parameter: nn.Parameter
    start: int
    stop: int

    def of(self, tensor: Tensor) -> Tensor:
        """The same entries of a tensor shaped like the Parameter, flat."""
        return tensor.detach().view(-1)[self.start : self.stop]


def whole(parameter: nn.Parameter) -> Piece:
    return Piece(parameter, 0, parameter.numel())


@dataclass(frozen=True)
class Experiment:
    """A preset with the shapes that its data would give it.

    Attributes:
        config: the preset; `sample` and `classes` come from its data.
        tasks: of the whole experiment; `at`: the task indices whose step is timed.
        sample: shape of one input, without the batch.
        classes: of the shared head.
    """

    name: str
    config: RunConfig
    tasks: int
    at: tuple[int, ...]
    sample: tuple[int, ...]
    classes: int

    @property
    def batch(self) -> int:
        return self.config.training.batch_size

    def network(self) -> nn.Module:
        """The plain target network, batch norm with the batch's own statistics, as the authors' code has it."""
        net = build_target(self.config.target, self.sample, self.classes)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.track_running_stats = False
                module.running_mean = module.running_var = module.num_batches_tracked = None
        return net

    def layout(self) -> MaskLayout:
        with torch.device("meta"):
            return MaskLayout.of(self.network())

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of every masked tensor."""
        return tuple(tuple(segment.shape) for segment in self.layout().segments)

    @property
    def chunks(self) -> int:
        """Chunks of the hypernetwork's output; 1 where its output layer is dense."""
        size = self.config.hypernet.chunk_size
        return ceil(self.layout().size / size) if size else 1

    def tensors(self) -> dict[str, TensorSpec]:
        """Every trained tensor by name, in PyTorch's own ranges."""
        hyper, layout = self.config.hypernet, self.layout()
        found = {f"embedding.{j}": TensorSpec((hyper.embedding,), -1.7, 1.7) for j in range(self.tasks)}
        inputs, rows = hyper.embedding, layout.size
        if hyper.chunk_size:
            inputs, rows = hyper.chunk_embedding + hyper.embedding, hyper.chunk_size
            found["chunk_embeddings"] = TensorSpec((self.chunks, hyper.chunk_embedding), -1.7, 1.7)
        names = [f"trunk.{i}" for i in range(len(hyper.hidden))] + ["output"]
        for name, (before, after) in zip(names, pairwise((inputs, *hyper.hidden, rows)), strict=True):
            bound = 1 / sqrt(before)
            found[f"{name}.weight"] = TensorSpec((after, before), -bound, bound)
            found[f"{name}.bias"] = TensorSpec((after,), -bound, bound)
        bound = 1.0
        for s, segment in enumerate(layout.segments):
            if len(segment.shape) > 1:  # a bias has its weight's range
                bound = 1 / sqrt(prod(segment.shape[1:]))
            found[f"target.{s}"] = TensorSpec(segment.shape, -bound, bound)
        with torch.device("meta"):
            shared = shared_parameters(self.network())
        return found | {f"shared.{i}": TensorSpec(tuple(p.shape), 0.5, 1.5) for i, p in enumerate(shared)}

    def batches(self, device: torch.device, count: int = 4) -> list[tuple[Tensor, Tensor]]:
        """Random inputs and labels, the same for every contender."""
        generator = torch.Generator().manual_seed(5)
        made = []
        for _ in range(count):
            x = torch.randn(self.batch, *self.sample, generator=generator, dtype=torch.float32)
            y = torch.randint(self.classes, (self.batch,), generator=generator)
            made.append((x.to(device, torch.get_default_dtype()), y.to(device)))
        return made

    def floor(self, task: int) -> tuple[float, float]:
        """(bytes, operations) that one training step cannot do without.

        Dense: the output layer is read for the forward pass, and read and written with both moments for Adam: seven
        times; the targets of earlier tasks are read once; the target network's weights likewise pass seven times.
        Chunked: the layer is small, but its product is as large as the dense one; the drift of earlier tasks in its
        H x H form. Operations: products of the hypernetwork, and the target network's forward and backward pass.
        """
        size, width = self.layout().size, self.config.hypernet.hidden[-1]
        flops = self._network_flops()
        if not self.config.hypernet.chunk_size:
            moved = 7 * size * (width + 1) + task * size + 7 * size
            return 4.0 * moved, flops + 6.0 * size * width * (task + 1)
        rows = self.config.hypernet.chunk_size
        drift = 18.0 * width**2 * (task * self.chunks + rows) if task else 0.0
        moved = 7 * rows * (width + 1) + (rows * width if task else 0) + 7 * size
        return 4.0 * moved, flops + 6.0 * size * width + drift

    def _network_flops(self) -> float:
        from torch.utils.flop_counter import FlopCounterMode  # imports Triton, which must not weigh on peak memory

        counter = FlopCounterMode(display=False)
        with torch.device("meta"), counter:
            net = self.network()
            output = net(torch.empty(self.batch, *self.sample))
            F.cross_entropy(output, torch.zeros(self.batch, dtype=torch.int64)).backward()
        return float(counter.get_total_flops())


def masked_names(net: nn.Module) -> list[str]:
    return list(MaskLayout.of(net).names)


def shared_parameters(net: nn.Module) -> list[nn.Parameter]:
    """What is trained but not masked: batch norm's scales and shifts."""
    masked = set(masked_names(net))
    return [parameter for name, parameter in net.named_parameters() if name not in masked]


# -- initial values ---------------------------------------------------------------------------------------------------


def initial_blocks(name: str, spec: TensorSpec, moved: bool, device: torch.device) -> Iterator[Tensor]:
    """The initial values in blocks, float32, made on `device`; `moved`: with a change of a tenth of their range added.

    A step right after a task began would test little: both drifts are still zero.
    """
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    size = prod(spec.shape)
    reach = 0.05 * (spec.high - spec.low)
    for start in range(0, size, BLOCK):
        count = min(BLOCK, size - start)
        block = torch.empty(count, dtype=torch.float32, device=device).uniform_(
            spec.low, spec.high, generator=generator
        )
        change = torch.empty_like(block).uniform_(-reach, reach, generator=generator)
        yield block.add_(change) if moved else block


@torch.no_grad()
def fill(pieces: dict[str, Piece], specs: dict[str, TensorSpec], moved: bool) -> None:
    """Puts the initial values into a contender's Parameters."""
    if pieces.keys() - specs.keys():
        raise ValueError(f"no initial values for {sorted(pieces.keys() - specs.keys())}")
    for name, piece in pieces.items():
        flat = piece.of(piece.parameter)
        if flat.numel() != prod(specs[name].shape):
            raise ValueError(f"{name} has {flat.numel()} entries instead of {prod(specs[name].shape)}")
        start = 0
        for block in initial_blocks(name, specs[name], moved, flat.device):
            flat[start : start + len(block)].copy_(block)
            start += len(block)


# -- the experiments --------------------------------------------------------------------------------------------------


def _preset(
    name: str, preset: str, tasks: int, sample: Sequence[int], classes: int, change: Callable | None = None
) -> Experiment:
    config = load_preset(preset)
    config = change(config) if change else config
    at = tuple(dict.fromkeys((0, (tasks - 1) // 2, tasks - 1)))
    return Experiment(name, config, tasks, at, tuple(sample), classes)


def _in_chunks(config: RunConfig) -> RunConfig:
    return replace(config, hypernet=replace(config.hypernet, chunk_size=8000))


def experiments() -> dict[str, Experiment]:
    """The four whole-step experiments, by name."""
    made = (
        _preset("split-mnist", "split-mnist", 5, (784,), 2),
        _preset("permuted-mnist", "permuted-mnist", 10, (1024,), 10),
        _preset("resnet20-k2", "split-cifar100-resnet20", 10, (3, 32, 32), 10),
        _preset("permuted-mnist-chunked", "permuted-mnist", 10, (1024,), 10, _in_chunks),
    )
    return {experiment.name: experiment for experiment in made}


def quick(experiment: Experiment) -> Experiment:
    """The same with a network of a few thousand weights: to see that everything runs, not to measure."""
    config = experiment.config
    hypernet = replace(config.hypernet, embedding=6, hidden=tuple(10 for _ in config.hypernet.hidden))
    if hypernet.chunk_size:
        hypernet = replace(hypernet, chunk_size=150)
    image = len(experiment.sample) == 3
    target = replace(config.target, hidden=(24, 20), width=16)
    training = replace(config.training, batch_size=8)
    config = replace(config, hypernet=hypernet, target=target, training=training)
    sample = (3, 8, 8) if image else (40,)
    return replace(experiment, config=config, tasks=3, at=(0, 2), sample=sample)
