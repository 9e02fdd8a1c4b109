"""masked_conv2d: y = conv2d(x, W * m) + b, on every backend."""

import pytest
import torch
import torch.nn.functional as F
from support.backends import LAYERS, on
from support.comparing import DEVICE, DTYPES, assert_matches, exact_threshold, launches, randn
from support.refusals import assert_kernel_refuses, assert_refused, changed, each_change, whoever_is_asked
from support.tolerances import assert_close

from hypermask_fast import InputError, ops
from hypermask_fast.ops import reference

CASES = {  # batch, in, out, height, width, kernel; stride, padding, dilation, groups
    "one": ((1, 1, 1, 1, 1, (1, 1)), (1, 0, 1, 1)),
    "simple": ((2, 6, 8, 9, 7, (3, 3)), (1, 1, 1, 1)),
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


def masked(op, threshold, *geometry):
    """The op as a function of what it differentiates."""
    return lambda x, w, a, b=None: op(x, w, a, threshold, b, *geometry)


# The definition


def test_masked_conv2d_is_conv2d_of_the_masked_weight():
    x, weight, logits, bias = (
        torch.randn(s, dtype=torch.float64) for s in ((2, 4, 9, 8), (6, 2, 3, 3), (6, 2, 3, 3), (6,))
    )
    mask = torch.where(logits.abs() >= 0.4, logits.tanh().abs(), 0.0)
    geometry = (2, 1), 1, (1, 2), 2
    y = reference.masked_conv2d(x, weight, logits, torch.tensor(0.4), bias, *geometry)
    assert torch.equal(y, F.conv2d(x, weight * mask, bias, *geometry))
    assert torch.equal(
        reference.masked_conv2d(x, weight, logits, torch.tensor(0.4), groups=2),
        F.conv2d(x, weight * mask, groups=2),
    )


# Plain and Triton


@on("automatic", *LAYERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_masked_conv2d_matches_the_definition(backend, case, channels_last, dtype):
    shape, geometry = CASES[case]
    if channels_last and case == "1x1 strided" and torch.backends.cpu.get_cpu_capability() == "AVX2":
        pytest.skip("PyTorch's own F.conv2d ends the process here, on CPUs without AVX-512 (seen with 2.13)")
    x, weight, logits, bias = tensors(shape, geometry[3], dtype, channels_last)
    threshold = exact_threshold(logits)
    op = masked(backend.masked_conv2d, threshold, *geometry)
    definition = masked(reference.masked_conv2d, threshold.double(), *geometry)
    y = assert_matches(op, definition, (x, weight, logits, bias), dtype)
    if channels_last and y.numel() > 0 and backend.name == "triton":
        assert y.is_contiguous(memory_format=torch.channels_last)


@on(*LAYERS)
def test_masked_conv2d_takes_any_strides_without_bias(backend):
    x = randn(2, 9, 8, 6)[:, ::2].transpose(2, 3)
    weight, logits = randn(4, 3, 3, 10).permute(0, 3, 1, 2)[:, ::2], randn(4, 5, 3, 3)
    threshold, geometry = exact_threshold(logits), (1, 1, 1, 1)
    op = masked(backend.masked_conv2d, threshold, *geometry)
    assert_matches(op, masked(reference.masked_conv2d, threshold.double(), *geometry), (x, weight, logits))


@pytest.mark.parametrize("splits", [1, 3])
def test_masked_conv2d_by_triton_in_tiles_that_do_not_divide(triton, splits):
    from hypermask_fast.kernels.conv2d_shape import Conv2dShape
    from hypermask_fast.kernels.masked_conv2d import launch_convolution, launch_weight_gradient
    from hypermask_fast.kernels.tiles import Tiles

    x, weight, logits, _ = tensors((2, 5, 21, 7, 6, (3, 3)), 1, torch.float32, False)
    threshold, shape = exact_threshold(logits), Conv2dShape((3, 3), (1, 1), (1, 1), (1, 1), 1)
    leaves = [t.double().requires_grad_() for t in (x, weight, logits)]
    expected = reference.masked_conv2d(*leaves, threshold.double(), None, 1, 1)
    y = torch.empty(expected.shape, device=DEVICE)
    launch_convolution(x, weight, logits, threshold, None, y, shape, tiles=Tiles(16, 32, 16))
    assert_close(y, expected, "triton", "y")
    grad = randn(*y.shape)
    _, dw, da = torch.autograd.grad(expected, leaves, grad.double())
    tiles = Tiles(16, 16, 32, splits=splits)
    ours = launch_weight_gradient(grad, x, weight, logits, threshold, shape, tiles=tiles)
    assert_close(ours[0], dw, "triton", "dW")
    assert_close(ours[1], da, "triton", "da")


def test_masked_conv2d_by_triton_launches_the_forward_pass_once(triton):
    x, weight, logits, bias = tensors((2, 6, 8, 9, 7, (3, 3)), 1, torch.float32, False)
    with launches() as launched:
        ops.masked_conv2d(x, weight, logits, exact_threshold(logits), bias, 1, 1, backend="triton")
    assert len(launched) == 1


# Bad input

does_not_fit = each_change(
    ({"x": torch.ones(1, 3, 5, 5)}, "x must have 4 channels for this weight, not 3"),
    ({"x": torch.ones(4, 5, 5)}, "x must be (batch, in, height, width), not (4, 5, 5)"),
    ({"x": torch.ones(1, 4, 2, 2)}, "a kernel of (3, 3) does not fit into an input of (2, 2)"),
    ({"logits": torch.ones(6, 4, 3, 1)}, "logits must have shape (6, 4, 3, 3), not (6, 4, 3, 1)"),
    ({"weight": torch.ones(6, 4)}, "weight must be (out, in / groups, kh, kw), out, kh and kw at least 1, not (6, 4)"),
    ({"threshold": torch.ones(6)}, "threshold must have one entry, not 6"),
    ({"bias": torch.ones(4)}, "bias must have shape (6,), not (4,)"),
    ({"groups": 5}, "groups must divide the 6 output channels, 5 does not"),
    ({"groups": 0}, "groups must divide the 6 output channels, 0 does not"),
    ({"stride": 0}, "stride must be a number of at least 1, or two, not 0"),
    ({"dilation": (1, 0)}, "dilation must be a number of at least 1, or two, not (1, 0)"),
    ({"padding": (1, -1)}, "padding must be a number of at least 0, or two, not (1, -1)"),
    ({"padding": "same"}, "padding must be a number of at least 0, or two, not 'same'"),
)


@whoever_is_asked
@does_not_fit
def test_masked_conv2d_refuses_what_does_not_fit(asked, change, message):
    assert_refused("masked_conv2d", asked, change, message)


@does_not_fit
def test_masked_conv2d_by_triton_called_directly_refuses_in_the_same_words(triton, change, message):
    assert_kernel_refuses(triton, "masked_conv2d", change, message)


@each_change(
    ({"x": torch.ones(2, 4, 5, 5).bool()}, "bool"),
)
def test_masked_conv2d_by_triton_called_directly_refuses_other_dtypes(triton, change, message):
    with pytest.raises(InputError, match=message):
        triton.masked_conv2d(**changed("masked_conv2d", change))
