"""What ranks of tests do, here where a process can import it; imported once by the process that they are forked from."""

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import torch

from hypermask_fast import InputError, cli
from hypermask_fast.training import report, run, step
from hypermask_fast.training.config import load_preset

torch.set_num_threads(1)  # a fork has no threads of OpenMP's, and would wait for them
report.check_packages()
_config = load_preset("split-digits")
run.build_model(_config, run.read_scenario(_config))


def command(rank: int, words: list[str], events: dict[int, tuple[int, str, float]] | None = None) -> int:
    """The command line. events: rank -> (step, what happens to it before that step, seconds)."""
    if rank in (events or {}):
        _before_step(*events[rank])
    return cli.main([word.replace("RANK", str(rank)) for word in words])


def _before_step(number: int, what: str, seconds: float) -> None:
    count, do = 0, step.TaskWork.step

    def watched(*arguments: Any, **named: Any) -> Any:
        nonlocal count
        count += 1
        if count == number:
            _EVENTS[what](seconds)
        return do(*arguments, **named)

    step.TaskWork.step = watched


def _fail(seconds: float) -> None:
    raise InputError("this rank's disk is full")


_EVENTS: dict[str, Callable[[float], None]] = {
    "sleep": time.sleep,
    "die": lambda seconds: os.kill(os.getpid(), signal.SIGKILL),
    "fail": _fail,
    "terminate": lambda seconds: os.kill(os.getpid(), signal.SIGTERM),
}
