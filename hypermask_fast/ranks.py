"""The processes that train or save one model together, and what they tell each other."""

import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import InputError

R = TypeVar("R", bound="Ranks")
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Ranks:
    """Processes that all make the same calls, in the same order.

    In one process (`Ranks()`) nothing is sent, and torch.distributed is not asked.

    Attributes:
        rank: which of them this one is; size: how many there are.
        group: torch.distributed's; None for all processes.
        device: where tensors are that they send besides those of a model.
    """

    rank: int = 0
    size: int = 1
    group: Any = None
    device: torch.device = _CPU

    @classmethod
    def of(cls: type[R], group: Any = None) -> R:
        """Those of a process group; None: all processes. Raises InputError where there is no process group."""
        check_initialized()
        on_cpu = "cpu:" in str(dist.get_backend_config(group))
        device = _CPU if on_cpu else torch.device("cuda", torch.cuda.current_device())
        return cls(dist.get_rank(group), dist.get_world_size(group), group, device)

    def __deepcopy__(self: R, memo: dict) -> R:
        return self  # a copied model goes on with the same processes

    def __reduce__(self) -> tuple[type, tuple]:
        return type(None), ()  # one that is loaded is in a process of its own

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and speaks for all."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        return self.size > 1

    # -- tensors --------------------------------------------------------------------------------------------------

    def sum_(self, tensor: Tensor) -> None:
        """Puts the sum over the ranks in the tensor's place."""
        if self.several:
            check_initialized()
            dist.all_reduce(tensor, group=self.group)

    def mean_(self, tensor: Tensor) -> None:
        """Puts the mean over the ranks in the tensor's place."""
        tensor /= self.size  # before they are added: float16 ends at 65504
        self.sum_(tensor)

    def gathered(self, tensor: Tensor) -> Tensor:
        """(K, ...) every rank's tensor, in the order of the ranks."""
        if not self.several:
            return tensor[None]
        found = tensor.new_empty(self.size, *tensor.shape)
        dist.all_gather(list(found), tensor.contiguous(), group=self.group)
        return found

    @torch.no_grad()
    def make_equal(self, tensors: Iterable[Tensor], first: int = 0) -> None:
        """Gives every rank the tensors of the group's first one, or of another."""
        if not self.several:
            return
        source = first if self.group is None else dist.get_global_rank(self.group, first)
        for tensor in tensors:
            values = tensor.contiguous()
            dist.broadcast(values, src=source, group=self.group)
            tensor.copy_(values)

    def meet(self, exchange: Any, different: str = "") -> None:
        """Before an exchange of tensors: sees that all ranks have come to the same one.

        Ranks that are not in the same call would wait for each other without end, or take what was sent for something
        else. Only on CPUs, by a number of each rank: on GPUs it would be a wait for the device.

        Args:
            exchange: what it is and of which sizes, the same on all ranks; compared by its repr.
            different: what is told where it is not.

        Raises:
            InputError: on all ranks, where they are about to exchange different things.
        """
        if not self.several or self.device.type != "cpu" or torch.compiler.is_compiling():
            return
        mine = torch.tensor([zlib.crc32(repr(exchange).encode())])
        if bool((self.gathered(mine) != mine).any()):
            raise InputError(
                different
                or "ranks make different calls of a model: all make the same ones, of the same tasks, in the same order"
            )

    # -- words ----------------------------------------------------------------------------------------------------

    def told(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of the ranks; the value is what JSON can say.

        As JSON, because torch.distributed's own call for objects unpickles them.
        """
        if not self.several:
            return [value]
        mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(self.device)
        lengths = self.gathered(torch.tensor(len(mine), device=self.device)).tolist()
        texts = self.gathered(torch.nn.functional.pad(mine, (0, max(lengths) - len(mine))))
        return [json.loads(bytes(text[:length].tolist())) for text, length in zip(texts, lengths, strict=True)]

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block in which no rank speaks with another. Where it raises an error on one, all raise InputError.

        Raises:
            InputError: with the first such rank's message, and its number where not all have the same one.
        """
        if not self.several:
            yield
            return
        mine: Exception | None = None
        try:
            yield
        except Exception as error:
            mine = error
        told = self.told(None if mine is None else _line(mine))
        if mine is not None and not isinstance(mine, InputError):
            raise mine
        failed = [rank for rank, line in enumerate(told) if line is not None]
        if failed:
            line = told[failed[0]]
            alike = all(each == line for each in told)
            raise InputError(line if alike else f"rank {failed[0]}: {line}") from mine

    def check_same(self, facts: Mapping[str, Any], what: str = "a run") -> None:
        """Compares digests of what must be the same on all ranks.

        Args:
            facts: what it is called, "data" or "settings" -> bytes, or what is compared by its repr.
            what: that needs them to be the same, for the message.

        Raises:
            InputError: on all ranks: which ones have something else than the first one.
        """
        if not self.several:
            return
        for some in ({"version of this package": list(facts)}, facts):  # other facts' digests are of another shape
            contents = [value if isinstance(value, bytes) else repr(value).encode() for value in some.values()]
            mine = torch.tensor([list(sha256(content).digest()) for content in contents], dtype=torch.uint8)
            theirs = self.gathered(mine.to(self.device)).cpu()
            for number, name in enumerate(some):
                others = (theirs[:, number] != theirs[0, number]).any(1).nonzero().flatten().tolist()
                if others:
                    differ, their = ("differs", "its") if len(others) == 1 else ("differ", "their")
                    where = f"{ranks_named(others)} {differ} from rank 0 in {their} {name}"
                    raise InputError(f"{where}: all ranks of {what} need the same")


def in_a_group() -> bool:
    """Whether there is a process group."""
    return dist.is_available() and dist.is_initialized()


def check_initialized() -> None:
    """Raises InputError where there is no process group (any more)."""
    if not in_a_group():
        raise InputError("there is no process group: torch.distributed.init_process_group() comes first")


def ranks_named(ranks: Iterable[int]) -> str:
    """ "rank 1", "ranks 1 and 2", "ranks 1, 2 and 3"."""
    *others, last = map(str, ranks)
    return f"ranks {', '.join(others)} and {last}" if others else f"rank {last}"


def _line(error: Exception) -> str:
    if isinstance(error, InputError):
        return str(error)
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
