"""One training step after another: eagerly, or captured once as a CUDA graph and replayed."""

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import chain, count

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data import Split, TensorSplit
from ..data.splits import Batch
from ..distributed import share
from ..model import HyperMask
from ..regularizers import Drifts
from .world import ALONE, World

Values = dict[str, Tensor]
_WARM_UP = 3  # eager steps before a capture: libraries make handles and workspaces in them, which a capture must not


@dataclass(frozen=True)
class TaskWork:
    """All that the steps of one task need, or a block of them.

    Attributes:
        split: the training data; rows: (steps, batch) int64 sample numbers of each step, where the split reads them.
        ranks: (steps, S) int64 kept ranks of each step (a sparsity ramp), or (1, S) for all.
        precision: "float32", or "bf16" to run the target network under autocast; thresholds, drifts and the
            optimiser stay in float32.
        world: the processes that train together: each has its share of every batch, and the mean of their losses is the
            batch's.
        seed, start: of the run; the task's iteration at which the first step is. They decide the ranks' own noise.
        drift_tasks: how many earlier tasks each step draws for the output drift; None: all.
        slopes: `DriftConfig.slopes`, once the first step has made them.
    """

    model: HyperMask
    task: int
    split: Split
    rows: Tensor
    ranks: Tensor
    optimizer: torch.optim.Adam
    precision: str
    world: World = ALONE
    seed: int = 0
    start: int = 0
    drift_tasks: int | None = None
    slopes: list[Tensor] = field(default_factory=list, init=False, repr=False, compare=False)

    def step(self, x: Tensor, y: Tensor, ranks: Tensor, weight: float = 1.0) -> Values:
        """One step on a batch; its loss and the loss's parts, scalars on the device, as they were before it.

        weight: what the batch's mean cross-entropy counts, see `distributed.share`.
        """
        model = self.model
        mask = model.mask(self.task, ranks=ranks, drift_tasks=self.drift_tasks)
        with self._autocast():
            logits = model(x, mask)
        cross_entropy = F.cross_entropy(logits.float() if self.precision == "bf16" else logits, y)
        if weight != 1:
            cross_entropy = weight * cross_entropy
        drifts = model.drifts(mask)
        self.optimizer.zero_grad(set_to_none=True)
        self._backward(cross_entropy, drifts)
        self.optimizer.step()
        with torch.no_grad():  # only now does a factored gradient know the output drift
            loss = model.drift.added_to(cross_entropy, drifts, self.task)
        return {
            "loss": loss,
            "cross_entropy": cross_entropy.detach(),
            "output_drift": drifts.output.detach(),
            "weight_drift": drifts.weight.detach(),
        }

    def _backward(self, cross_entropy: Tensor, drifts: Drifts) -> None:
        """The backward pass of the loss, begun at its parts: adding them up beforehand and scaling their gradients
        would be five launches on a GPU, for numbers that are the same in every step."""
        if not self.slopes:
            self.slopes.extend(self.model.drift.slopes(cross_entropy, drifts, self.task))
        roots = [(cross_entropy, self.slopes[0])]  # a first task's drifts are plain zeros
        roots += [(drift, slope) for drift, slope in zip(drifts, self.slopes[1:], strict=True) if drift.requires_grad]
        torch.autograd.backward([root for root, _ in roots], [slope for _, slope in roots])

    def _autocast(self) -> AbstractContextManager:
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(self.split.device.type, torch.bfloat16)


Block = tuple[Tensor, Tensor]  # rows and ranks, as `TaskWork` has them


def steps(work: TaskWork, graph: bool, say: Callable[[str], None], more: Iterable[Block] = ()) -> Iterator[Values]:
    """Does one step at each `next` and yields its values; on a GPU, on the current device.

    Args:
        graph: replay the whole step, the choice of its samples included, as a CUDA graph, where that can be done.
        say: is told why it can't.
        more: rows and ranks of the steps after those of `work`, no block longer than its own.
    """
    if not graph:
        return _eager(work, more)
    if work.world.several:
        say("training without a CUDA graph: several processes train together")
        return _eager(work, more)
    if not isinstance(work.split, TensorSplit):
        say("training without a CUDA graph: batches come from a Dataset, read on the host")
        return _eager(work, more)
    return _graphed(work, say, more)


