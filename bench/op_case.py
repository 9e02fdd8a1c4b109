"""An op's benchmark: its inputs, its floor, how exact it has to be, and what it has to give in float64.

`python -m bench`, `python -m bench.paths` and the microbenchmarks share them. `op_cases` has one function an op.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hypermask_fast import ops

from .case import Case
from .op_run import Call, OpRun, Results, sets, uniform

# recorded: forward with the graph for a backward pass; both: forward and backward in one call.
FORWARD, RECORDED, BOTH, BACKWARD = "forward", "recorded", "both", "backward"
TF32_TOLERANCE = 3e-3
Make = Callable[..., Call]  # the op's arguments -> a call without any


class Work(NamedTuple):
    """What a call cannot do without: entries of memory read and written, and operations."""

    entries: float
    operations: float = 0.0


class Draw:
    """Draws an op's tensors in float32 and rounds them to `dtype`; `exact` then gives the same numbers in float64.

    trained: tensors drawn by `leaf` ask for a gradient.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, seed: int, exact: bool, trained: bool) -> None:
        self.device, self.dtype = device, dtype
        self._seed, self._exact, self._trained = 100 * seed, exact, trained

    def __call__(self, *shape: int, low: float = -1.0, high: float = 1.0) -> Tensor:
        self._seed += 1
        return self.rounded(uniform(*shape, low=low, high=high, seed=self._seed, device=self.device))

    def leaf(self, *shape: int, reach: float = 1.0, channels_last: bool = False) -> nn.Parameter:
        values = self(*shape, low=-reach, high=reach)
        if channels_last:
            values = values.contiguous(memory_format=torch.channels_last)
        return nn.Parameter(values, requires_grad=self._trained)

    def full(self, *shape: int, value: float) -> Tensor:
        return self.rounded(torch.full(shape, value, device=self.device))

    def rounded(self, values: Tensor) -> Tensor:
        """Numbers that float32 has, as the op is given them."""
        values = values.to(self.dtype)
        return values.double() if self._exact else values


