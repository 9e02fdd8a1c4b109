"""Ranks of a gloo group, each in a process forked from one that has imported PyTorch: half a second a group."""

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["support.warm"])


class Ended(NamedTuple):
    """How a rank's process has ended: its exit code, what the function has returned, or the error that it raised."""

    code: int | None
    result: Any = None
    error: str = ""


def ranks(count: int, function: Callable[..., Any], *arguments: Any, seconds: float = 120) -> list[Ended]:
    """Runs function(rank, *arguments) in `count` processes; fails where one has not ended in time."""
    with tempfile.TemporaryDirectory() as folder, _importable():
        started = []
        for rank in range(count):
            here, there = _context.Pipe(duplex=False)
            store = f"file://{folder}/store"
            process = _context.Process(target=_rank, args=(there, rank, count, store, function, arguments))
            process.start()
            there.close()
            started.append((process, here))
        return [_ended(process, here, seconds) for process, here in started]


@contextmanager
def _importable() -> Iterator[None]:
    """Within, a new process finds the package `support` before it is told of this one's sys.path."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), *([before] if before else [])])
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _ended(process: Any, here: Connection, seconds: float) -> Ended:
    result, error = None, ""
    if here.poll(seconds):
        try:
            result, error = here.recv()
        except EOFError:
            error = "killed"
    process.join(10)
    if process.is_alive():
        process.kill()
        process.join()
        raise AssertionError("a rank hangs")
    return Ended(process.exitcode, result, error)


def _rank(there: Connection, rank: int, count: int, store: str, function: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=count, timeout=timedelta(seconds=60))
    try:
        there.send((function(rank, *arguments), ""))
    except Exception as error:
        there.send((None, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))
        there.close()
        os._exit(1)
    there.close()
    os._exit(0)  # a rank that waits for others to end would hide that they hang


def as_text(path: Path) -> dict[str, bytes]:
    """All files below a folder, by name."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}
