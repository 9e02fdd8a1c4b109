"""Processes forked from one that has imported PyTorch: several as torchrun starts them, or a command by itself.

That takes a second or two less than a program of its own, which is left to the tests of how a program begins.
"""

import builtins
import gc
import multiprocessing
import os
import pickle
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # of the process that is forked, as startup.py has it for a command
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["support.launched", "support.sharding"])  # and with that DTensor and DCP of torch


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
    _find_tests()
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


class Running:
    """A function in a process of its own, with the names of subprocess.Popen; what it writes goes to files."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        _find_tests()
        self._folder = tempfile.TemporaryDirectory()
        self._files = f"{self._folder.name}/output"
        for name in ("out", "err"):
            Path(f"{self._files}.{name}").touch()  # of one that is killed before it has begun
        self._process = _context.Process(target=_run, args=(self._files, function, arguments), daemon=True)
        self._process.start()
        self.pid: int = self._process.pid or 0

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("a forked process", timeout or 0.0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it has written to standard output and error, once it has ended."""
        self.wait(timeout)
        return Path(f"{self._files}.out").read_text(), Path(f"{self._files}.err").read_text()


def command(*words: object) -> Running:
    """The command line."""
    return Running(_command, [str(word) for word in words])


def _command(words: list[str]) -> None:
    from hypermask_fast import cli

    sys.exit(cli.main(words))


def output_of_script(script: Path, folder: Path, *filters: str) -> str:
    """What a Python script prints that is run in a folder, under Python's -W with these; it has to end well."""
    running = Running(_script, script, folder, filters)
    out, err = running.communicate(600)
    assert running.returncode == 0, out + err
    return out


def _script(script: Path, folder: Path, filters: Sequence[str]) -> None:
    os.chdir(folder)
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[2])  # the checkout, where the package need not be installed
    sys.argv, sys.path[:0] = [str(script)], [str(script.parent)]
    for each in filters:
        action, category = each.split("::")
        warnings.simplefilter(action, getattr(builtins, category))
    runpy.run_path(str(script), run_name="__main__")


def _run(files: str, function: Callable[..., Any], arguments: tuple) -> None:
    _be_a_program(files, {})
    torch.seed()  # random numbers are others in each new process
    function(*arguments)


def _find_tests() -> None:
    """Where a forked process imports this package from."""
    tests = str(Path(__file__).parents[1])
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if tests not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([tests, *paths])


def _rank(
    there: Connection, rank: int, variables: dict[str, str], files: str, function: Callable, arguments: tuple
) -> None:
    _be_a_program(files, variables)
    result = function(rank, *arguments)
    there.send_bytes(pickle.dumps(result))  # `send` would share tensors, which end with the process
    sys.exit(result if isinstance(result, int) else 0)


def _be_a_program(files: str, variables: dict[str, str]) -> None:
    """Output in files, variables (one that is "" is not set), one thread, and signals as at a program's beginning."""
    gc.freeze()  # else each collection, and each look at all objects, would copy what the forked process has
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{files}.{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ |= variables
    for name in [name for name, value in variables.items() if not value]:
        del os.environ[name]
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
