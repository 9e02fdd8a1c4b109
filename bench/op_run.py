"""What op benchmarks are made of: a function over inputs, its results sketched, on a GPU replayed from a graph."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .case import Unavailable
from .gate import Sketch, sketches

Results = dict[str, Tensor]
CACHE = 1 << 28  # bytes that all sets of inputs together have at least


def sets(count_bytes: int, device: torch.device) -> int:
    """How many sets of inputs it takes to exceed a GPU's L2 cache; 1 on a CPU."""
    return max(1, min(256, -(-CACHE // count_bytes))) if device.type == "cuda" else 1


class OpRun:
    """Calls of one function; see `case.Runnable`.

    Args:
        functions: the same computation on one or more sets of inputs, so that a cache can't hold them all; each
            returns its results by name. The gate sees the first one's.
        graph: on a GPU, capture all calls and replay them, so that only the device's time counts.
    """

    def __init__(self, functions: Sequence[Callable[[], Results]], graph: bool = False) -> None:
        self.functions, self.calls = list(functions), len(functions)
        self.captured: torch.cuda.CUDAGraph | None = None
        self.graph = graph and torch.cuda.is_available()

    def result(self) -> dict[str, Sketch]:
        found = sketches(self.functions[0]())
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


def gradients(value: Tensor, named: dict[str, Tensor], grad: Tensor | None = None) -> Results:
    """d value / d tensor by name, as "grad/name"."""
    found = torch.autograd.grad(value, list(named.values()), grad)
    return {f"grad/{name}": g for name, g in zip(named, found, strict=True)}
