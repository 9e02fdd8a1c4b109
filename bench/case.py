"""What a benchmark is: a case, its contenders, and what a contender has to be able to do."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch

from .gate import Sketch

OURS = "ours"


class Unavailable(Exception):
    """A contender can't run here; the message says why. broken: and the process had better not go on."""

    def __init__(self, message: str, broken: bool = False) -> None:
        super().__init__(message)
        self.broken = broken


class Runnable(Protocol):
    """A contender made ready.

    Attributes:
        calls: how often one `run` does the thing that is timed.

    One that replays a CUDA graph may say in `nodes` how many nodes that has.
    """

    calls: int

    def result(self) -> dict[str, Sketch]:
        """What the gate compares; called once, before anything is timed."""

    def run(self) -> None:
        """What is timed. On a GPU it need not wait for the device."""


@dataclass(frozen=True)
class Case:
    """One row group of the results.

    Attributes:
        name: unique; `experiment` and `task` are its parts in the results file, task None for an op.
        shapes: in words, for the table.
        contenders: the first one is ours; others whose name begins with "ours" are ours too.
        build: makes a contender ready, by name and device; "reference" and what `reference` names are
            oracles, in float64, of which only `result` is used.
        floor: () -> (bytes, operations) that cannot be done without.
        tolerance: largest relative error of the named tensor.
        reference: the oracle of a contender, "" for one that computes something else and is not compared.
        isolated: every contender in a process of its own, its peak memory measured.
        dtype: what the operations are done in, for the floor's rate.
        memory: bytes that a contender needs, about; decides how many are resident at a time.
        allocator: what a contender does to the allocator by itself where the environment leaves it as shipped.
        environment: variables that a contender's program sets by itself where they are left as shipped.
        on_request: measured only where it is named.
    """

    name: str
    experiment: str
    task: int | None
    shapes: str
    contenders: tuple[str, ...]
    build: Callable[[str, torch.device], Runnable]
    floor: Callable[[], tuple[float, float]]
    tolerance: Callable[[str], float]
    reference: Callable[[str], str] = field(default=lambda contender: "reference")
    isolated: bool = False
    dtype: str = "float32"
    memory: Callable[[str], float] = field(default=lambda contender: 0.0)
    allocator: Callable[[str], str] = field(default=lambda contender: "")
    environment: Callable[[str], dict[str, str]] = field(default=lambda contender: {})
    on_request: bool = False
