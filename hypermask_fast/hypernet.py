"""Hypernetworks: from a task's embedding to its flat mask logits, dense or in chunks."""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from .errors import InputError
from .ops.once import differentiable_once


@dataclass(frozen=True)
class HypernetConfig:
    """Shape of a hypernetwork.

    Attributes:
        embedding: size E of a task's embedding.
        hidden: widths of the hidden layers (ELU); the last one is H.
        chunk_size: None for one dense output layer of N rows; C to generate the output in chunks of C entries.
        chunk_embedding: size of a chunk's embedding, for a chunked hypernetwork.
    """

    embedding: int = 48
    hidden: tuple[int, ...] = (100,)
    chunk_size: int | None = None
    chunk_embedding: int = 8

    def __post_init__(self) -> None:
        hidden = self.hidden if isinstance(self.hidden, Iterable) else (self.hidden,)
        object.__setattr__(self, "hidden", tuple(hidden))
        for name in ("embedding", "chunk_embedding", "chunk_size"):
            value = getattr(self, name)
            if name == "chunk_size" and value is None:
                continue
            if not _is_size(value):
                raise InputError(f"hypernetwork {name} must be a positive integer, not {value!r}")
        if not self.hidden or not all(_is_size(width) for width in self.hidden):
            raise InputError(f"hypernetwork hidden must list one or more positive widths, not {self.hidden!r}")

    def build(self, size: int, num_tasks: int) -> "HyperNetwork":
        """The hypernetwork of this shape for `size` entries and `num_tasks` tasks."""
        if self.chunk_size is None:
            return HyperNetwork(size, num_tasks, self.embedding, self.hidden)
        return ChunkedHyperNetwork(size, num_tasks, self.chunk_size, self.embedding, self.chunk_embedding, self.hidden)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


