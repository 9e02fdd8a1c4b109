"""With whom a hypernetwork trains: what its processes send each other in a step, and what it means for gradients."""

import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .errors import InputError
from .ranks import Ranks, check_initialized
from .wrapping import is_dtensor

SHARD, REPLICATE = "shard", "replicate"  # the dimensions of a mesh
_KEYS = 2**20  # of what tasks ranks ask for; float32 has them all


def ranks_of(processes: "Processes | None") -> Ranks:
    """All processes that train a model together: of `HyperNetwork.processes`."""
    return Ranks() if processes is None else processes.ranks


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, differentiably: its part of a DTensor, all of any other."""
    dtensor: Any = tensor
    return dtensor.to_local() if is_dtensor(tensor) else tensor


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, of a DTensor too; then all its ranks call this."""
    dtensor: Any = tensor
    return dtensor.full_tensor() if is_dtensor(tensor) else tensor


@torch.no_grad()
def placed_like(value: Tensor, like: Tensor) -> Tensor:
    """A tensor's values as `like` is held: of a DTensor its own part, where each rank has all values; or else whole.

    Where the value itself is a DTensor of other slices, all its ranks call this.
    """
    dtensor: Any = like
    if is_dtensor(value):
        other: Any = value
        if is_dtensor(like) and other.device_mesh == dtensor.device_mesh and other.placements == dtensor.placements:
            return value
        value = whole(value)
    if not is_dtensor(like) or value.shape != like.shape:
        return value
    return _own_part(value, dtensor.device_mesh, dtensor.placements)


def _own_part(value: Tensor, mesh: Any, placements: Sequence[Any]) -> Tensor:
    from torch.distributed.tensor import distribute_tensor

    part: Any = distribute_tensor(value.to(mesh.device_type), mesh, placements, src_data_rank=None)
    return part


