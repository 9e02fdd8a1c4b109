"""W * m of the tasks in use, kept from pass to pass for as long as nothing that it was made from has changed."""

import threading
from collections import OrderedDict
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checks import check_whole
from ..errors import InputError
from ..ops.checksum import checksum
from .layout import MaskLayout

DEFAULT_BYTES = 256 * 2**20


@dataclass(frozen=True, eq=False)
class KeptMask:
    """What a pass needs of a `TaskMask`, without its logits: W * m of a task, made of these weights."""

    task: int
    layout: MaskLayout
    weights: tuple[Tensor, ...]
    effective: tuple[Tensor, ...]
    may_fuse = False

    def fused(self, op: Any, layer: Any, x: Tensor, *geometry: object) -> None:
        """Layers use `effective`."""
        return None


class Counted:
    """Tensors as PyTorch's version counters show them, with the settings beside them.

    A write that PyTorch counts shows, and so does a Parameter that was exchanged or given other memory. A write to the
    same memory through an alias (`.data`, numpy, another process) does not. The memory is held, so that its address
    can't become another tensor's.
    """

    def __init__(self, settings: Hashable, tensors: Sequence[Tensor]) -> None:
        self.settings = settings
        self._seen = [(tensor, tensor.detach(), version(tensor)) for tensor in tensors]

    def still(self, settings: Hashable, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the same, unchanged as far as the counters know."""
        return (
            settings == self.settings and len(tensors) == len(self._seen) and all(map(_unchanged, tensors, self._seen))
        )


def _unchanged(tensor: Tensor, seen: tuple[Tensor, Tensor, int | None]) -> bool:
    before, memory, count = seen
    return (
        tensor is before
        and count is not None
        and count == version(tensor)
        and tensor.data_ptr() == memory.data_ptr()
        and tensor.dtype == memory.dtype
        and tensor.shape == memory.shape
        and tensor.stride() == memory.stride()
    )


def version(tensor: Tensor) -> int | None:
    """PyTorch's count of writes to a tensor; None of one made in inference mode, which has none."""
    return None if tensor.is_inference() else tensor._version  # noqa: SLF001


def contents(tensors: Sequence[Tensor]) -> tuple:
    """All that the tensors hold, as checksums: equal for as long as they are, whoever writes to them."""
    return tuple((checksum(tensor), tensor.dtype, tensor.shape) for tensor in tensors)


@dataclass(eq=False)
class Entry:
    """A task's W * m: one tensor per segment, None where the Parameter is used as it is.

    contents: of what it was made from; counted: when that was last seen.
    """

    weights: tuple[Tensor | None, ...]
    contents: Hashable
    counted: Counted
    nbytes: int
    _versions: tuple[int | None, ...] = ()

    def __post_init__(self) -> None:
        self._versions = self._now()

    def _now(self) -> tuple[int | None, ...]:
        return tuple(None if weight is None else version(weight) for weight in self.weights)

    def is_whole(self) -> bool:
        """Whether nobody has written to it, such as to an output of the network that is a view of it."""
        return self._versions == self._now()


class WeightCache:
    """W * m by task, within a limit of bytes; the one used least recently goes first.

    `print(model.cache)` shows what is kept. All methods are called with `lock` held.

    Attributes:
        limit: bytes, 0 keeps nothing.
        hits, made: passes that found their task's W * m here, and that had to make it.
        serving: blocks of `HyperMask.serving` under way.
        lock: of threads.
    """

    def __init__(self, limit: int = DEFAULT_BYTES) -> None:
        self.limit = limit
        self.hits = self.made = self.serving = 0
        self.lock = threading.RLock()
        self._entries: OrderedDict[int, Entry] = OrderedDict()
        self.glimpse: Hashable = None  # of what masks are made from, at the last pass for which nothing was kept

    def __reduce__(self) -> tuple:
        """A copy, or what is unpickled, keeps nothing yet."""
        return (WeightCache, (self.limit,))

    def __deepcopy__(self, memo: dict) -> "WeightCache":
        return WeightCache(self.limit)

    @property
    def nbytes(self) -> int:
        """Bytes kept."""
        return sum(entry.nbytes for entry in self._entries.values())

    @property
    def tasks(self) -> tuple[int, ...]:
        """Whose W * m is kept, the one used least recently first."""
        return tuple(self._entries)

    def entries(self) -> dict[int, Entry]:
        return dict(self._entries)

    def get(self, task: int) -> Entry | None:
        """A task's entry, now the one used last; it is for the caller to see whether it still holds."""
        entry = self._entries.get(task)
        if entry is not None and not entry.is_whole():
            entry = None
        if entry is not None:
            self._entries.move_to_end(task)
        return entry

    def put(self, task: int, entry: Entry, beside: Collection[int] = ()) -> None:
        """Keeps an entry where there is room for it, or can be made without dropping the tasks of `beside`."""
        self._entries.pop(task, None)
        room = self.limit - self.nbytes
        dropped = [other for other in self._entries if other not in beside]
        while room < entry.nbytes and dropped:
            room += self._entries.pop(dropped.pop(0)).nbytes
        if room >= entry.nbytes:
            self._entries[task] = entry

    def clear(self) -> None:
        """Drops everything."""
        self._entries.clear()
        self.glimpse = None

    def resize(self, limit: int, least: int) -> None:
        """Another limit. Raises InputError where it is no number of bytes, or holds not even one task of `least`."""
        limit = check_whole("cache_bytes", limit, 0)
        if 0 < limit < least:
            raise InputError(
                f"cache_bytes={limit} is too small for one task, whose W * m takes {least} bytes (0 keeps nothing)"
            )
        self.limit = limit
        while self.nbytes > limit:
            self._entries.popitem(last=False)

    def __str__(self) -> str:
        with self.lock:
            tasks = ", ".join(map(str, sorted(self._entries))) or "none"
            limit = f"{self.nbytes / 2**20:.1f} of {self.limit / 2**20:.1f} MiB" if self.limit else "turned off"
            checked = "version counters (serving)" if self.serving else "checksums"
            return (
                f"W * m kept of tasks: {tasks} ({limit}); used {self.hits} times, made {self.made} times; "
                f"checked by {checked}"
            )

    __repr__ = __str__


def is_plain(tensor: Tensor) -> bool:
    """Whether it is an ordinary tensor with memory of its own: no DTensor, no fake or meta tensor."""
    return type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided and not tensor.is_meta
