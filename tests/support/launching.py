"""Several processes as torchrun starts them, forked from one that has imported PyTorch: a second or two a group."""

import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # of the process that is forked, as startup.py has it for a command
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["support.launched"])


class Ended(NamedTuple):
    """How a rank has ended: its exit code (negative: by that signal), what it printed, what its function returned."""

    code: int
    out: str
    err: str
    result: Any


def agent_store() -> Any:
    """A store that outlives the ranks, as that of one torchrun does from restart to restart."""
    return torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def ranks(
    count: int,
    function: Callable[..., Any],
    *arguments: Any,
    environment: dict[str, str] | None = None,
    seconds: float = 200,
    store: Any = None,
) -> list[Ended]:
    """Runs function(rank, *arguments) in `count` processes with torchrun's variables; those that hang are killed.

    environment: changes of the variables; one that is "" is not set.
    store: as torchrun has one, see `agent_store`; None: the first process has it.
    """
    if store is None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port, shared = free.getsockname()[1], {}
    else:
        port, shared = store.port, {"TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    shared |= {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for rank in range(count):
            own = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | (environment or {})
            here, there = _context.Pipe(duplex=False)
            process = _context.Process(target=_rank, args=(there, rank, own, f"{folder}/{rank}", function, arguments))
            process.start()
            there.close()
            started.append((process, here))
        until = time.monotonic() + seconds
        return [_ended(process, here, f"{folder}/{rank}", until) for rank, (process, here) in enumerate(started)]


def _ended(process: Any, here: Connection, files: str, until: float) -> Ended:
    result = None
    try:
        if here.poll(max(until - time.monotonic(), 0)):
            result = pickle.loads(here.recv_bytes())
    except EOFError:
        pass
    process.join(max(until - time.monotonic(), 1))
    out, err = (Path(f"{files}.{name}").read_text() for name in ("out", "err"))
    if process.is_alive():
        process.kill()
        process.join()
        raise AssertionError(f"a rank hangs; it has printed\n{out}\n{err}")
    return Ended(process.exitcode, out, err, result)


def _rank(
    there: Connection, rank: int, variables: dict[str, str], files: str, function: Callable, arguments: tuple
) -> None:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{files}.{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ |= variables
    for name in [name for name, value in variables.items() if not value]:
        del os.environ[name]
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    result = function(rank, *arguments)
    there.send_bytes(pickle.dumps(result))  # `send` would share tensors, which end with the process
    sys.exit(result if isinstance(result, int) else 0)
