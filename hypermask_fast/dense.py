"""Hypernetworks: from a task's embedding to its flat mask logits, by one dense output layer."""

import weakref
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from . import trunk as trunks
from .checks import check_whole
from .errors import InputError
from .few_rows import linear
from .output_layer import FactoredOutput, OutputStepper, SteppedOutput, Work
from .processes import Processes, Shards, local, placed_like, whole

Layer = tuple[Tensor, Tensor]  # weight and bias


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
        processes: with whom it trains; None for one process. See `distributed.replicate` and `distributed.shard`.
        removed: ids of tasks that are no longer there; their embeddings stay in place, so that all others keep theirs.
    """

    factored = True
    processes: Processes | None = None
    removed: tuple[int, ...] = ()
    _stepper: "weakref.ref[OutputStepper] | None" = None

    def __init__(self, size: int, num_tasks: int, embedding: int, hidden: Iterable[int]) -> None:
        super().__init__()
        self._build(size, num_tasks, embedding, embedding, tuple(hidden), rows=size)

    def _build(
        self, size: int, num_tasks: int, embedding: int, inputs: int, hidden: tuple[int, ...], rows: int
    ) -> None:
        num_tasks = check_whole("num_tasks", num_tasks, 1)
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

    def _load_from_state_dict(  # pyright: ignore[reportIncompatibleMethodOverride]  # called by position
        self, state_dict: dict[str, Any], prefix: str, *args: Any
    ) -> None:
        """A sharded hypernetwork takes its own parts out of a whole state, an ordinary one wholes out of parts."""
        for name, parameter in self.named_parameters():
            if isinstance(found := state_dict.get(prefix + name), Tensor):
                state_dict[prefix + name] = placed_like(found, parameter)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def add_task(self) -> nn.Parameter:
        """One more embedding ~ N(0, 1), returned so that a running optimiser can be given it."""
        like = self.embeddings[0]
        embedding = nn.Parameter(torch.randn_like(like))
        if self.processes is not None:
            self.processes.ranks.make_equal([embedding])
        self.embeddings.append(embedding)
        return self.embeddings[-1]

    def embed(self, tasks: Iterable[int] | Tensor) -> Tensor:
        """(T, E) embeddings of task ids: integers, or an int64 tensor (T,) (no host sync)."""
        if not isinstance(tasks, Tensor):
            return torch.stack(self._one_by_one(tasks))
        if self.processes is not None:
            self.processes.asks(tasks)
        return torch.stack(list(self.embeddings)).index_select(0, tasks)

    def _one_by_one(self, tasks: Iterable[int]) -> list[Tensor]:
        if self.processes is not None:
            self.processes.asks(tasks)
        # A ParameterList makes a name of each index. Embeddings are in its dictionary in the order of the tasks.
        embeddings: Any = [*self.embeddings._parameters.values()]
        return [embeddings[task] for task in tasks]

    def generating(self, tasks: Iterable[int] | Tensor) -> tuple[Tensor, Layer]:
        """What generates logits: (T, chunks, H) last hidden layer for each task, and the output layer that is here.

        One chunk here; of a sharded hypernetwork's chunks those that are here.
        """
        hidden = self._hidden(tasks)
        return hidden if self.processes is None else self.processes.fanned_out(hidden)[0], self.layer()

    def shared(self) -> list[Tensor]:
        """All that `forward` reads besides the embeddings."""
        layers: Any = [*self.trunk, self.output]
        return [tensor for layer in layers for tensor in (layer.weight, layer.bias)]

    def hidden(self, tasks: Iterable[int] | Tensor) -> Tensor:
        """(T, chunks, H) last hidden layer for each task."""
        return self.generating(tasks)[0]

    def layer(self) -> Layer:
        """Weight and bias of the output layer: the rows that are in this process, all unless it is sharded."""
        return local(self.output.weight), local(self.output.bias)

    def _hidden(self, tasks: Iterable[int] | Tensor) -> Tensor:
        return self._trunk_of(tasks)[:, None]

    def _trunk_of(self, tasks: Iterable[int] | Tensor) -> Tensor:
        """(T, H) last hidden layer of a hypernetwork without chunks."""
        rows = self.embed(tasks) if isinstance(tasks, Tensor) else self._one_by_one(tasks)
        return trunks.trunk(rows, self._trunk_layers())

    def _trunk_layers(self) -> list[Layer]:
        layers: Any = self.trunk  # of nn.Linear
        return [(layer.weight, layer.bias) for layer in layers]

    def forward(self, tasks: Iterable[int] | Tensor) -> Tensor:
        """(T, N) logits of task ids (T integers or an int64 tensor (T,)); the output layer is read once for all."""
        return self.logits(*self.generating(tasks))

    def logits(self, hidden: Tensor, layer: Layer | None = None) -> Tensor:
        """(T, N) logits from the last hidden layer (T, chunks, H), and from `layer` where it is at hand."""
        own = self._own_logits(hidden, *(layer or self.layer()))
        return own if self.processes is None else self.processes.gathered(own)

    def _own_logits(self, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """(T, n) logits that are generated in this process."""
        return ops.hypernet_logits(hidden, weight, bias, len(weight))

    @torch.no_grad()
    def stretch(self, tasks: Iterable[int], start: int, stop: int) -> Tensor:
        """(T, stop - start) logits of these entries alone, for who can't hold all T x N; no gradient.

        The last bits can differ from those of `forward`, whose products are larger. A stretch lies within one masked
        tensor.

        Raises:
            InputError: the hypernetwork is sharded.
        """
        if isinstance(self.processes, Shards):
            raise InputError("a sharded hypernetwork's masks are not made in parts: load its checkpoint in one process")
        return self._stretch(tasks, start, stop)

    def _stretch(self, tasks: Iterable[int], start: int, stop: int) -> Tensor:
        weight, bias = self.output.weight[start:stop], self.output.bias[start:stop]
        return ops.hypernet_logits(self.hidden(tasks), weight, bias, stop - start)

    def factored_logits(
        self,
        tasks: Sequence[int],
        targets: tuple[Tensor, ...],
        task: int,
        stepper: OutputStepper,
        drawn: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Logits a_t (N,) of one task, and R over earlier ones. The output layer's gradient is kept in factors.

        Args:
            tasks: 0..t as far as they are there, or the task alone.
            targets: `drift_targets` of task t, or ().
            stepper: with `step_in_backward` R is 0 until backward has filled it in.
            drawn: see `regularizers.output_drift`. The trunk serves all tasks: its rows' last bits can depend on how
                many there are.
        """
        weight, bias = self.layer()
        old = local(targets[0]) if targets else weight.new_empty(0, len(weight))
        rows, layers = self._one_by_one(tasks), self._trunk_layers()
        flat = [tensor for layer in layers for tensor in layer]
        inside = trunks.served(rows, flat)  # the trunk as part of the same node
        used, scale = None, 1.0
        if drawn is not None:
            used = F.pad(drawn, (0, 1), value=len(rows) - 1)
            scale, old = len(old) / len(drawn), old.index_select(0, drawn)
        given = (*rows, *flat) if inside else (trunks.trunk(rows, layers),)
        work = Work(task, self, stepper, len(rows) if inside else 0, used, scale)
        how = SteppedOutput if stepper.step_in_backward else FactoredOutput
        return how.apply(work, weight, bias, old, *given)

    def earlier(self, task: int) -> tuple[Tensor, Layer]:
        """`generating` for the tasks before t, to the bit as in a pass with t itself.

        The last bits of a matrix product's rows can depend on how many rows there are. A drift that is to be 0 at the
        start of a task must be 0, because Adam makes full steps of however small a gradient.
        """
        hidden, layer = self.generating(self.tasks(task))
        return hidden[:-1], layer

    def earlier_hidden(self, task: int) -> Tensor:
        """(earlier tasks, chunks, H) last hidden layer of `earlier`."""
        return self.earlier(task)[0]

    @torch.no_grad()
    def drift_targets(self, task: int) -> tuple[Tensor, ...]:
        """What `output_drift` compares tasks 0..t-1 with while task t trains: here their (t, N) logits as of now.

        Of two ways to compute them, the one that agrees with the drift's own arithmetic to the bit.
        """
        hidden, layer = self.earlier(task)
        targets = self._own_logits(hidden, *layer)
        if self.output_drift(hidden, (targets,)) != 0:
            targets = torch.cat([self._own_logits(row[None], *layer) for row in hidden])
        return (targets if self.processes is None else self.processes.placed(targets, self.size),)

    def held_targets(self, targets: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """`drift_targets` out of a state, whole or in parts, as this process holds them."""
        if not targets:
            return ()
        of_tasks, *others = targets
        return (whole(of_tasks) if self.processes is None else self.processes.sliced(of_tasks, 1), *others)

    def drift_target_shapes(self, task: int) -> tuple[tuple[int, ...], ...]:
        """Shapes of `drift_targets`."""
        return ((task, self.size),)

    def output_drift(self, hidden: Tensor, targets: tuple[Tensor, ...], layer: Layer | None = None) -> Tensor:
        """R = sum_{j<t} ||h*(e*_j) - h(e_j)||^2 over raw logits, in one read of the output layer for all tasks.

        Args:
            hidden: (t, chunks, H) `earlier_hidden` of task t; targets: its `drift_targets`.
            layer: where it is at hand.

        Returns:
            Scalar.
        """
        own = self._own_drift(hidden, *(layer or self.layer()), *map(local, targets))
        return own if self.processes is None else self.processes.summed(own)

    def _own_drift(self, hidden: Tensor, weight: Tensor, bias: Tensor, *targets: Tensor) -> Tensor:
        """The part of R that comes of the logits that are generated in this process."""
        return ops.output_drift(hidden, weight, bias, *targets)


def after_first(first: Tensor, layers: Iterable[Layer]) -> Tensor:
    """A trunk from its first layer's sums on: elu(V elu(...) + c)."""
    hidden = F.elu(first)
    for weight, bias in layers:
        hidden = F.elu(linear(hidden, weight, bias))
    return hidden
