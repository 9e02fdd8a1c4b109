"""One training step after another: eagerly, or captured once as a CUDA graph and replayed."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data import Split, TensorSplit
from ..model import HyperMask
from ..optim import Adam

Values = dict[str, Tensor]
_WARM_UP = 3  # eager steps before a capture: libraries make handles and workspaces in them, which a capture must not


@dataclass(frozen=True)
class TaskWork:
    """All that the steps of one task need, or of what is left of it.

    Attributes:
        split: the training data; rows: (steps, batch) int64 sample numbers of each step.
        ranks: (steps, S) int64 kept ranks of each step (a sparsity ramp), or (1, S) for all.
        precision: "float32", or "bf16" to run the target network under autocast; thresholds, drifts and the
            optimiser stay in float32.
    """

    model: HyperMask
    task: int
    split: Split
    rows: Tensor
    ranks: Tensor
    optimizer: Adam
    precision: str

    def step(self, x: Tensor, y: Tensor, ranks: Tensor) -> Values:
        """One step on a batch; its loss and the loss's parts, scalars on the device, as they were before it."""
        model = self.model
        mask = model.mask(self.task, ranks=ranks)
        with self._autocast():
            logits = model(x, mask)
        cross_entropy = F.cross_entropy(logits.float() if self.precision == "bf16" else logits, y)
        drifts = model.drifts(mask)
        loss = cross_entropy + model.drift.loss(drifts, self.task)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():  # only now does a factored gradient know the output drift
            loss = cross_entropy + model.drift.loss(drifts, self.task)
        return {
            "loss": loss,
            "cross_entropy": cross_entropy.detach(),
            "output_drift": drifts.output.detach(),
            "weight_drift": drifts.weight.detach(),
        }

    def _autocast(self) -> contextlib.AbstractContextManager:
        if self.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.rows.device.type, torch.bfloat16)


def steps(work: TaskWork, graph: bool, say: Callable[[str], None]) -> Iterator[Values]:
    """Does one step at each `next` and yields its values.

    Args:
        graph: replay the whole step, the choice of its samples included, as a CUDA graph, where that can be done.
        say: is told why it can't.
    """
    if not graph:
        return _eager(work)
    if not isinstance(work.split, TensorSplit):
        say("training without a CUDA graph: batches come from a Dataset, read on the host")
        return _eager(work)
    return _graphed(work, say)


def _eager(work: TaskWork) -> Iterator[Values]:
    last = len(work.ranks) - 1
    for i, (x, y) in enumerate(work.split.batches(work.rows, train=True)):
        yield work.step(x, y, work.ranks[min(i, last)])


def _graphed(work: TaskWork, say: Callable[[str], None]) -> Iterator[Values]:
    position = torch.zeros(1, dtype=torch.int64, device=work.rows.device)
    last = len(work.ranks) - 1

    def step() -> Values:
        row = work.rows.index_select(0, position)[0]
        ranks = work.ranks.index_select(0, position.clamp(max=last))[0]
        position.add_(1)
        return work.step(*work.split.batch(row, train=True), ranks)

    side = torch.cuda.Stream()
    for _ in range(min(_WARM_UP, len(work.rows))):
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            values = step()
        torch.cuda.current_stream().wait_stream(side)
        yield values
    replay = _capture(step, work.optimizer, say)
    for _ in range(_WARM_UP, len(work.rows)):
        yield replay()


def _capture(step: Callable[[], Values], optimizer: Adam, say: Callable[[str], None]) -> Callable[[], Values]:
    """The captured step, or `step` itself where something in it can't be captured."""
    optimizer.zero_grad(set_to_none=True)  # gradients then live in the graph's own memory
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            values = step()
    except RuntimeError as error:
        say(f"training without a CUDA graph: the step can't be captured: {str(error).splitlines()[0]}")
        return step

    def replay() -> Values:
        graph.replay()
        return values

    return replay
