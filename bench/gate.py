"""The correctness gate: a contender whose result is wrong gets no time.

Results are compared as sketches, which are small enough to cross a pipe: each tensor's norm and its products with
random signs. For an error e the products' mean square is ||e||^2 in expectation, wherever in the tensor it sits.
"""

import math
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

PROBES = 16
_BLOCK = 1 << 16
_PER_READ = 64  # blocks read at a time


@dataclass
class Sketch:
    """size: entries; scale: what an error is measured against (the norm, or that of a change); probes: products."""

    size: int
    scale: float
    probes: list[float]

    def as_dict(self) -> dict:
        return asdict(self)


def sketch(name: str, tensor: Tensor, transform: Callable[[Tensor, int], Tensor] | None = None) -> Sketch:
    """Sketch of a tensor in float64; `transform` is applied to each block, given where the block starts."""
    flat = tensor.detach().reshape(-1)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    rows = min(_BLOCK, flat.numel())
    signs = (torch.randint(2, (rows, PROBES), generator=generator) * 2 - 1).to(flat.device, torch.float64)
    probes, square = torch.zeros(PROBES, dtype=torch.float64, device=flat.device), 0.0
    for first in range(0, flat.numel(), _BLOCK * _PER_READ):
        read = flat[first : first + _BLOCK * _PER_READ].double()
        if transform is not None:
            read = transform(read, first)
        square += read.square().sum().item()
        for block in read.split(_BLOCK):
            block_signs = (torch.randint(2, (PROBES,), generator=generator) * 2 - 1).to(flat.device, torch.float64)
            probes += (block @ signs[: len(block)]) * block_signs
    return Sketch(flat.numel(), math.sqrt(square), probes.tolist())


def sketches(tensors: dict[str, Tensor]) -> dict[str, Sketch]:
    return {name: sketch(name, tensor) for name, tensor in tensors.items()}


@dataclass(frozen=True)
class Verdict:
    """worst: the largest error as a share of its tolerance, at tensor `name`; reason: "" where all is right."""

    worst: float
    name: str
    reason: str

    @property
    def ok(self) -> bool:
        return not self.reason


def compare(expected: dict[str, Sketch], got: dict[str, Sketch], tolerance: Callable[[str], float]) -> Verdict:
    """Relative error of every tensor against its tolerance.

    Args:
        expected, got: by name; a tensor that is missing is wrong.
        tolerance: largest relative error of the tensor of that name; 0 for counts, which are exact.
    """
    if not expected:
        return Verdict(math.inf, "", "there is nothing to compare with")
    overall = _overall(expected)
    worst, where = -1.0, ""
    for name, wanted in expected.items():
        mine = got.get(name)
        if mine is None or mine.size != wanted.size:
            return Verdict(math.inf, name, f"{name} is missing or of another size")
        differences = [a - b for a, b in zip(wanted.probes, mine.probes, strict=True)]
        error = math.sqrt(sum(d * d for d in differences) / PROBES)
        # What is zero but for rounding (a bias before batch norm has no gradient) is measured against its kin.
        scale = max(wanted.scale, 1e-4 * overall[_kind(name)], 1e-30)
        allowed = scale * tolerance(name)
        share = error / allowed if allowed else math.inf if error else 0.0
        if not share <= worst:  # NaN too
            worst, where = share, name
        if math.isnan(share):
            return Verdict(math.inf, name, f"{name} is not a number")
    if worst > 1:
        return Verdict(worst, where, f"{where} is off by {worst:.3g} times its tolerance of {tolerance(where):g}")
    return Verdict(worst, where, "")


def _kind(name: str) -> str:
    """ "grad/output.weight" is one of the "grad"s."""
    return name.split("/")[0]


def _overall(expected: dict[str, Sketch]) -> dict[str, float]:
    """Norm of all tensors of a kind together."""
    squares: dict[str, float] = {}
    for name, wanted in expected.items():
        squares[_kind(name)] = squares.get(_kind(name), 0.0) + wanted.scale**2
    return {kind: math.sqrt(square) for kind, square in squares.items()}
