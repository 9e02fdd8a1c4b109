"""MaskLayout: which parameters of a target network are masked, and where each lies in the flat mask."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import prod

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import InputError
from ..ops.reference import kept_rank

MASKED_MODULES = (nn.Linear, nn.Conv2d)


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
    segments. The order is W1, b1, ..., Wn, bn: the order of the network's own parameters.
    """

    segments: tuple[Segment, ...]
    offsets: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "offsets", (0, *(segment.stop for segment in self.segments)))

    @classmethod
    def of(
        cls, net: nn.Module, include: Iterable[str] | None = None, exclude: Iterable[str] | None = None
    ) -> "MaskLayout":
        """Layout over the weights and biases of every nn.Linear and nn.Conv2d in `net`.

        Args:
            net: the target network. Other parameters (normalisation, embeddings, subclasses of Linear, ...) are
                shared by all tasks.
            include: shell patterns of parameter names, such as "features.*"; only matching ones are masked.
            exclude: shell patterns of parameter names left out.

        Raises:
            InputError: not a module, one that a HyperMask model has already, nothing is left to mask, a pattern
                matches nothing, or a parameter is not materialised.
        """
        if not isinstance(net, nn.Module):
            raise InputError(f"the target network must be an nn.Module, not {net!r}")
        candidates = _maskable(net)
        if not candidates:
            raise InputError(
                "the network has nothing to mask: no parameter of an nn.Linear or nn.Conv2d (subclasses don't count)"
            )
        chosen = _filtered([name for name, _ in candidates], include, exclude)
        last_name, last_parameter = candidates[-1]
        output_bias = last_name if last_parameter.dim() == 1 else None
        segments, start = [], 0
        for name, parameter in candidates:
            if name not in chosen:
                continue
            stop = start + parameter.numel()
            segments.append(Segment(name, tuple(parameter.shape), start, stop, selected=name != output_bias))
            start = stop
        return cls(tuple(segments))

    @property
    def size(self) -> int:
        """N, the number of generated entries."""
        return self.offsets[-1]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(segment.name for segment in self.segments)

    @property
    def num_applied(self) -> int:
        """Segments whose weights are multiplied by their mask: all but the output layer's bias."""
        return sum(segment.selected for segment in self.segments)

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


def _maskable(net: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Parameters of Linear and Conv2d in the network's order, a shared one once."""
    if any(getattr(m, name, None) is not None for m in net.modules() for name in ("weight_segment", "bias_segment")):
        raise InputError("the network is a HyperMask model's already: give each model a network of its own")
    owners = {
        id(parameter)
        for module in net.modules()
        if type(module) in MASKED_MODULES or getattr(module, "is_masked_layer", False)
        for parameter in module.parameters(recurse=False)
    }
    found = [(name, parameter) for name, parameter in net.named_parameters() if id(parameter) in owners]
    for name, parameter in found:
        if prod(parameter.shape) == 0:
            raise InputError(f"parameter {name} is empty: a masked tensor needs at least one entry")
    return found


def _filtered(names: list[str], include: Iterable[str] | None, exclude: Iterable[str] | None) -> set[str]:
    chosen = set(names) if include is None else set()
    for pattern in _patterns(include):
        chosen |= _matches(names, pattern, "include")
    for pattern in _patterns(exclude):
        chosen -= _matches(names, pattern, "exclude")
    if not chosen:
        raise InputError("the network has nothing to mask: include and exclude leave no parameter")
    return chosen


def _patterns(given: Iterable[str] | None) -> Iterable[str]:
    return [given] if isinstance(given, str) else given or ()


def _matches(names: list[str], pattern: str, which: str) -> set[str]:
    found = {name for name in names if fnmatchcase(name, pattern)}
    if not found:
        raise InputError(f"{which} pattern {pattern!r} matches none of the maskable parameters {', '.join(names)}")
    return found
