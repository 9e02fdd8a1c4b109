"""Hypernetworks: from a task's embedding to its flat mask logits, dense or in chunks."""

import weakref
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import ops, sizing
from .averaging import Averaging
from .errors import InputError
from .few_rows import linear
from .masking.layout import MaskLayout
from .output_layer import FactoredOutput, OutputStepper, SteppedOutput
from .settings import WIDEST, Range, Widths, check_fields


@dataclass(frozen=True)
class HypernetConfig:
    """Shape of a hypernetwork.

    Attributes:
        embedding: size E of a task's embedding.
        hidden: widths of the hidden layers (ELU); the last one is H.
        chunk_size: entries that the output layer generates at a time, C of N, in chunks; without it (None) all N.
        chunk_embedding: size of a chunk's embedding, for a chunked hypernetwork.
        by_tensor: with chunk_size, whether each masked tensor begins a chunk of its own. A tensor's last chunk is
            truncated, and no chunk straddles two tensors.

    Raises:
        InputError: a size that is no positive integer, or beyond any machine.
    """

    embedding: Annotated[int, Range(1, WIDEST, unit="numbers")] = 48
    hidden: Annotated[tuple[int, ...], Widths(1)] = (100,)
    chunk_size: Annotated[int | None, Range(1, unit="mask entries")] = None
    chunk_embedding: Annotated[int, Range(1, WIDEST, unit="numbers")] = 8
    by_tensor: bool = False

    def __post_init__(self) -> None:
        hidden = self.hidden if isinstance(self.hidden, Iterable) else (self.hidden,)
        object.__setattr__(self, "hidden", tuple(hidden))
        check_fields(self, "hypernetwork")
        if self.by_tensor and self.chunk_size is None:
            raise InputError("hypernetwork by_tensor says how chunks lie: it needs a chunk_size")

    @classmethod
    def auto(cls, layout: MaskLayout, budget_bytes: int, **settings: Any) -> "HypernetConfig":
        """The largest hypernetwork that trains within a budget: dense where that fits, or else in chunks.

        16 bytes a parameter in float32: weight, gradient, and Adam's two moments; see `sizing.parameters` for how many
        there are. Masks, the target network and its own training come beside it.

        Args:
            layout: of the target network, `MaskLayout.of(net)`.
            budget_bytes: bytes.
            settings: all others than chunk_size; by_tensor is True unless it is given.

        Raises:
            InputError: not even the smallest one fits.
        """
        if isinstance(budget_bytes, bool) or not isinstance(budget_bytes, int) or budget_bytes < 1:
            raise InputError(f"budget_bytes must be a positive whole number of bytes, not {budget_bytes!r}")
        dense = cls(**{**settings, "by_tensor": False, "chunk_size": None})
        if sizing.TRAINED * dense.num_parameters(layout) <= budget_bytes:
            return dense
        chunked = cls(**{"by_tensor": True, **settings, "chunk_size": 1})
        return replace(chunked, chunk_size=chunked.fitting(layout, budget_bytes))

    def num_parameters(self, layout: MaskLayout) -> int:
        """How many parameters it has for the tensors of a layout, besides the tasks' embeddings."""
        sizes = self.embedding, self.hidden, self.chunk_size, self.chunk_embedding
        return sizing.parameters(self.tensors(layout), *sizes)

    def fitting(self, layout: MaskLayout, budget_bytes: int) -> int:
        """The largest chunk_size that trains within a budget; see `auto`."""
        sizes = self.embedding, self.hidden, self.chunk_embedding
        return sizing.chunk_size(self.tensors(layout), *sizes, budget_bytes)

    def tensors(self, layout: MaskLayout) -> Sequence[int]:
        """Entries of each tensor that begins a chunk of its own."""
        return [segment.size for segment in layout.segments] if self.by_tensor else [layout.size]

    def check_memory(self, layout: MaskLayout, device: torch.device) -> None:
        """Raises InputError where it is larger than the memory of the device, or of this machine, where it is made."""
        if device.type == "meta":
            return
        devices = [torch.device("cpu")] if device.type == "cpu" else [torch.device("cpu"), device]
        memory, count = min(map(sizing.total_memory, devices)), self.num_parameters(layout)
        if sizing.TRAINED * count > memory:
            hint = "take smaller hidden widths"
            for share in (1, 2, 4):  # of the memory; the smallest share that does
                with suppress(InputError):
                    hint = f"try HypernetConfig(chunk_size={self.fitting(layout, int(memory) // share)})"
            sizing.check_memory(count, devices, hint)

    def build(self, size: int, num_tasks: int, tensors: Sequence[int] | None = None) -> "HyperNetwork":
        """The hypernetwork of this shape for `size` entries and `num_tasks` tasks.

        tensors: entries of each masked tensor, which sum to `size`; needed where chunks are `by_tensor`.
        """
        if self.chunk_size is None:
            return HyperNetwork(size, num_tasks, self.embedding, self.hidden)
        if self.by_tensor and tensors is None:
            raise InputError("a hypernetwork whose chunks follow the tensors needs to know their sizes")
        shape = self.chunk_size, self.embedding, self.chunk_embedding, self.hidden
        return ChunkedHyperNetwork(size, num_tasks, *shape, tensors if self.by_tensor else None)


