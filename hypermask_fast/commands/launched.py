"""Several processes that do one command, as torchrun starts them: how they begin, who speaks, and how all of them end.

Their store is torchrun's, a small key-value server that all of them reach, and that outlives a restart of theirs.
"""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist

from ..errors import InputError, ProcessLost
from ..ranks import ranks_named
from ..training.world import lost
from .command import EXIT_INPUT, EXIT_LOST

_c10d: Any = dist  # PyTorch documents its stores, and doesn't mark them as exported
TIMEOUT = 600.0  # seconds
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_POLL = 0.01  # seconds
_PATIENCE = 5.0  # seconds in which processes that end together have all said so


def rank_alone() -> int:
    """This process's rank as the environment has it, before anything is checked; 0 for one process."""
    rank, size = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    return int(rank) if rank.isdecimal() and size not in ("", "1") else 0


class Launched:
    """This process among those that do the command; alone where the environment says nothing else.

    Args:
        timeout: seconds that one waits for another.

    Raises:
        InputError: WORLD_SIZE is more than 1, and the other variables that torchrun sets are not all there.
    """

    def __init__(self, timeout: float = TIMEOUT) -> None:
        self.timeout = timeout
        self.rank, self.size, self.local_rank = 0, 1, 0
        self._store: Any = None  # a torch.distributed.Store
        self._round: Any = None  # the store of this start of the processes alone
        if os.environ.get("WORLD_SIZE", "") not in ("", "1") or "TORCHELASTIC_RUN_ID" in os.environ:
            self._read_environment()

    def _read_environment(self) -> None:
        values = {name: os.environ.get(name, "") for name in _VARIABLES}
        missing = [name for name, value in values.items() if not value]
        if missing:
            raise InputError(
                f"WORLD_SIZE is {values['WORLD_SIZE'] or 'missing'}, but {', '.join(missing)} "
                f"{'is' if len(missing) == 1 else 'are'} not set: torchrun starts several processes; for one, unset it"
            )
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
            if not values[name].isdecimal():
                raise InputError(f"{name} must be a whole number, 0 or more, not {values[name]!r}")
        self.rank, self.size, self.local_rank = (int(values[name]) for name in _VARIABLES[:3])
        if not self.rank < self.size:
            raise InputError(f"RANK is {self.rank}, WORLD_SIZE {self.size}: ranks are 0 to WORLD_SIZE - 1")

    @property
    def first(self) -> bool:
        """Whether this is the one that speaks and writes."""
        return self.rank == 0

    # -- beginning and end ------------------------------------------------------------------------------------------

    @contextmanager
    def together(self, on_gpu: bool) -> Iterator["Launched"]:
        """A block in torch.distributed's process group of all of them, if they are several.

        Each error that ends the block is told by one of them: SystemExit takes its place on the others.

        on_gpu: whether tensors on GPUs are exchanged too.
        """
        try:
            try:
                self._begin(on_gpu)
                yield self
            except RuntimeError as error:
                if (late := lost(error)) is None or self.size == 1:
                    raise
                raise ProcessLost(late, "the command's beginning") from error
        except InputError as error:
            if not self.speaks(str(error)):
                sys.exit(EXIT_INPUT)
            raise
        except KeyboardInterrupt:
            if not self.speaks():
                sys.exit(128 + signal.SIGINT)
            raise
        except ProcessLost as error:
            if not self.speaks(""):
                sys.exit(EXIT_LOST)
            raise self._named(error) from error
        finally:
            if dist.is_initialized() and self.size > 1:
                with suppress(RuntimeError):
                    dist.destroy_process_group()
                self._keep_store()

    def _begin(self, on_gpu: bool) -> None:
        if self.size == 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
            return
        time_limit = timedelta(seconds=self.timeout)
        self._store, _, _ = next(_c10d.rendezvous("env://", timeout=time_limit))
        if self.size == 1:
            return
        name = self._new_round()
        self._round = _c10d.PrefixStore(name, self._store)
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        dist.init_process_group(backend, store=self._round, rank=self.rank, world_size=self.size, timeout=time_limit)

    def _new_round(self) -> str:
        """A name for this start of the processes, new, and the same in all of them.

        The store has still what the processes of earlier starts have put there, their addresses among it, and which
        start is which no variable says of all processes alike.
        """
        assert self._store is not None
        store, mine = _c10d.PrefixStore("hypermask-fast/rounds", self._store), uuid4().hex
        until = time.monotonic() + self.timeout
        if self.rank > 0:
            store.set(f"asks/{self.rank}", mine)
            self._wait_for(store, f"answer/{mine}", until)
            name = store.get(f"answer/{mine}").decode()
            store.set(f"{name}/{self.rank}", "has it")
            return name
        missing = list(range(1, self.size))
        while missing:
            for rank in missing:  # what it asked in an earlier round is answered too, and nobody waits for that
                if store.check([f"asks/{rank}"]):
                    store.set(f"answer/{store.get(f'asks/{rank}').decode()}", mine)
            missing = [rank for rank in missing if not store.check([f"{mine}/{rank}"])]
            if missing and time.monotonic() > until:
                raise ProcessLost(True, "the command's beginning", ranks_named(missing))
            time.sleep(_POLL if missing else 0)
        return mine

    def _wait_for(self, store: Any, key: str, until: float) -> None:
        while not store.check([key]):
            if time.monotonic() > until:
                raise ProcessLost(True, "the command's beginning", "rank 0")
            time.sleep(_POLL)

    def _keep_store(self) -> None:
        """Where the first process has the store, it stays until all others that fail with it have asked who speaks."""
        if self.first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and self._round.check(["told"]):
            self._others_silent()

    # -- what all of them do alike ------------------------------------------------------------------------------------

    def as_first(self, yes: bool) -> bool:
        """What the first one says."""
        if self.size == 1:
            return yes
        said = torch.tensor([int(yes)])
        dist.broadcast(said, 0)
        return bool(said)

    def has_begun(self, run_dir: Path) -> bool:
        """Whether these processes, before torchrun has started them again, have made the folder a run's."""
        return self._store is not None and self._store.check([_key(run_dir)])

    def begins(self, run_dir: Path) -> None:
        if self._store is not None:
            self._store.set(_key(run_dir), "begun")

    # -- who speaks -------------------------------------------------------------------------------------------------

    def speaks(self, message: str = "") -> bool:
        """Whether this process is to tell how all of them end: the first one that asks, and who has another message.

        message: why it ends; "" where it only sees that another one does.
        """
        if self._round is None:
            return True
        try:
            self._round.set(f"ends/{self.rank}", "1")
            mine = f"{self.rank} {message}"
            told = self._round.compare_set("told", "", mine).decode()
        except RuntimeError:  # the store has ended
            return True
        return told == mine or (message != "" and told.partition(" ")[2] != message)

    def _named(self, error: ProcessLost) -> ProcessLost:
        """The error with the ranks that have not said that they end, as those do that see another one end."""
        place = f"{error.place} (--timeout {self.timeout:g})" if error.late else error.place
        if self._round is None:
            return ProcessLost(error.late, place, error.who)
        silent = self._others_silent(known=0 if error.late else 1)
        return ProcessLost(error.late, place, ranks_named(silent) if silent else error.who)

    def _others_silent(self, known: int = 0) -> list[int]:
        """The other ranks that don't say within seconds that they end; known: so many at least never will."""
        silent = [rank for rank in range(self.size) if rank != self.rank]
        until = time.monotonic() + _PATIENCE
        with suppress(RuntimeError):
            while len(silent) > known and time.monotonic() < until:
                time.sleep(_POLL)
                silent = [rank for rank in silent if not self._round.check([f"ends/{rank}"])]
        return silent


def _key(run_dir: Path) -> str:
    return f"hypermask-fast/begun/{run_dir.resolve()}"
