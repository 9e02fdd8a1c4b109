"""What op benchmarks are made of: a call over inputs, its results sketched, on a GPU replayed from a graph."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hypermask_fast import ops
from hypermask_fast.ops import registry

from .case import Unavailable
from .gate import Sketch, sketches

Results = dict[str, Tensor]
Call = Callable[[], Any]
CACHE = 1 << 28  # bytes that all sets of inputs together have at least


def sets(count_bytes: int, device: torch.device) -> int:
    """How many sets of inputs it takes to exceed a GPU's L2 cache; 1 on a CPU."""
    return max(1, min(256, -(-CACHE // max(count_bytes, 1)))) if device.type == "cuda" else 1


class OpRun:
    """Calls of one function; see `case.Runnable`.

    Args:
        functions: the same computation on one or more sets of inputs, so that a cache can't hold them all.
        named: what a call returns -> its results by name; used once, on the first function, for the gate.
        graph: on a GPU, capture all calls and replay them, so that only the device's time counts.
    """

    def __init__(
        self, functions: Sequence[Call], graph: bool = False, named: Callable[[Any], Results] = lambda results: results
    ) -> None:
        self.functions, self.calls, self.named = list(functions), len(functions), named
        self.captured: torch.cuda.CUDAGraph | None = None
        self.graph = graph and torch.cuda.is_available()

    def repeated(self, times: int) -> "OpRun":
        """The same, but `run` makes all calls that often: on a GPU Python is ahead of the device from the second on."""
        return OpRun(self.functions * times, self.graph, self.named)

    def result(self) -> dict[str, Sketch]:
        found = sketches(self.named(self.functions[0]()))
        if self.graph:
            self.capture()
        return found

    def capture(self) -> None:
        """Has `run` replay a graph. Raises Unavailable where there can be none, which leaves the process damaged."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(side):
                for function in self.functions:
                    function()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for function in self.functions:
                    function()
        except RuntimeError as error:
            raise Unavailable(f"the op can't be captured: {str(error).splitlines()[0]}", broken=True) from error
        self.captured = graph

    def run(self) -> None:
        if self.captured is not None:
            self.captured.replay()
            return
        for function in self.functions:
            function()


def uniform(
    *shape: int, low: float = -1.0, high: float = 1.0, seed: int = 0, device: torch.device | str = "cpu"
) -> Tensor:
    """Float32, the same for every contender on this device; made there, for a CPU takes minutes for a GPU's cases."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.empty(shape, device=device).uniform_(low, high, generator=generator)


# -- ways to compute the same -----------------------------------------------------------------------------------------


def by_backend(op: str, backend: str) -> Callable[..., Any]:
    """The op by one backend. Raises Unavailable where that is not to be had."""
    if why := registry.problem(backend):
        raise Unavailable(f"the {backend} backend is not there: {why}")
    entry = ops.OPS[op]
    return lambda *args: entry(*args, backend=backend)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """By torch.compile, for the shapes of one case alone: after eight recompilations it would run eagerly."""
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)