class HyperNetwork(nn.Module):
    """a_t = W elu(... elu(V1 e_t + c1) ...) + b: an MLP from task embedding to N logits.

    Embeddings e_t ~ N(0, 1), one trained Parameter per task, so that `add_task` leaves every existing Parameter,
    and an optimiser that holds it, as they are. Linear layers keep PyTorch's own initialisation.

    Args:
        size: N, entries generated.
        num_tasks: embeddings to begin with.
        embedding, hidden: see `HypernetConfig`.

    Attributes:
        factored: whether the output layer's gradient can be kept as its factors, and stepped on them.
        averaging: of gradients over processes; None for one process. See `distributed.replicate`.
        removed: ids of tasks that are no longer there; their embeddings stay in place, so that all others keep theirs.
    """

    factored = True
    averaging: Averaging | None = None
    removed: tuple[int, ...] = ()
    _stepper: "weakref.ref[OutputStepper] | None" = None

    def __init__(self, size: int, num_tasks: int, embedding: int, hidden: Iterable[int]) -> None:
        super().__init__()
        self._build(size, num_tasks, embedding, embedding, tuple(hidden), rows=size)

    def _build(
        self, size: int, num_tasks: int, embedding: int, inputs: int, hidden: tuple[int, ...], rows: int
    ) -> None:
        if not isinstance(num_tasks, int) or isinstance(num_tasks, bool) or num_tasks < 1:
            raise InputError(f"num_tasks must be a positive integer, not {num_tasks!r}")
        self.size = size
        self.embeddings = nn.ParameterList(nn.Parameter(torch.randn(embedding)) for _ in range(num_tasks))
        widths = (inputs, *hidden)
        self.trunk = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.output = nn.Linear(widths[-1], rows)

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy or a pickle, which no optimiser holds yet: its output layer is its own."""
        return {**self.__dict__, "_stepper": None}

    def step_with(self, stepper: OutputStepper | None) -> None:
        """Gives `stepper` the output layer's gradient in factors for as long as it lives, in place of whoever had it
        before; None: the layer has an ordinary gradient."""
        if (before := self.stepper) is not None:
            before.replaced()
        self._stepper = None if stepper is None else weakref.ref(stepper)

    @property
    def stepper(self) -> OutputStepper | None:
        return None if self._stepper is None else self._stepper()

    @property
    def num_tasks(self) -> int:
        """How many ids have been given, those of removed tasks included."""
        return len(self.embeddings)

    def tasks(self, last: int | None = None) -> Sequence[int]:
        """Ids of the tasks that are there, up to and with `last`."""
        ids = range(self.num_tasks if last is None else last + 1)
        return [task for task in ids if task not in self.removed] if self.removed else ids

    def add_task(self) -> nn.Parameter:
        """One more embedding ~ N(0, 1), returned so that a running optimiser can be given it."""
        like = self.embeddings[0]
        embedding = nn.Parameter(torch.randn_like(like))
        if self.averaging is not None:
            self.averaging.make_equal([embedding])
        self.embeddings.append(embedding)
        return self.embeddings[-1]

    def embed(self, tasks: Iterable[int] | Tensor) -> Tensor:
        """(T, E) embeddings of task ids: integers, or an int64 tensor (T,) (no host sync)."""
        if isinstance(tasks, Tensor):
            return torch.stack(list(self.embeddings)).index_select(0, tasks)
        return torch.stack([self.embeddings[task] for task in tasks])

    def shared(self) -> list[Tensor]:
        """All that `forward` reads besides the embeddings."""
        layers: Any = [*self.trunk, self.output]
        return [tensor for layer in layers for tensor in (layer.weight, layer.bias)]

    def hidden(self, tasks: Iterable[int] | Tensor) -> Tensor:
        """(T, chunks, H) last hidden layer for each task; one chunk here."""
        first: Any = self.trunk[0]  # an nn.Linear
        return self._after_first(linear(self.embed(tasks), first.weight, first.bias))[:, None]

    def _after_first(self, first: Tensor) -> Tensor:
        hidden = F.elu(first)
        layers: Any = self.trunk[1:]
        for layer in layers:
            hidden = F.elu(linear(hidden, layer.weight, layer.bias))
        return hidden

    def forward(self, tasks: Iterable[int] | Tensor) -> Tensor:
        """(T, N) logits of task ids (T integers or an int64 tensor (T,)); the output layer is read once for all."""
        return self.logits(self.hidden(tasks))

    def logits(self, hidden: Tensor) -> Tensor:
        """(T, N) logits from the last hidden layer (T, chunks, H)."""
        logits = ops.hypernet_logits(hidden, self.output.weight, self.output.bias, self.size)
        return logits if self.averaging is None else self.averaging.of_gradient(logits)

    def factored_logits(
        self, hidden: Tensor, targets: tuple[Tensor, ...], task: int, stepper: OutputStepper
    ) -> tuple[Tensor, Tensor]:
        """Logits a_t (N,) of one task, and R over earlier ones. The output layer's gradient is kept in factors.

        Args:
            hidden: (t + 1, chunks, H) last hidden layer of tasks 0..t, or (1, chunks, H) of the task alone.
            targets: `drift_targets` of task t, or ().
            stepper: with `step_in_backward` R is 0 until backward has filled it in.
        """
        old = targets[0] if targets else hidden.new_empty(0, self.size)
        how = SteppedOutput if stepper.step_in_backward else FactoredOutput
        return how.apply(hidden[:, 0], self.output.weight, self.output.bias, old, task, self, stepper)

    def earlier_hidden(self, task: int) -> Tensor:
        """(earlier tasks, chunks, H) last hidden layer of the tasks before t, to the bit as in a pass with t itself.

        The last bits of a matrix product's rows can depend on how many rows there are. A drift that is to be 0 at the
        start of a task must be 0, because Adam makes full steps of however small a gradient.
        """
        return self.hidden(self.tasks(task))[:-1]

    @torch.no_grad()
    def drift_targets(self, task: int) -> tuple[Tensor, ...]:
        """What `output_drift` compares tasks 0..t-1 with while task t trains: here their (t, N) logits as of now.

        Of two ways to compute them, the one that agrees with the drift's own arithmetic to the bit.
        """
        hidden = self.earlier_hidden(task)
        targets = self.logits(hidden)
        if self.output_drift(hidden, (targets,)) != 0:
            targets = torch.cat([self.logits(row[None]) for row in hidden])
        return (targets,)

    def drift_target_shapes(self, task: int) -> tuple[tuple[int, ...], ...]:
        """Shapes of `drift_targets`."""
        return ((task, self.size),)

    def output_drift(self, hidden: Tensor, targets: tuple[Tensor, ...]) -> Tensor:
        """R = sum_{j<t} ||h*(e*_j) - h(e_j)||^2 over raw logits, in one read of the output layer for all tasks.

        Args:
            hidden: (t, chunks, H) `earlier_hidden` of task t; targets: its `drift_targets`.

        Returns:
            Scalar.
        """
        drift = ops.output_drift(hidden, self.output.weight, self.output.bias, *targets)
        return drift if self.averaging is None else self.averaging.of_gradient(drift)


class _WithoutRest(torch.autograd.Function):
    """(T, N) of whole chunks' outputs, without what is cut off at each tensor's end. One array in backward, where
    autograd would make several of N numbers."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, tensors: Sequence[int], padded: list[int]) -> Tensor:
        ctx.tensors, ctx.padded = list(tensors), padded
        parts = zip(whole.split(padded, 1), tensors, strict=True)
        return torch.cat([part[:, :entries] for part, entries in parts], 1)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator's signature)
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor, None, None]:
        whole = grad.new_zeros(len(grad), sum(ctx.padded))
        for part, given in zip(whole.split(ctx.padded, 1), grad.split(ctx.tensors, 1), strict=True):
            part[:, : given.shape[1]] = given
        return whole, None, None