def _eager(work: TaskWork, more: Iterable[Block]) -> Iterator[Values]:
    """All blocks by one call of the split, whose workers may read ahead and draw their seed once."""
    waiting: deque[Tensor] = deque()  # ranks of the rows that were asked for

    def rows_in_turn() -> Iterator[Tensor]:
        for rows, ranks in chain([(work.rows, work.ranks)], more):
            last = len(ranks) - 1
            for i, row in enumerate(rows):
                waiting.append(ranks[min(i, last)])
                yield row

    for done, (x, y, weight) in enumerate(_own_parts(work, rows_in_turn())):
        with work.world.own_noise(work.seed, work.task, work.start + done, 1):  # the network's, such as dropout
            values = work.step(x, y, waiting.popleft(), weight)
        yield values


def _own_parts(work: TaskWork, rows: Iterator[Tensor]) -> Iterator[tuple[Tensor, Tensor, float]]:
    """This rank's part of each batch, and what it counts.

    The samples are those of one process. A `TensorSplit` augments whole batches at once, by random numbers that every
    rank draws, and each takes its part of them. Other splits read the rank's own samples alone: where items are random,
    by noise of the rank's own.
    """
    world, split = work.world, work.split
    if not world.several:
        for x, y in split.batches(rows, train=True):
            yield x, y, 1.0
        return
    whole = isinstance(split, TensorSplit) and split.augment is not None
    part, weight = share(work.rows.shape[1], world.rank, world.size)
    batches = iter(split.batches(rows if whole else (row[part] for row in rows), train=True))
    for done in count():
        with nullcontext() if whole else world.own_noise(work.seed, work.task, work.start + done):
            batch: Batch | None = next(batches, None)
        if batch is None:
            return
        x, y = batch
        yield (x[part], y[part], weight) if whole else (x, y, weight)


def _graphed(work: TaskWork, say: Callable[[str], None], more: Iterable[Block]) -> Iterator[Values]:
    position = torch.zeros(1, dtype=torch.int64, device=work.rows.device)
    last = len(work.ranks) - 1

    def step() -> Values:
        row = work.rows.index_select(0, position)[0]
        ranks = work.ranks.index_select(0, position.clamp(max=last))[0]
        position.add_(1)
        return work.step(*work.split.batch(row, train=True), ranks)

    waits, side, replay = "", torch.cuda.Stream(), None
    for done in _numbered(work, more, position):
        if done < _WARM_UP:
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                if done == _WARM_UP - 1:
                    values, waits = _watched(step)
                else:
                    values = step()
            torch.cuda.current_stream().wait_stream(side)
            yield values
            continue
        if replay is None and waits:
            say(f"training without a CUDA graph: the step waits for the GPU: {waits}")
            replay = step
        elif replay is None:
            work.optimizer.zero_grad(set_to_none=True)  # gradients then live in the graph's own memory
            replay = _capture(step, say)
        yield replay()


def _numbered(work: TaskWork, more: Iterable[Block], position: Tensor) -> Iterator[int]:
    """0, 1, 2, ... for each step, with `position` at its row: each block of `more` in turn takes the place of the
    first one, which a captured step reads."""
    yield from range(len(work.rows))
    done = len(work.rows)
    for rows, ranks in more:
        work.rows[: len(rows)].copy_(rows)
        work.ranks[: len(ranks)].copy_(ranks)
        position.zero_()
        yield from range(done, done + len(rows))
        done += len(rows)


def _watched(step: Callable[[], Values]) -> tuple[Values, str]:
    """The step's values, and where it waited for the device, "" for nowhere: such a step can't be captured.

    Found out beforehand, because a capture that fails leaves the process's allocator and random numbers half captured.
    """
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            values = step()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    waits = [w for w in caught if "synchronizing CUDA operation" in str(w.message)]
    return values, f"{waits[0].filename}, line {waits[0].lineno}" if waits else ""


def _capture(step: Callable[[], Values], say: Callable[[str], None]) -> Callable[[], Values]:
    """The captured step, or `step` itself where something in it can't be captured."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    random_state = generator.clone_state()
    try:
        with torch.cuda.graph(graph):
            values = step()
    except RuntimeError as error:
        torch.cuda.set_stream(stream)  # PyTorch leaves the capture's own, and its random state, in place
        generator.graphsafe_set_state(random_state)
        say(f"training without a CUDA graph: the step can't be captured: {str(error).splitlines()[0]}")
        return step

    def replay() -> Values:
        graph.replay()
        return values

    return replay
