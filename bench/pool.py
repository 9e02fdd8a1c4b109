"""Worker processes as the runner sees them."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from . import machine

ROOT = Path(__file__).parents[1]


class Failed(Exception):
    """A worker answered with an error, or died."""


class Process:
    """One worker: `ask` sends a command and waits, `send` and `answer` do the two halves.

    Args:
        patience: seconds that an answer may take before the process is killed; None: for ever.
        own: variables that the contender's program sets by itself.
        root: the checkout whose worker it is.
    """

    def __init__(
        self,
        device: torch.device,
        threads: int,
        malloc: str,
        patience: float | None = None,
        own: Mapping[str, str] = MappingProxyType({}),
        root: Path = ROOT,
    ) -> None:
        self._patience, self._broken = patience, False
        environment = machine.environment(malloc) | own | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.worker", str(device), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=root,
        )

    def send(self, command: str, **arguments: Any) -> None:
        try:
            self._process.stdin.write(json.dumps({"do": command, **arguments}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # `answer` says how it ended

    def answer(self) -> dict[str, Any]:
        line, late = self._read()
        if not line:
            code = self._process.wait()
            if late:
                raise Failed(f"no answer within {self._patience:g} s")
            raise Failed(f"the process ended with code {code}" + (" (out of memory?)" if code == -9 else ""))
        reply = json.loads(line)
        self._broken |= reply.get("broken", False)
        if "error" in reply:
            raise Failed(reply["error"])
        return reply

    def _read(self) -> tuple[str, bool]:
        """The next line, "" at the end, and whether the process was killed for keeping it back."""
        late = threading.Event()
        clock = None if self._patience is None else threading.Timer(self._patience, self._kill, (late,))
        if clock:
            clock.start()
        try:
            return self._process.stdout.readline(), late.is_set()
        finally:
            if clock:
                clock.cancel()

    def _kill(self, late: threading.Event) -> None:
        late.set()
        self._process.kill()

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        self.send(command, **arguments)
        return self.answer()

    def alive(self) -> bool:
        """Whether it can go on: it runs, and no error has left its device unusable."""
        return not self._broken and self._process.poll() is None

    def close(self) -> None:
        """Ends it by closing its input; whatever does not end is killed."""
        with suppress(BrokenPipeError):  # what it did not read is still to be written
            self._process.stdin.close()
        self._process.stdout.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def available_memory() -> float:
    """Bytes that can be had without swapping; infinite where the system does not say."""
    try:
        with open("/proc/meminfo") as file:
            return next(1024.0 * int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return float("inf")


# Until it is killed, or the process that wanted it has ended.
_BUSY = """
import os
parent = os.getppid()
print(flush=True)
while os.getppid() == parent:
    for _ in range(1_000_000):
        pass
"""


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Beside a block, so many processes that compute without end."""
    with ExitStack() as stack:
        started = []
        for _ in range(count):
            process = subprocess.Popen([sys.executable, "-c", _BUSY], stdout=subprocess.PIPE)
            started.append(stack.enter_context(process))
            stack.callback(process.kill)  # before `process` waits for its end
        for process in started:
            process.stdout.readline()
        yield