class Processes:
    """The processes that train one model together. Each has logits of its own `Shards`, or all of them (`Replicas`).

    In a step they exchange the logits, the gradient of the logits with that of the output drift, and the gradient of
    the hidden vectors with the drift's value. All that follows is then the same on every rank, or its owner's alone;
    the output layer's gradient, N x H, is never sent. All processes make the same calls in the same order.

    Args:
        group: torch.distributed's, of all of them; None for all processes there are.

    Attributes:
        ranks: all of them, and what else they tell each other.
    """

    def __init__(self, group: Any = None) -> None:
        self.ranks = Ranks.of(group)

    def __deepcopy__(self, memo: dict) -> "Processes":
        return self  # a copied model goes on with the same processes

    def asks(self, tasks: Iterable[int] | Tensor) -> None:
        """Told of the tasks whose logits are generated next, which must be the same on all ranks."""

    # -- the three exchanges, without gradient ----------------------------------------------------------------------

    def gather(self, logits: Tensor, *values: Tensor) -> list[Tensor]:
        """(T, N) logits from everyone's own (T, n), and the sums of the values, which are scalars."""
        raise NotImplementedError

    def means(self, grad: Tensor, *values: Tensor) -> list[Tensor]:
        """(T, n) own part of the mean of everyone's gradient of the logits (T, N), and the values' means."""
        raise NotImplementedError

    def sums(self, *tensors: Tensor) -> list[Tensor]:
        """The sums of what each owner's logits have contributed."""
        raise NotImplementedError

    def placed(self, own: Tensor, length: int, dim: int = 1) -> Tensor:
        """What is sliced along a dimension as the logits or chunks are, of that length in all: a DTensor of it."""
        return own

    def sliced(self, value: Tensor, dim: int) -> Tensor:
        """Of a tensor of which every rank has all, or a DTensor: as this process holds it, sliced along a dimension."""
        return whole(value)

    def on_first(self, work: Callable[[], Any]) -> None:
        """Does some work: where parts of it are everywhere and all call this, on the first rank alone."""
        work()

    # -- differentiable -----------------------------------------------------------------------------------------------

    def gathered(self, logits: Tensor) -> Tensor:
        """(T, N) logits from own ones (T, n); the gradient is the mean of everyone's."""
        return _Gathered.apply(logits, self)

    def summed(self, value: Tensor) -> Tensor:
        """The sum of everyone's scalar; the gradient is the mean of everyone's."""
        return _Summed.apply(value, self)

    def fanned_out(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Tensors that are the same everywhere, for own logits: their gradients are summed, in one exchange."""
        raise NotImplementedError

    # -- what else ----------------------------------------------------------------------------------------------------

    def mean(self, *tensors: Tensor) -> list[Tensor]:
        """The tensors' means over all processes, in one all-reduce."""
        flat = _flat(tensors)
        self.ranks.meet(("mean", [tensor.shape for tensor in tensors]))
        self.ranks.sum_(flat)
        return _parts(flat.div_(self.ranks.size), tensors)

    @staticmethod
    def _all_reduce(flat: Tensor, group: Any) -> None:
        check_initialized()
        dist.all_reduce(flat, group=group)


class Replicas(Processes):
    """Every process has the whole hypernetwork: the gradient of its logits is averaged, N numbers."""

    def __reduce__(self) -> tuple[type, tuple]:
        return type(None), ()  # one that is loaded is in a process of its own

    def gather(self, logits: Tensor, *values: Tensor) -> list[Tensor]:
        return [logits, *values]

    def means(self, grad: Tensor, *values: Tensor) -> list[Tensor]:
        return self.mean(grad, *values)

    def sums(self, *tensors: Tensor) -> list[Tensor]:
        return list(tensors)

    def fanned_out(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tensors


class Shards(Processes):
    """Every process has a slice of the hypernetwork's logits, and what generates it.

    Logits are gathered and their gradients scattered by all-to-all: slices may differ in length, and each number is
    sent once. (Gloo gathers equal slices only, and reduces and scatters at the price of an all-reduce.)

    Args:
        mesh: of all processes; its dimension "shard" has those whose slices make up the whole, and "replicate", where
            there is one, those that have the same slice.
        sizes: entries of each slice, in the order of "shard", which sum to N.
    """

    def __init__(self, mesh: Any, sizes: Sequence[int]) -> None:
        super().__init__()
        self.mesh, self.sizes = mesh, tuple(sizes)
        self.owners = mesh.get_group(SHARD)
        self.replicas = mesh.get_group(REPLICATE) if mesh.ndim > 1 else None
        self.number = mesh.get_local_rank(SHARD)
        self._asked = 0

    def __reduce__(self) -> Any:
        raise InputError(
            "a sharded model can't be pickled: model.save_pretrained(folder) writes it whole, and "
            "torch.distributed.checkpoint its state_dict"
        )

    def asks(self, tasks: Iterable[int] | Tensor) -> None:
        if torch.compiler.is_compiling():
            return
        at_hand = not isinstance(tasks, Tensor) or tasks.device.type == "cpu"
        self._asked = zlib.crc32(repr([int(task) for task in tasks]).encode()) % _KEYS if at_hand else 0

    def placements(self, dim: int) -> list[Any]:
        """Of a DTensor that is sliced along a dimension."""
        from torch.distributed.tensor import Replicate, Shard  # a second, which only who shards waits for

        return [*([Replicate()] if self.replicas is not None else []), Shard(dim)]

    def placed(self, own: Tensor, length: int, dim: int = 1) -> Tensor:
        from torch.distributed.tensor import DTensor

        own = own.contiguous()
        shape = torch.Size([*own.shape[:dim], length, *own.shape[dim + 1 :]])
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(own, self.mesh, self.placements(dim), run_check=False, shape=shape, stride=stride)

    def sliced(self, value: Tensor, dim: int) -> Tensor:
        placements = self.placements(dim)
        if is_dtensor(value):
            other: Any = value
            if other.device_mesh == self.mesh and list(other.placements) == placements:
                return value
        return _own_part(whole(value), self.mesh, placements)

    def on_first(self, work: Callable[[], Any]) -> None:
        """Raises on every rank what has gone wrong on the first one."""
        with self.ranks.together():
            if self.ranks.first:
                work()

    def gather(self, logits: Tensor, *values: Tensor) -> list[Tensor]:
        tasks, count = logits.shape[0], len(self.sizes)
        self.ranks.meet(
            ("gather", tasks, len(values), self._asked),
            "ranks ask a sharded model for masks of different tasks, or make different calls of it: all make the same ones",
        )
        asked = logits.new_full((1,), 0 if torch.compiler.is_compiling() else self._asked)
        own, ends = _flat([logits, *values, asked]), len(values) + 1
        lengths = [tasks * size + ends for size in self.sizes]
        received = self._all_to_all(own.repeat(count), [len(own)] * count, lengths)
        parts = [part.split([tasks * size, ends]) for part, size in zip(received, self.sizes, strict=True)]
        whole = torch.cat([part.view(tasks, -1) for part, _ in parts], 1)
        *rest, theirs = torch.stack([end for _, end in parts]).unbind(1)
        return [self._of_same_tasks(whole, theirs), *(each.sum() for each in rest)]

    def _of_same_tasks(self, logits: Tensor, asked: Tensor) -> Tensor:
        """The logits; NaN on a GPU where ranks have generated those of different tasks, which it can't wait to tell."""
        return logits if logits.device.type == "cpu" else logits.masked_fill((asked != asked[0]).any(), float("nan"))

    def means(self, grad: Tensor, *values: Tensor) -> list[Tensor]:
        tasks, count, scalars = grad.shape[0], len(self.sizes), [value.reshape(1) for value in values]
        self.ranks.meet(("means", tasks, len(values), self._asked))
        parts = [piece for part in grad.split(self.sizes, 1) for piece in (part.reshape(-1), *scalars)]
        lengths = [tasks * size + len(values) for size in self.sizes]
        received = self._all_to_all(torch.cat(parts), lengths, [lengths[self.number]] * count)
        own = torch.stack(received).sum(0)
        if self.replicas is not None:
            self._all_reduce(own, self.replicas)
        own /= self.ranks.size
        part, rest = own.split([len(own) - len(values), len(values)])
        return [part.view(tasks, -1), *(mean.view_as(value) for mean, value in zip(rest, values, strict=True))]

    def _all_to_all(self, sent: Tensor, lengths: list[int], received: list[int]) -> tuple[Tensor, ...]:
        check_initialized()
        here = sent.new_empty(sum(received))
        dist.all_to_all_single(here, sent, received, lengths, group=self.owners)
        return here.split(received)

    def sums(self, *tensors: Tensor) -> list[Tensor]:
        flat = _flat(tensors)
        self.ranks.meet(("sums", [tensor.shape for tensor in tensors], self._asked))
        self._all_reduce(flat, self.owners)
        return _parts(flat, tensors)

    def fanned_out(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return _FannedOut.apply(self, *tensors) if torch.is_grad_enabled() else tensors


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """A new tensor of all of them, one after another."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _parts(flat: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """`_flat` undone: parts of `flat` in the tensors' shapes."""
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, processes: Processes) -> Tensor:
        ctx.processes = processes
        return processes.gather(logits)[0]

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator hides the names
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor, None]:
        return ctx.processes.means(*grads)[0], None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, processes: Processes) -> Tensor:
        ctx.processes = processes
        return processes.sums(value)[0]

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor, None]:
        return ctx.processes.mean(*grads)[0], None


class _FannedOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, processes: Processes, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.processes = processes
        ctx.set_materialize_grads(False)
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        there = {i: g for i, g in enumerate(grads) if g is not None and ctx.needs_input_grad[1 + i]}
        summed = dict(zip(there, ctx.processes.sums(*there.values()), strict=True)) if there else {}
        return None, *(summed.get(i) for i in range(len(grads)))
