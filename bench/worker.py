"""A process that holds contenders and times them when told to; the runner speaks to it in lines of JSON over pipes.

A process of its own gives every contender its own allocator settings, compiled-code cache and peak memory.
"""

import ctypes
import gc
import json
import os
import resource
import sys
import time
import traceback
from contextlib import suppress
from typing import Any, TextIO

import torch

from . import machine, registry
from .case import Runnable, Unavailable

SHORTEST = 1e-3  # seconds that one sample should take at least
WARM = 0.5  # a contender faster than this (seconds) has one run before each turn that does not count


class Worker:
    """Answers commands; see `COMMANDS`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.held: dict[str, Runnable] = {}
        self.inner: dict[str, int] = {}
        self.last: dict[str, float] = {}  # seconds of a contender's last sample

    def prepare(self, case: str, contender: str, quick: bool) -> dict[str, Any]:
        """Builds a contender; the sketches of its result, and the nodes of its CUDA graph if it counts them."""
        runnable = registry.find(case, self.device, quick).build(contender, self.device)
        sketches = {name: sketch.as_dict() for name, sketch in runnable.result().items()}
        if not contender.startswith("reference"):
            self.held[contender] = runnable
        return {"result": sketches, "nodes": getattr(runnable, "nodes", None)}

    def warm(self, contender: str) -> dict[str, Any]:
        """A run or two, and from the last how many make up a sample; peak memory counts from after them."""
        seconds = self._timed(contender, 1)
        if seconds < WARM:
            seconds = self._timed(contender, 1)
        self.inner[contender] = max(1, min(1000, int(SHORTEST / max(seconds, 1e-7)) + 1)) if seconds < SHORTEST else 1
        gc.collect()
        self.last[contender] = seconds
        reset_peak_memory()
        return {"seconds": seconds}

    def turn(self, contender: str, seconds: float, most: int) -> dict[str, Any]:
        """Samples (milliseconds per call) until `seconds` are over or there are `most`; at least one."""
        if self.inner[contender] > 1 or self.last[contender] < WARM:
            self._timed(contender, 1)
        samples, began = [], time.perf_counter()
        while not samples or (len(samples) < most and time.perf_counter() - began < seconds):
            self.last[contender] = self._timed(contender, self.inner[contender])
            samples.append(1e3 * self.last[contender] / self.held[contender].calls)
        return {"ms": samples}

    def _timed(self, contender: str, count: int) -> float:
        """Seconds per run of `count` in a row, the device's work included."""
        run = self.held[contender].run
        if self.device.type != "cuda":
            began = time.perf_counter()
            for _ in range(count):
                run()
            return (time.perf_counter() - began) / count
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        torch.cuda.synchronize()
        events[0].record()
        for _ in range(count):
            run()
        events[1].record()
        events[1].synchronize()
        return events[0].elapsed_time(events[1]) / 1e3 / count

    def release(self) -> dict[str, Any]:
        """Forgets all contenders; their peak memory in bytes."""
        peak = peak_memory(self.device)
        for kept in (self.held, self.inner, self.last):
            kept.clear()
        gc.collect()
        _give_back()  # the next case may want it in another process
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return {"peak_memory": peak}

    def describe(self) -> dict[str, Any]:
        return machine.describe(self.device)

    def rates(self, quick: bool) -> dict[str, Any]:
        return machine.rates(self.device, quick)


COMMANDS = ("prepare", "warm", "turn", "release", "describe", "rates")


def _give_back() -> None:
    """Freed memory to the system, which an allocator told to keep it would not."""
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)


def reset_peak_memory() -> None:
    """Linux lets a process forget its high-water mark; elsewhere building the contender counts too.

    What building it and comparing its result has freed goes back first: an allocator told to keep freed memory would
    show it as the contender's.
    """
    _give_back()
    with suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory(device: torch.device) -> int:
    """Bytes: the process's resident set at its largest, or the GPU's allocated memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with suppress(OSError), open("/proc/self/status") as file:  # unlike ru_maxrss, not inherited from the parent
        peak = next((int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM")), peak)
    return peak


def answer(worker: Worker, message: dict[str, Any]) -> dict[str, Any]:
    """What a command {"do": name, arguments...} gives; {"unavailable": why} or {"error": what} where it fails, with
    "broken": whether this process can't go on."""
    arguments = dict(message)
    name = arguments.pop("do")
    try:
        if name not in COMMANDS:
            raise ValueError(f"unknown command {name!r}")
        return getattr(worker, name)(**arguments)
    except Unavailable as problem:
        return {"unavailable": str(problem), "broken": problem.broken or machine.device_lost()}
    except Exception as problem:
        traceback.print_exc()
        return {"error": machine.first_line(problem), "broken": machine.device_lost()}


def serve(commands: TextIO, answers: TextIO, device: torch.device) -> None:
    worker = Worker(device)
    for line in commands:
        reply = answer(worker, json.loads(line))
        print(json.dumps(reply), file=answers, flush=True)
        if reply.get("broken"):  # the runner takes another process
            break


if __name__ == "__main__":
    # What libraries print must not get between the answers.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(int(sys.argv[2]))
    serve(sys.stdin, replies, torch.device(sys.argv[1]))
