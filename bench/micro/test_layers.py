"""MaskedLinear and MaskedConv2d beside nn.Linear and nn.Conv2d."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from torch import Tensor, nn

from hypermask_fast import LayerMask, MaskedConv2d, MaskedLinear

from ..op_case import Call, Make
from .shapes import SHAPES, cases
from .timing import DEVICES, directions, param

LAYERS = {"masked_linear": (nn.Linear, MaskedLinear), "masked_conv2d": (nn.Conv2d, MaskedConv2d)}


def layer_of(kind: type[nn.Module], weight: nn.Parameter, bias: nn.Parameter, *geometry: Any) -> nn.Module:
    """A layer that has these as its Parameters; geometry: a convolution's window, stride and padding."""
    layer = kind(weight.shape[1], weight.shape[0], *geometry, device="meta")
    layer.weight, layer.bias = weight, bias
    return layer


def calling_layer(kind: type[nn.Module], masked: bool = True) -> Make:
    """The op's arguments -> a call of a layer that has them; masked: with a `LayerMask`."""

    def make(x: Tensor, weight: Any, logits: Tensor, threshold: Tensor, bias: Any, *rest: Any) -> Call:
        layer = layer_of(kind, weight, bias, *((weight.shape[2:], *rest[:2]) if rest else ()))
        return partial(layer, x, LayerMask(logits, threshold)) if masked else partial(layer, x)

    return make


def benchmarks() -> Iterator[Any]:
    for shape in SHAPES:
        for op, kinds in LAYERS.items():
            if op in cases(shape):
                for direction in directions(cases(shape)[op]):
                    for device in DEVICES:
                        for kind in kinds:
                            yield param(shape, direction, device, kind.__name__, device=device)


@pytest.mark.parametrize(("shape", "direction", "device", "layer"), list(benchmarks()))
def test_layer(benchmark, timing, shape, direction, device, layer):
    op = next(op for op, kinds in LAYERS.items() if layer in [kind.__name__ for kind in kinds])
    plain, ours = LAYERS[op]
    is_plain = layer == plain.__name__
    timing(
        benchmark,
        cases(shape)[op],
        calling_layer(plain, masked=False) if is_plain else calling_layer(ours),
        direction,
        device,
        name=layer,
        baseline=plain.__name__,
        group=f"{ours.__name__} beside {plain.__name__}, {shape}, {direction}, {device}",
        plain=is_plain,
    )
