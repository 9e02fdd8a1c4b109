"""MaskLayout: which parameters of a target network are masked, and where each lies in the flat mask."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

from ..ops.reference import kept_rank
from . import output, selection
from .selection import Rule


@dataclass(frozen=True)
class Segment:
    """One masked tensor's stretch of the flat mask.

    Attributes:
        name: the parameter's name in the target network, such as "fc1.weight".
        shape: its shape.
        start, stop: its entries in the flat mask.
        selected: False for the output layer's bias, which is used as it is: its mask |tanh a| has no threshold
            and enters the masked weight drift only.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    selected: bool = True

    @property
    def size(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class MaskLayout:
    """All masked tensors of a target network one after another: N entries in S segments.

    Logits, masks, drift targets and previous weights are arrays over this space; thresholds are arrays over its
    segments. The order is W1, b1, ..., Wn, bn: the order of the network's own parameters. `print(layout)` shows it.

    Attributes:
        segments: the masked tensors.
        rows: all parameters of the network, the shared ones and those per task too.
        heads: names of the output layers' biases, those too that are not masked.
        offsets: S + 1 borders of the segments.
        num_applied: segments up to the last one whose weight is multiplied by its mask.
    """

    segments: tuple[Segment, ...]
    rows: tuple[selection.Row, ...] = field(default=(), compare=False, repr=False)
    heads: tuple[str, ...] = field(default=(), compare=False, repr=False)
    offsets: tuple[int, ...] = field(init=False)
    num_applied: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "offsets", (0, *(segment.stop for segment in self.segments)))
        selected = [number for number, segment in enumerate(self.segments) if segment.selected]
        object.__setattr__(self, "num_applied", selected[-1] + 1 if selected else 0)

    @classmethod
    def of(
        cls,
        net: nn.Module,
        include: Rule | Iterable[Rule] | None = None,
        exclude: Rule | Iterable[Rule] | None = None,
        *,
        per_task: Rule | Iterable[Rule] | None = None,
        heads: str | Iterable[str] | None = None,
    ) -> "MaskLayout":
        """Layout over the weights and biases of `net` that are masked; see `HyperMask` for what the arguments say.

        Raises:
            InputError: not a module, one that a HyperMask model has already, nothing is left to mask, a rule
                matches nothing, or a parameter is not materialised.
        """
        table = selection.rows(net, include, exclude, per_task)
        segments, start = [], 0
        for row in table:
            if row.kind == selection.MASKED:
                segments.append(Segment(row.name, row.shape, start, start + row.entries))
                start += row.entries
        layout = cls(tuple(segments), tuple(table))
        return layout.with_output_biases(output.biases(net, table, heads))

    def with_output_biases(self, names: Iterable[str]) -> "MaskLayout":
        """The same with these segments used as they are, and all others masked by a threshold."""
        names = list(names)
        kept = set(names)
        segments = tuple(replace(segment, selected=segment.name not in kept) for segment in self.segments)
        return replace(self, segments=segments, heads=tuple(names))

    def __str__(self) -> str:
        """A table of all parameters of the network: name, shape, entries, masked / shared / per task, and why."""
        unselected = {segment.name for segment in self.segments if not segment.selected}
        return selection.printed(
            [replace(r, why="the output layer's bias: used as it is") if r.name in unselected else r for r in self.rows]
        )

    @property
    def size(self) -> int:
        """N, the number of generated entries."""
        return self.offsets[-1]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(segment.name for segment in self.segments)

    def ranks(self, sparsity: float, device: torch.device | str | None = None) -> Tensor:
        """(S,) int64 rank from which each segment's entries are kept at `sparsity` percent; see `kept_rank`."""
        values = [kept_rank(sparsity, segment.size) if segment.selected else 0 for segment in self.segments]
        return torch.tensor(values, dtype=torch.int64, device=device)

    def ramp_ranks(self, sparsities: Sequence[float], device: torch.device | str | None = None) -> Tensor:
        """(len(sparsities), S) int64: `ranks` of each."""
        last = np.array([segment.size - 1 if segment.selected else 0 for segment in self.segments])
        ranks = np.ceil(np.asarray(sparsities, dtype=np.float64)[:, None] * last / 100)
        return torch.from_numpy(ranks.astype(np.int64)).to(device)

    def views(self, flat: Tensor) -> list[Tensor]:
        """The segments of a flat (..., N) tensor as views (..., *shape of their parameter); one backward for all."""
        parts = flat.split([segment.size for segment in self.segments], -1)
        return [part.view(*flat.shape[:-1], *s.shape) for part, s in zip(parts, self.segments, strict=True)]

    def flatten(self, tensors: Sequence[Tensor]) -> Tensor:
        """(N,) copy of one tensor per segment."""
        return torch.cat([tensor.reshape(-1) for tensor in tensors])
