"""Stopping a run in order: Control-C, and the signals that end a process, wait for a checkpoint."""

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

_PATIENCE = 1.0  # seconds: `timeout` and others send a signal twice at once; after that somebody is in a hurry


class Stopped(KeyboardInterrupt):
    """A run has ended early because it was asked to; the text says where, and whether a checkpoint is there."""


class StopSignals:
    """Within the block, SIGINT (Control-C), SIGTERM and SIGHUP ask a run to stop: for `Trainer`'s argument `stop`.

    Until the run asks for the first time, when there is nothing to save yet, a signal raises KeyboardInterrupt at
    once. From then on it is remembered, and the run is told so when it asks; another one, a second later, raises at
    once. Signals that the process ignores, as nohup has it, stay ignored. Outside the main thread nothing changes.

    Attributes:
        number: of the first signal that came, 0 for none.
    """

    def __init__(self) -> None:
        self.number = 0
        self._asked = False
        self._came = 0.0
        self._before: dict[int, Any] = {}

    def __call__(self) -> bool:
        """Whether the run should stop now."""
        self._asked = True
        return self.number != 0

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
            for number in numbers:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        first = self.number == 0
        if first:
            self.number, self._came = number, now
        if not self._asked or (not first and now - self._came > _PATIENCE):
            raise KeyboardInterrupt
