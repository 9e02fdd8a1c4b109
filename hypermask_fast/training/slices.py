"""Which part of a sharded tensor a rank holds."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import InputError
from ..model import HyperMask
from ..model_state import network_state

Region = tuple[tuple[int, int], ...]  # from where to where, in every dimension


def entire(shape: Sequence[int]) -> Region:
    return tuple((0, size) for size in shape)


def extent(region: Region) -> list[int]:
    """Its shape."""
    return [stop - start for start, stop in region]


def meet(one: Region, other: Region) -> bool:
    """Whether they have an entry in common."""
    return all(max(a, c) < min(b, d) for (a, b), (c, d) in zip(one, other, strict=True))


class Layout(NamedTuple):
    """How a DTensor is spread over processes.

    Attributes:
        mesh: the processes, a torch.distributed.DeviceMesh.
        placements: one per dimension of the mesh: at most one Shard, which cuts as torch.chunk does, or Replicate.
    """

    mesh: Any
    placements: tuple[Any, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> "Layout | None":
        """A DTensor's; None of an ordinary tensor, which every rank has whole.

        Raises:
            InputError: it is spread in another way.
        """
        mesh, placements = getattr(tensor, "device_mesh", None), getattr(tensor, "placements", ())
        if mesh is None:
            return None
        from torch.distributed.tensor import Replicate, Shard

        layout = cls(mesh, tuple(placements))
        kinds = [type(placement) for placement in placements]
        if kinds.count(Shard) > 1 or not all(kind in (Shard, Replicate) for kind in kinds):
            told = ", ".join(map(str, placements))
            raise InputError(f"one dimension of a mesh can shard a tensor, and others replicate it, unlike ({told})")
        return layout

    @property
    def dim(self) -> int | None:
        """The tensor's dimension that is cut; None where every rank has all."""
        return next((placement.dim for number, placement in enumerate(self.placements) if self._cuts(number)), None)

    def _cuts(self, number: int) -> bool:
        """Whether the mesh cuts the tensor in this one of its dimensions."""
        return self.placements[number].is_shard() and self.mesh.size(number) > 1

    def ends(self, size: int) -> tuple[int, int]:
        """From where to where this rank's slice goes in a dimension of that size; empty where there is nothing left."""
        number = next(number for number in range(self.mesh.ndim) if self._cuts(number))
        length = -(-size // self.mesh.size(number))
        start = min(length * self.mesh.get_local_rank(number), size)
        return start, min(start + length, size)

    def region(self, shape: Sequence[int]) -> Region:
        """This rank's part of a tensor of that shape."""
        return tuple(self.ends(size) if dim == self.dim else (0, size) for dim, size in enumerate(shape))

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a tensor of that shape can be spread so."""
        return self.dim is None or self.dim < len(shape)

    @property
    def first_replica(self) -> bool:
        """Whether this rank is the first of those that have the same part."""
        return all(self._cuts(number) or self.mesh.get_local_rank(number) == 0 for number in range(self.mesh.ndim))

    def tensor(self, part: Tensor, shape: Sequence[int]) -> Tensor:
        """The DTensor of that shape whose part here is `part`; nothing is sent."""
        from torch.distributed.tensor import DTensor

        strides = torch.empty(tuple(shape), device="meta").stride()
        return DTensor.from_local(
            part, self.mesh, self.placements, run_check=False, shape=torch.Size(shape), stride=strides
        )


def layouts(model: HyperMask, names: Sequence[str]) -> dict[str, Layout]:
    """Of every sharded tensor in a checkpoint of the model, by its name there.

    Args:
        names: what the tensors are called that follow the model's "NAME"; such as "model.{}", "optimizer.{}/exp_avg".
    """
    found: dict[str, Layout] = {}
    for name, tensor in network_state(model).items():
        if (layout := Layout.of(tensor)) is not None:
            found |= {pattern.format(name): layout for pattern in names}
    hypernet: Any = model.hypernet
    rows = Layout.of(getattr(hypernet, "chunk_embeddings", hypernet.output.weight))
    if rows is not None:
        from torch.distributed.tensor import Shard

        placements = tuple(Shard(1) if placement.is_shard() else placement for placement in rows.placements)
        found["anchor.targets.0"] = Layout(rows.mesh, placements)  # (tasks, rows, ...)
    return found
