"""The processes that save and load a checkpoint together: what one of them can't do, all of them refuse."""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import InputError
from ..model import HyperMask


class Ranks:
    """Processes that all make the same calls, in the same order.

    Args:
        groups: torch.distributed's process groups, one per dimension of the mesh that the processes form; none for
            this process alone.
    """

    def __init__(self, groups: Sequence[Any] = ()) -> None:
        self.groups = tuple(groups)

    @classmethod
    def of_tensors(cls, tensors: Iterable[Tensor]) -> "Ranks":
        """Those among which DTensors are spread; this process alone where there is none.

        Raises:
            InputError: the tensors are spread over several sets of processes.
        """
        meshes = {mesh for tensor in tensors if (mesh := getattr(tensor, "device_mesh", None)) is not None}
        if len({tuple(sorted(mesh.mesh.flatten().tolist())) for mesh in meshes}) > 1:
            raise InputError("a checkpoint's tensors are sharded over different sets of processes: shard all over one")
        return cls(meshes.pop().get_all_groups()) if meshes else cls()

    @classmethod
    def of_model(cls, model: HyperMask) -> "Ranks":
        """Those that train the model together, as `distributed.shard` or `distributed.replicate` has said."""
        ranks = cls.of_tensors(model.parameters())
        processes = model.hypernet.processes
        return cls([processes.group]) if not ranks.groups and processes is not None else ranks

    @property
    def first(self) -> bool:
        """Whether this process is the first one of all."""
        return all(dist.get_rank(group) == 0 for group in self.groups)

    def gathered(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of ranks; the value is what JSON can say."""
        values = [value]
        for group in reversed(self.groups):
            values = [each for of_rank in _gathered(values, group) for each in of_rank]
        return values

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block in which no rank speaks with another. Where it raises an error on one, all raise InputError.

        Raises:
            InputError: with the first such rank's message, and its number where not all have the same one.
        """
        if not self.groups:
            yield
            return
        mine: Exception | None = None
        try:
            yield
        except Exception as error:
            mine = error
        told = self.gathered(None if mine is None else [dist.get_rank(), _line(mine)])
        if mine is not None and not isinstance(mine, InputError):
            raise mine
        if failed := [each for each in told if each is not None]:
            rank, line = failed[0]
            alike = len(failed) == len(told) and all(text == line for _, text in failed)
            raise InputError(line if alike else f"rank {rank}: {line}") from mine


def _line(error: Exception) -> str:
    if isinstance(error, InputError):
        return str(error)
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _gathered(value: Any, group: Any) -> list[Any]:
    """The value of every rank of one group. As JSON, since torch's own call for objects unpickles them."""
    on_cpu = "cpu:" in dist.get_backend_config(group)
    device = torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())
    mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
    ranks = range(dist.get_world_size(group))
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in ranks]
    dist.all_gather(lengths, torch.tensor([len(mine)], device=device), group=group)
    longest = max(int(length) for length in lengths)
    texts = [torch.zeros(longest, dtype=torch.uint8, device=device) for _ in ranks]
    dist.all_gather(texts, torch.nn.functional.pad(mine, (0, longest - len(mine))), group=group)
    return [json.loads(bytes(text[: int(length)].tolist())) for text, length in zip(texts, lengths, strict=True)]