@dataclass(frozen=True)
class OpCase:
    """One op at one size.

    Attributes:
        op: its name; sizes: in words.
        arguments: makes all of its positional arguments.
        work: direction -> what cannot be done without; the directions there are.
        results: names of what the op returns; changed: arguments that it modifies, results too.
        tolerance: largest relative error in float32; half_tolerance: in half precision; loose: other ones in float32
            for results by name.
        tf32: PyTorch rounds this op's float32 operands to TF32 on a GPU unless told otherwise.
        oracle: computes the reference from arguments in the op's own dtype, where float64 copies of all of them would
            take too much memory.
    """

    op: str
    sizes: str
    arguments: Callable[[Draw], tuple[Any, ...]]
    work: dict[str, Work]
    results: tuple[str, ...] = ("y",)
    changed: tuple[str, ...] = ()
    tolerance: float = 2e-5
    half_tolerance: float = 2e-2
    loose: dict[str, float] = field(default_factory=dict)
    tf32: bool = False
    oracle: Callable[..., Any] | None = None

    @property
    def definition(self) -> Callable[..., Any]:
        return ops.OPS[self.op].definition

    def floor(self, direction: str, dtype: torch.dtype = torch.float32) -> tuple[float, float]:
        """(bytes, operations) of one call."""
        work = self.work[direction]
        return dtype.itemsize * work.entries, work.operations

    def tolerances(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Callable[[str], float]:
        """Largest relative error of a result by name."""
        if dtype != torch.float32:
            return lambda name: self.half_tolerance
        least = TF32_TOLERANCE if self.tf32 and device.type == "cuda" else 0.0
        return lambda name: max(least, self.loose.get(name, self.tolerance))

    # -- calls --------------------------------------------------------------------------------------------------------

    def inputs(
        self, direction: str, device: torch.device, dtype: torch.dtype, seed: int = 0, exact: bool = False
    ) -> tuple[Any, ...]:
        """The op's arguments, the same for every contender; exact: in float64."""
        return self.arguments(Draw(device, dtype, seed, exact, trained=direction != FORWARD))

    def call(self, make: Make, args: tuple[Any, ...], direction: str, dtype: torch.dtype) -> Call:
        """A call that returns what the op does, with it the gradients, or these alone (its forward pass is then done
        once, here)."""
        forward = make(*args)
        if direction in (FORWARD, RECORDED):
            return forward
        outputs, leaves = flat(forward()), list(self._leaves(args).values())
        grads = [torch.empty_like(y).copy_(_incoming(i, y, dtype)) for i, y in enumerate(outputs)]
        if direction == BACKWARD:
            return lambda: ((), torch.autograd.grad(outputs, leaves, grads, retain_graph=True, allow_unused=True))

        def both() -> tuple[Any, Sequence[Tensor | None]]:
            y = forward()
            return y, torch.autograd.grad(flat(y), leaves, grads, allow_unused=True)

        return both

    def named(self, args: tuple[Any, ...], direction: str, returned: Any) -> Results:
        """What a call of that direction returned, by name; a gradient that nobody made is missing."""
        y, grads = (returned, ()) if direction in (FORWARD, RECORDED) else returned
        found: Results = {}
        several = () if y is None else (y,) if len(self.results) == 1 else y
        for name, value in zip(self.results, several, strict=False):
            found |= _by_name(name, value)
        found |= {name: value for name, value in self._by_parameter(args).items() if name in self.changed}
        leaves = zip(self._leaves(args), grads, strict=bool(grads))
        return found | {f"grad/{name}": grad for name, grad in leaves if grad is not None}

    def run(
        self, make: Make, direction: str, device: torch.device, dtype: torch.dtype = torch.float32,
        graph: bool = False, exact: bool = False,
    ) -> OpRun:  # fmt: skip
        """A contender: with `graph` on a GPU over as many sets of inputs as no cache holds."""
        args = self.inputs(direction, device, dtype, exact=exact)
        count = sets(sum(tensor.nbytes for tensor in flat(args)), device) if graph and direction != BACKWARD else 1
        everything = [args, *(self.inputs(direction, device, dtype, seed, exact) for seed in range(1, count))]
        functions = [self.call(make, args, direction, dtype) for args in everything]
        return OpRun(functions, graph, partial(self.named, args, direction))

    def reference(self, direction: str, device: torch.device, dtype: torch.dtype = torch.float32) -> OpRun:
        """The oracle: the definition on the same numbers in float64."""
        if self.oracle is not None:
            return self.run(calling(self.oracle), direction, device, dtype)
        return self.run(calling(self.definition), direction, device, dtype, exact=True)

    def _by_parameter(self, args: tuple[Any, ...]) -> dict[str, Any]:
        return dict(zip(inspect.signature(self.definition).parameters, args, strict=False))

    def _leaves(self, args: tuple[Any, ...]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, value in self._by_parameter(args).items():
            found |= _by_name(name, value)
        return {name: tensor for name, tensor in found.items() if tensor.requires_grad}


def calling(function: Callable[..., Any]) -> Make:
    """Makes calls of a function with the op's signature."""
    return lambda *args: partial(function, *args)


def flat(values: Any) -> list[Tensor]:
    """All tensors in a tensor, or in lists and tuples of them."""
    if isinstance(values, list | tuple):
        return [tensor for value in values for tensor in flat(value)]
    return [values] if isinstance(values, Tensor) else []


def _by_name(name: str, value: Any) -> dict[str, Tensor]:
    tensors = flat(value)
    return {name: value} if isinstance(value, Tensor) else {f"{name}.{i}": t for i, t in enumerate(tensors)}


def _incoming(number: int, y: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of an output, the same for every contender, as exact as `dtype`."""
    return uniform(*y.shape, seed=90 + number, device=y.device).to(dtype)


def case_of(
    op_case: OpCase,
    name: str,
    contenders: dict[str, Callable[[], Callable[..., Any]]],
    direction: str,
    dtype: torch.dtype = torch.float32,
    graph: bool = True,
    unchecked: Sequence[str] = (),
) -> Case:
    """The op against its peers.

    Args:
        contenders: name -> makes ready a function with the op's signature.
        graph: on a GPU replay them from a graph.
        unchecked: contenders that compute something else.
    """

    def build(contender: str, device: torch.device) -> OpRun:
        if contender == "reference":
            return op_case.reference(direction, device, dtype)
        return op_case.run(calling(contenders[contender]()), direction, device, dtype, graph)

    return Case(
        name=name,
        experiment=name.split("/")[0],
        task=None,
        shapes=op_case.sizes,
        contenders=tuple(contenders),
        build=build,
        floor=lambda: op_case.floor(direction, dtype),
        tolerance=op_case.tolerances(torch.device("cpu"), dtype),
        reference=lambda contender: "" if contender in unchecked else "reference",
        dtype=str(dtype).removeprefix("torch."),
    )
