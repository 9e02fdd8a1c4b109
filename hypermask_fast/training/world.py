"""The processes that train one run together: what each of them does of the work, and what they tell each other.

In one process nothing here changes anything, and torch.distributed is not asked.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from ..data import Split
from ..data.splits import Batch
from ..distributed import share
from ..errors import InputError, ProcessLost
from ..ranks import Ranks, in_a_group

_STOP_WITHIN = 0.5  # seconds from a signal to one process until all know


class World(Ranks):
    """Processes that train one run together, in step: all of them make the same calls in the same order."""

    @classmethod
    def here(cls) -> "World":
        """Those of the process group; this one alone where there is none.

        Raises:
            InputError: WORLD_SIZE says that there are several, and there is no process group.
        """
        if in_a_group():
            return cls.of() if dist.get_world_size() > 1 else cls()
        if (several := os.environ.get("WORLD_SIZE", "1")) not in ("", "0", "1"):
            raise InputError(
                f"there is no process group, and WORLD_SIZE is {several}: "
                "torch.distributed.init_process_group() comes first"
            )
        return cls()

    # -- the work ---------------------------------------------------------------------------------------------------

    def chunks(self, split: Split, size: int, whole: int | None = None) -> Iterator[Batch]:
        """This rank's part of all samples, `size` at a time, never augmented.

        whole: the samples belong together, so one rank takes all of them: that of this number, counted round.
        """
        if not self.several:
            yield from split.chunks(size)
            return
        first, end, _ = share(len(split), self.rank, self.size, least=0).rows.indices(len(split))
        if whole is not None:
            first, end = 0, len(split) if whole % self.size == self.rank else 0
        starts = range(first, end, size)
        with self.own_noise():
            yield from split.batches(torch.arange(start, min(start + size, end)) for start in starts)

    @contextmanager
    def own_noise(self, *place: int) -> Iterator[None]:
        """Within the block random numbers are this rank's own, and decided by `place`; afterwards the generators are as
        they were, so that they stay equal on all ranks however much each of them draws."""
        if not self.several:
            yield
            return
        seed = 0
        for number in (*place, self.rank):
            seed = (seed * 1_000_003 + number + 1) % 2**63
        with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_initialized() else []):
            torch.manual_seed(seed)
            yield

    # -- what they tell each other ----------------------------------------------------------------------------------

    def total(self, counts: Tensor) -> Tensor:
        """The sum over ranks of whole numbers."""
        if not self.several:
            return counts
        counts = counts.to(self.device)
        dist.all_reduce(counts, group=self.group)
        return counts

    def means(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Means over ranks of scalars; what is the same on all ranks stays as it is."""
        if not self.several:
            return values
        sums = torch.stack([value.double() for value in values.values()]).to(self.device)
        dist.all_reduce(sums, group=self.group)
        return dict(zip(values, (sums / self.size).unbind(), strict=True))

    def all_say(self, yes: bool) -> bool:
        """Whether every rank says yes."""
        if not self.several:
            return yes
        said = torch.tensor([int(yes)], device=self.device)
        dist.all_reduce(said, dist.ReduceOp.MIN, group=self.group)
        return bool(said)

    @contextmanager
    def waiting(self, place: Callable[[], str]) -> Iterator[None]:
        """Turns what torch.distributed raises when another process is gone or late to ProcessLost.

        place: how far this process is.
        """
        try:
            yield
        except RuntimeError as error:
            late = lost(error) if self.several else None
            if late is None:
                raise
            raise ProcessLost(late, place()) from error


ALONE = World()


def lost(error: RuntimeError) -> bool | None:
    """Whether torch.distributed has waited too long (True) for another process, or that is gone (False); else None.

    Of gloo it has no exceptions of their own: they are known by the source file that they name. Where gloo finds calls
    that don't fit each other, the fault is in this process.
    """
    text = str(error)
    if not isinstance(error, dist.DistError) and ("/gloo/" not in text or "enforce fail" in text.lower()):
        return None
    return "timed out" in text.lower() or "timeout" in text.lower()


class Stopping:
    """Whether a run stops now, which all ranks answer alike although a signal may have come to one of them alone.

    They tell each other about twice a second, after steps that they agree on by how long steps take.

    Args:
        stop: whether this process was asked to; asked at every call.
    """

    def __init__(self, stop: Callable[[], bool], world: World) -> None:
        self._stop, self._world = stop, world
        self._asked = False
        self._calls, self._every, self._told = 0, 1, time.monotonic()

    def __call__(self, now: bool = False) -> bool:
        """After a step; now: the ranks tell each other at this very call, which all of them make."""
        self._asked = self._stop() or self._asked
        if not self._world.several:
            return self._asked
        self._calls += 1
        return (now or self._calls >= self._every) and self._exchanged()

    def _exchanged(self) -> bool:
        seconds = time.monotonic() - self._told
        every = min(max(int(self._calls * _STOP_WITHIN / max(seconds, 1e-9)), 1), 2 * self._every)
        told = torch.tensor([int(self._asked), -every], device=self._world.device)
        dist.all_reduce(told, dist.ReduceOp.MAX, group=self._world.group)
        asked, every = told.tolist()
        self._calls, self._every, self._told = 0, -every, time.monotonic()
        return bool(asked)
