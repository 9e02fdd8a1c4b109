import pytest
import torch
from comparing import DEVICE, DTYPES, assert_close, assert_matches, exact_threshold, randn

from hypermask_fast.errors import InputError
from hypermask_fast.kernels import masked_conv2d
from hypermask_fast.kernels.conv2d_shape import Conv2dShape
from hypermask_fast.kernels.masked_conv2d import launch_convolution, launch_weight_gradient
from hypermask_fast.kernels.tiles import Tiles
from hypermask_fast.ops import reference

CASES = {  # batch, in, out, height, width, kernel; stride, padding, dilation, groups
    "one": ((1, 1, 1, 1, 1, (1, 1)), (1, 0, 1, 1)),
    "plain": ((2, 6, 8, 9, 7, (3, 3)), (1, 1, 1, 1)),
    "strided groups": ((2, 6, 8, 9, 7, (3, 3)), (2, 1, 1, 2)),
    "uneven": ((2, 20, 70, 6, 5, (3, 2)), ((2, 1), (1, 2), (2, 1), 1)),
    "depthwise": ((2, 3, 3, 5, 5, (3, 3)), (1, 1, 1, 3)),
    "1x1 strided": ((4, 3, 5, 8, 8, (1, 1)), (2, 0, 1, 1)),
    "no batch": ((0, 4, 4, 5, 5, (3, 3)), (1, 1, 1, 1)),
}


def tensors(shape, groups, dtype, channels_last):
    batch, inputs, outputs, height, width, kernel = shape
    x = randn(batch, inputs, height, width, dtype=dtype)
    weight = randn(outputs, inputs // groups, *kernel, dtype=dtype)
    logits = randn(outputs, inputs // groups, *kernel, dtype=dtype)
    if channels_last:
        x, weight = (t.to(memory_format=torch.channels_last) for t in (x, weight))
    return x, weight, logits, randn(outputs, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_matches_reference(case, channels_last, dtype):
    shape, geometry = CASES[case]
    x, weight, logits, bias = tensors(shape, geometry[3], dtype, channels_last)
    threshold = exact_threshold(logits)
    y = assert_matches(
        lambda x, w, a, b: masked_conv2d(x, w, a, threshold, b, *geometry),
        lambda x, w, a, b: reference.masked_conv2d(x, w, a, threshold.double(), b, *geometry),
        (x, weight, logits, bias),
        dtype,
    )
    if channels_last and y.numel() > 0:
        assert y.is_contiguous(memory_format=torch.channels_last)


def test_strided_input_without_bias():
    x = randn(2, 9, 8, 6, dtype=torch.float32)[:, ::2].transpose(2, 3)
    weight, logits = (
        randn(4, 3, 3, 10, dtype=torch.float32).permute(0, 3, 1, 2)[:, ::2],
        randn(4, 5, 3, 3, dtype=torch.float32),
    )
    threshold = exact_threshold(logits)
    assert_matches(
        lambda x, w, a: masked_conv2d(x, w, a, threshold, None, 1, 1),
        lambda x, w, a: reference.masked_conv2d(x, w, a, threshold.double(), None, 1, 1),
        (x, weight, logits),
        torch.float32,
    )


@pytest.mark.parametrize("splits", [1, 3])
def test_tiles_that_do_not_divide(splits):
    x, weight, logits, _ = tensors((2, 5, 21, 7, 6, (3, 3)), 1, torch.float32, False)
    threshold, shape = exact_threshold(logits), Conv2dShape((3, 3), (1, 1), (1, 1), (1, 1), 1)
    leaves = [t.double().requires_grad_() for t in (x, weight, logits)]
    expected = reference.masked_conv2d(*leaves, threshold.double(), None, 1, 1)
    y = torch.empty(expected.shape, device=DEVICE)
    launch_convolution(x, weight, logits, threshold, None, y, shape, tiles=Tiles(16, 32, 16))
    assert_close("y", y, expected)
    grad = randn(*y.shape, dtype=torch.float32)
    _, dw, da = torch.autograd.grad(expected, leaves, grad.double())
    tiles = Tiles(16, 16, 32, splits=splits)
    ours = launch_weight_gradient(grad, x, weight, logits, threshold, shape, tiles=tiles)
    assert_close("dW", ours[0], dw)
    assert_close("da", ours[1], da)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"x": torch.ones(1, 3, 5, 5)}, {}, "channels"),
        ({"x": torch.ones(4, 5, 5)}, {}, "x must be"),
        ({"x": torch.ones(1, 4, 2, 2)}, {}, "does not fit"),
        ({"logits": torch.ones(6, 4, 3, 1)}, {}, "logits must have"),
        ({"bias": torch.ones(4)}, {}, "bias must be"),
        ({}, {"groups": 5}, "groups must divide"),
        ({}, {"stride": 0}, "stride"),
        ({}, {"padding": (1, -1)}, "padding"),
        ({}, {"padding": "same"}, "padding must be a number or two, not 'same'"),
        ({"x": torch.ones(1, 4, 5, 5).bool()}, {}, "bool"),
    ],
)
def test_bad_input(change, options, message):
    good = {
        "x": torch.ones(1, 4, 5, 5), "weight": torch.ones(6, 4, 3, 3), "logits": torch.ones(6, 4, 3, 3),
        "threshold": torch.ones(()), "bias": torch.ones(6),
    }  # fmt: skip
    given = {name: t.to(DEVICE) for name, t in (good | change).items()}
    with pytest.raises(InputError, match=message):
        masked_conv2d(**given, **options)
