"""What a call costs by itself: without gradients, recorded, and with its backward pass.

Every way to call a layer of 2 rows of 8 -> 4, and every op at its tiny shape.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hypermask_fast import HyperMask, HypernetConfig, MaskedLinear, ops

from .. import op_cases
from ..op_case import BOTH, FORWARD, RECORDED, Call, Make, calling
from .shapes import cases
from .test_layers import calling_layer, layer_of
from .timing import DEVICES, directions, param

CASE = op_cases.masked_linear(2, 8, 4)


def plain(x: Tensor, weight: Tensor, logits: Tensor, threshold: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight, bias)


def in_a_model(x: Tensor, weight: nn.Parameter, logits: Tensor, threshold: Tensor, bias: nn.Parameter) -> Call:
    """A HyperMask model of this one layer under a mask that is at hand: W * m is made at its first pass."""
    model = HyperMask(nn.Sequential(layer_of(nn.Linear, weight, bias)), 1, 0, HypernetConfig(2, (2,))).to(x.device)
    logits, thresholds = torch.cat([logits.flatten(), torch.zeros_like(bias)]), threshold.expand(2)
    return partial(model, x, replace(model.mask(0), logits=logits, thresholds=thresholds))


CALLS: dict[str, Make] = {
    "F.linear": calling(plain),
    "nn.Linear": calling_layer(nn.Linear, masked=False),
    "MaskedLinear without a mask": calling_layer(MaskedLinear, masked=False),
    "definition": calling(ops.OPS["masked_linear"].definition),
    "ops.masked_linear": calling(ops.masked_linear),
    "MaskedLinear": calling_layer(MaskedLinear),
    "a model": in_a_model,  # whose W * m has one graph, so that one backward pass is all it has
}
UNMASKED = ("F.linear", "nn.Linear", "MaskedLinear without a mask")


def benchmarks() -> list[Any]:
    return [
        param(direction, device, call, device=device)
        for direction in (FORWARD, RECORDED, BOTH)
        for device in DEVICES
        for call in CALLS
        if (direction, call) != (BOTH, "a model")
    ]


@pytest.mark.parametrize(("direction", "device", "call"), benchmarks())
def test_call(benchmark, timing, direction, device, call):
    timing(
        benchmark,
        CASE,
        CALLS[call],
        direction,
        device,
        name=call,
        baseline="F.linear",
        group=f"one call, {direction}, {device}",
        plain=call in UNMASKED,
    )


def op_benchmarks() -> list[Any]:
    return [
        param("tiny", op, direction, device, call, device=device)
        for op, case in cases("tiny").items()
        for direction in ((FORWARD, RECORDED, BOTH) if BOTH in directions(case) else (FORWARD,))
        for device in DEVICES
        for call in ("definition", "as chosen")
    ]


@pytest.mark.parametrize(("shape", "op", "direction", "device", "call"), op_benchmarks())
def test_op_call(benchmark, timing, shape, op, direction, device, call):
    entry = ops.OPS[op]
    timing(
        benchmark,
        cases(shape)[op],
        calling(entry.definition if call == "definition" else entry),
        direction,
        device,
        name=call,
        baseline="definition",
        group=f"one call of {op}, {direction}, {device}",
    )
