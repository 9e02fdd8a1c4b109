"""A call is checked against the float64 reference, and only then handed to pytest-benchmark."""

import time
from typing import Any

import pytest
import torch

from .. import gate, machine
from ..op_case import BOTH, FORWARD, Make, OpCase
from ..op_run import OpRun

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
ROUNDS = 20  # of a graph's replay


class DeviceClock:
    """Seconds for pytest-benchmark, once the GPU has done what it was given, over the calls that one replay makes."""

    calls = 1

    def __call__(self) -> float:
        torch.cuda.synchronize()
        return time.perf_counter() / self.calls


CLOCK = DeviceClock()


def param(*values: str, device: str) -> Any:
    """The parameters of one benchmark; on a GPU it is timed by `CLOCK`."""
    marks = [pytest.mark.benchmark(timer=CLOCK)] if device.startswith("cuda") else []
    return pytest.param(*values, marks=marks)


def device_and_dtype(name: str) -> tuple[torch.device, torch.dtype]:
    """Of "cpu" or "cuda", both in float32, or "cuda-bfloat16"."""
    kind, _, half = name.partition("-")
    return torch.device(kind), getattr(torch, half or "float32")


class Timing:
    """What one benchmark needs of those before it: the reference's result, the machine's rates, the baseline's time."""

    def __init__(self) -> None:
        self._expected: tuple[Any, dict[str, gate.Sketch]] = (None, {})
        self._rates: dict[str, dict[str, float]] = {}
        self._baselines: dict[str, float] = {}

    def __call__(
        self, benchmark: Any, case: OpCase, make: Make, direction: str, device: str, *,
        name: str, baseline: str, group: str, graph: bool = False, plain: bool = False,
    ) -> None:  # fmt: skip
        """Checks and times one contender.

        Args:
            benchmark: pytest-benchmark's fixture.
            make: the op's arguments -> the call.
            device: see `device_and_dtype`.
            name: of the contender; baseline: of the one in its group whose time is what `ratio` divides by.
            graph: on a GPU, replay it from a graph.
            plain: it computes something else than the op and is checked against itself in float64.
        """
        where, dtype = device_and_dtype(device)
        run = case.run(make, direction, where, dtype, graph)
        share = self._check(case, run, direction, where, dtype, make if plain else None)
        benchmark.group = group
        if run.captured is not None:
            CLOCK.calls = run.calls
            benchmark.pedantic(run.run, rounds=ROUNDS, warmup_rounds=2)
        else:
            CLOCK.calls = 1
            benchmark(run.functions[0])
        benchmark.extra_info |= {"sizes": case.sizes, "dtype": str(dtype).removeprefix("torch."), "gate": share}
        if benchmark.stats is not None:  # None under --benchmark-disable
            seconds = benchmark.stats.stats.median
            benchmark.extra_info |= self._ratios(seconds, name, baseline, group)
            if direction in case.work:
                benchmark.extra_info |= self._floor(seconds, case, direction, where, dtype)

    def _check(
        self, case: OpCase, run: OpRun, direction: str, device: torch.device, dtype: torch.dtype, make: Make | None
    ) -> float:
        """The largest error as a share of its tolerance. Fails the test where the result is wrong."""
        key = (case.op, case.sizes, direction, device, dtype, make)
        if self._expected[0] != key:
            self._expected = (None, {})  # the old one's memory first
            if make is None:
                oracle = case.reference(direction, device, dtype)
            else:
                oracle = case.run(make, direction, device, dtype, exact=True)
            self._expected = (key, oracle.result())
        verdict = gate.compare(self._expected[1], run.result(), case.tolerances(device, dtype))
        assert verdict.ok, verdict.reason
        return verdict.worst

    def _ratios(self, seconds: float, name: str, baseline: str, group: str) -> dict[str, Any]:
        if name == baseline:
            self._baselines[group] = seconds
        if group not in self._baselines:  # not among those that were chosen
            return {}
        return {"baseline": baseline, "ratio": seconds / self._baselines[group]}

    def _floor(
        self, seconds: float, case: OpCase, direction: str, device: torch.device, dtype: torch.dtype
    ) -> dict[str, float]:
        if device.type not in self._rates:
            self._rates[device.type] = machine.rates(device)
        rates = self._rates[device.type]
        moved, operations = case.floor(direction, dtype)
        name = str(dtype).removeprefix("torch.")
        floor = max(moved / rates["bandwidth"], operations / rates[name])
        return {
            "bytes": moved,
            "operations": operations,
            "bandwidth": rates["bandwidth"],
            "operation_rate": rates[name],
            "floor_seconds": floor,
            "floor_ratio": seconds / floor,
        }


def directions(case: OpCase) -> tuple[str, ...]:
    """Forward, and where the op has a gradient forward and backward."""
    return tuple(direction for direction in (FORWARD, BOTH) if direction in case.work)