class OutputStepper(Protocol):
    """Who steps the dense output layer within the backward pass: the one-pass step, see `HyperNetwork.step_with`.

    Attributes:
        exact_loss: whether the forward pass is to give the output drift's value; otherwise backward fills it in.
    """

    exact_loss: bool

    def step_output_layer(
        self, hidden: Tensor, grad_logits: Tensor, targets: Tensor, drift_weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients of hidden (t + 1, H), and R, before the step that this call makes; see `ops.hypernet_adam`."""
        ...

    def replaced(self) -> None:
        """Another one steps the layer from now on."""
        ...


class HyperNetwork(nn.Module):
    """a_t = W elu(... elu(V1 e_t + c1) ...) + b: an MLP from task embedding to N logits.

    Embeddings e_t ~ N(0, 1), one trained Parameter per task, so that `add_task` leaves every existing Parameter,
    and an optimiser that holds it, as they are. Linear layers keep PyTorch's own initialisation.

    Args:
        size: N, entries generated.
        num_tasks: embeddings to begin with.
        embedding, hidden: see `HypernetConfig`.

    Attributes:
        factored: whether the output layer can be stepped on its gradient's factors, within the backward pass.
    """

    factored = True
    _stepper: "weakref.ref[OutputStepper] | None" = None

    def __init__(self, size: int, num_tasks: int, embedding: int, hidden: Iterable[int]) -> None:
        super().__init__()
        self._build(size, num_tasks, embedding, embedding, tuple(hidden), rows=size)

    def _build(
        self, size: int, num_tasks: int, embedding: int, inputs: int, hidden: tuple[int, ...], rows: int
    ) -> None:
        if not _is_size(num_tasks):
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
        """Lets `stepper` step the output layer for as long as it lives, in place of whoever did so before; None:
        nobody does, the layer has an ordinary gradient."""
        if (before := self.stepper) is not None:
            before.replaced()
        self._stepper = None if stepper is None else weakref.ref(stepper)

    @property
    def stepper(self) -> OutputStepper | None:
        return None if self._stepper is None else self._stepper()

    @property
    def num_tasks(self) -> int:
        return len(self.embeddings)

    def add_task(self) -> nn.Parameter:
        """One more embedding ~ N(0, 1), returned so that a running optimiser can be given it."""
        like = self.embeddings[0]
        self.embeddings.append(nn.Parameter(torch.randn_like(like)))
        return self.embeddings[-1]

    def embed(self, tasks: Iterable[int] | Tensor) -> Tensor:
        """(T, E) embeddings of task ids: integers, or an int64 tensor (T,) (no host sync)."""
        if isinstance(tasks, Tensor):
            return torch.stack(list(self.embeddings)).index_select(0, tasks)
        return torch.stack([self.embeddings[task] for task in tasks])

    def hidden(self, tasks: Iterable[int] | Tensor) -> Tensor:
        """(T, chunks, H) last hidden layer for each task; one chunk here."""
        return self._after_first(self.trunk[0](self.embed(tasks)))[:, None]

    def _after_first(self, first: Tensor) -> Tensor:
        hidden = F.elu(first)
        for layer in self.trunk[1:]:
            hidden = F.elu(layer(hidden))
        return hidden

    def forward(self, tasks: Iterable[int] | Tensor) -> Tensor:
        """(T, N) logits of task ids (T integers or an int64 tensor (T,)); the output layer is read once for all."""
        return self.logits(self.hidden(tasks))

    def logits(self, hidden: Tensor) -> Tensor:
        """(T, N) logits from the last hidden layer (T, chunks, H)."""
        return ops.hypernet_logits(hidden, self.output.weight, self.output.bias, self.size)

    def stepped_logits(self, hidden: Tensor, targets: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Logits a_t (N,) of the current task, and R over the earlier ones; their backward steps the output layer.

        Args:
            hidden: (t + 1, chunks, H) last hidden layer of tasks 0..t; targets: `drift_targets` of task t, or ().
        """
        rows = hidden[:, 0]
        old = targets[0] if targets else hidden.new_empty(0, self.size)
        return _SteppedOutput.apply(rows, old, self.output, self.stepper)

    def earlier_hidden(self, task: int) -> Tensor:
        """(t, chunks, H) last hidden layer of tasks 0..t-1, to the bit as in a pass over tasks 0..t.

        The last bits of a matrix product's rows depend on how many rows there are. A drift that is to be 0 at the
        start of a task must be 0, because Adam makes full steps of however small a gradient.
        """
        return self.hidden(range(task + 1))[:task]

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

    def output_drift(self, hidden: Tensor, targets: tuple[Tensor, ...]) -> Tensor:
        """R = sum_{j<t} ||h*(e*_j) - h(e_j)||^2 over raw logits, in one read of the output layer for all tasks.

        Args:
            hidden: (t, chunks, H) `earlier_hidden` of task t; targets: its `drift_targets`.

        Returns:
            Scalar.
        """
        return ops.output_drift(hidden, self.output.weight, self.output.bias, *targets)


def _differentiable_once(backward: Callable) -> Callable:
    return differentiable_once("the one-pass step", backward, "optim.Adam(..., gradient='dense') is the way for it")


class _SteppedOutput(torch.autograd.Function):
    """The dense output layer for the current task, whose backward pass is also its step."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, output: nn.Linear, stepper: OutputStepper
    ) -> tuple[Tensor, Tensor]:
        weight, bias = output.weight, output.bias
        logits = ops.hypernet_logits(hidden[-1:, None], weight, bias, weight.shape[0])[0]
        if stepper.exact_loss:
            drift = ops.output_drift(hidden[:-1, None], weight, bias, targets)
        else:
            drift = hidden.new_zeros(())
        ctx.save_for_backward(hidden, targets)
        ctx.stepper, ctx.drift = stepper, drift.detach()  # shares its memory: backward fills the value in
        return logits, drift

    @staticmethod
    @_differentiable_once
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, targets = ctx.saved_tensors
        grad_logits, grad_drift = grads
        hidden_grad, drift = ctx.stepper.step_output_layer(hidden, grad_logits, targets, grad_drift)
        ctx.drift.copy_(drift)
        return hidden_grad, None, None, None


class ChunkedHyperNetwork(HyperNetwork):
    """a_t = concatenation over chunks c of MLP([chunk embedding c, task embedding t]), cut to N entries.

    Chunk embeddings ~ N(0, 1) are shared by all tasks and trained. The first layer is split into a part per chunk
    and a part per task, added: T + chunks rows of work instead of T * chunks.

    Args:
        size: N; chunk_size: C entries per chunk, the last chunk truncated; others: see `HypernetConfig`.
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
    ) -> None:
        nn.Module.__init__(self)
        chunk_size = min(chunk_size, size)
        chunks = -(-size // chunk_size)
        self._build(size, num_tasks, embedding, chunk_embedding + embedding, tuple(hidden), rows=chunk_size)
        self.chunk_embeddings = nn.Parameter(torch.randn(chunks, chunk_embedding))

    def hidden(self, tasks: Iterable[int] | Tensor) -> Tensor:
        """(T, chunks, H) last hidden layer for each task and chunk."""
        first: Any = self.trunk[0]  # an nn.Linear
        of_chunk, of_task = first.weight.split(
            [self.chunk_embeddings.shape[1], first.in_features - self.chunk_embeddings.shape[1]], dim=1
        )
        per_chunk = F.linear(self.chunk_embeddings, of_chunk, first.bias)
        per_task = F.linear(self.embed(tasks), of_task)
        return self._after_first(per_chunk[None] + per_task[:, None])

    @torch.no_grad()
    def drift_targets(self, task: int) -> tuple[Tensor, ...]:
        """The output layer and its inputs as of now: smaller than the logits, and all that `output_drift` needs."""
        return (self.earlier_hidden(task), self.output.weight.clone(), self.output.bias.clone())

    def output_drift(self, hidden: Tensor, targets: tuple[Tensor, ...]) -> Tensor:
        """R = sum_{j<t} ||h*(e*_j) - h(e_j)||^2 at a cost that does not grow with N; see `ops.chunked_output_drift`."""
        old_hidden, old_weight, old_bias = targets
        layer = self.output
        return ops.chunked_output_drift(hidden, layer.weight, layer.bias, old_hidden, old_weight, old_bias, self.size)