class ChunkedHyperNetwork(HyperNetwork):
    """a_t = concatenation over chunks c of MLP([chunk embedding c, task embedding t]), cut to N entries.

    Chunk embeddings ~ N(0, 1) are shared by all tasks and trained. The first layer is split into a part per chunk
    and a part per task, added: T + chunks rows of work instead of T * chunks.

    Args:
        size: N; chunk_size: C entries per chunk, the last chunk truncated; others: see `HypernetConfig`.
        tensors: sizes that sum to N: each of them begins a chunk of its own and has its last chunk truncated.
    """

    factored = False  # its layer is small, its gradient ordinary

    def __init__(
        self,
        size: int,
        num_tasks: int,
        chunk_size: int,
        embedding: int,
        chunk_embedding: int,
        hidden: Iterable[int],
        tensors: Sequence[int] | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.tensors = (size,) if tensors is None else tuple(tensors)
        chunk_size = min(chunk_size, max(self.tensors))
        self.chunks = tuple(-(-entries // chunk_size) for entries in self.tensors)  # of each tensor
        self._build(size, num_tasks, embedding, chunk_embedding + embedding, tuple(hidden), rows=chunk_size)
        self.chunk_embeddings = nn.Parameter(torch.randn(sum(self.chunks), chunk_embedding))
        of_length = self._chunks_of_length() if len(self.tensors) > 1 else {}
        self.lengths = tuple(of_length)
        for length, chunks in of_length.items():
            self.register_buffer(f"chunks_of_{length}", torch.tensor(chunks), persistent=False)

    def _chunks_of_length(self) -> dict[int, list[int]]:
        """Which chunks generate how many entries: C, or fewer where a tensor ends."""
        found: dict[int, list[int]] = {}
        first, rows = 0, self.output.out_features
        for entries, chunks in zip(self.tensors, self.chunks, strict=True):
            for number in range(chunks):
                found.setdefault(min(rows, entries - number * rows), []).append(first + number)
            first += chunks
        return found

    def logits(self, hidden: Tensor) -> Tensor:
        """(T, N) logits from the last hidden layer (T, chunks, H)."""
        if not self.lengths:
            return super().logits(hidden)
        rows = self.output.out_features
        whole = ops.hypernet_logits(hidden, self.output.weight, self.output.bias, rows * hidden.shape[1])
        return _WithoutRest.apply(whole, self.tensors, [rows * chunks for chunks in self.chunks])

    def shared(self) -> list[Tensor]:
        return [*super().shared(), self.chunk_embeddings]

    def hidden(self, tasks: Iterable[int] | Tensor) -> Tensor:
        """(T, chunks, H) last hidden layer for each task and chunk."""
        first: Any = self.trunk[0]  # an nn.Linear
        of_chunk, of_task = first.weight.split(
            [self.chunk_embeddings.shape[1], first.in_features - self.chunk_embeddings.shape[1]], dim=1
        )
        per_chunk = F.linear(self.chunk_embeddings, of_chunk)
        per_task = linear(self.embed(tasks), of_task, first.bias)
        return self._after_first(per_chunk[None] + per_task[:, None])

    @torch.no_grad()
    def drift_targets(self, task: int) -> tuple[Tensor, ...]:
        """The output layer and its inputs as of now: smaller than the logits, and all that `output_drift` needs."""
        return (self.earlier_hidden(task), self.output.weight.clone(), self.output.bias.clone())

    def drift_target_shapes(self, task: int) -> tuple[tuple[int, ...], ...]:
        weight = self.output.weight.shape
        return ((task, len(self.chunk_embeddings), weight[1]), tuple(weight), (weight[0],))

    def output_drift(self, hidden: Tensor, targets: tuple[Tensor, ...]) -> Tensor:
        """R = sum_{j<t} ||h*(e*_j) - h(e_j)||^2 at a cost that does not grow with N; see `ops.chunked_output_drift`.

        Where chunks follow the tensors: a sum over lengths, of the chunks that generate so many entries, so that what
        is cut off does not count.
        """
        drift = self._drift(hidden, *targets)
        return drift if self.averaging is None else self.averaging.of_gradient(drift)

    def _drift(self, hidden: Tensor, old_hidden: Tensor, old_weight: Tensor, old_bias: Tensor) -> Tensor:
        layer = self.output
        if not self.lengths:
            return ops.chunked_output_drift(
                hidden, layer.weight, layer.bias, old_hidden, old_weight, old_bias, self.size
            )
        total = hidden.new_zeros(())
        for length in self.lengths:
            chunks: Any = getattr(self, f"chunks_of_{length}")
            new = hidden.index_select(1, chunks), layer.weight[:length], layer.bias[:length]
            old = old_hidden.index_select(1, chunks), old_weight[:length], old_bias[:length]
            total = total + ops.chunked_output_drift(*new, *old, length * len(chunks))
        return total
