import pytest
import torch
from comparing import DEVICE, DTYPES, assert_matches, gap_threshold, randn

from hypermask_fast.errors import InputError
from hypermask_fast.kernels import chunk_masked_conv2d, chunk_masked_linear
from hypermask_fast.kernels.chunk_masked_linear import launch_fused
from hypermask_fast.ops import reference

LINEAR = {  # batch, in, out, chunk size, hypernetwork's width, start, further chunks; is it one kernel?
    "one": ((1, 1, 1, 1, 1, 0, 0), False),
    "chunks of two rows": ((5, 24, 40, 48, 10, 24, 1), True),
    "a wide hypernetwork": ((5, 24, 40, 48, 100, 48, 0), True),
    "rows of two chunks": ((3, 64, 33, 32, 7, 64, 1), True),
    "a chunk per row, split": ((3, 300, 20, 300, 5, 0, 0), True),
    "rows that end in tiles": ((4, 96, 70, 64, 9, 32, 2), True),
    "out of step": ((7, 13, 9, 10, 5, 3, 2), False),
    "one chunk": ((9, 100, 7, 1000, 20, 55, 0), False),
    "many rows": ((70, 24, 40, 48, 10, 24, 1), False),
    "no rows": ((0, 5, 3, 4, 3, 1, 0), False),
    "no inputs": ((2, 0, 3, 4, 3, 1, 1), False),
}


def layer(size, chunk_size, width, start, more, dtype):
    """Hidden vectors and output layer that generate entries start to start + size, and `more` chunks beyond."""
    chunks = -(-(start + size) // chunk_size) + more
    hidden, weight = randn(chunks, width, dtype=dtype), randn(chunk_size, width, dtype=dtype) / width**0.5
    return hidden, weight, randn(chunk_size, dtype=dtype)


def threshold_of(source, start, shape):
    return gap_threshold(reference.chunk_logits(*(t.double() for t in source), start, shape))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", LINEAR)
def test_linear_matches_reference(case, dtype):
    (batch, inputs, outputs, chunk_size, width, start, more), fused = LINEAR[case]
    source = layer(inputs * outputs, chunk_size, width, start, more, dtype)
    threshold = threshold_of(source, start, (outputs, inputs))
    x, weight, bias = (randn(*s, dtype=dtype) for s in ((batch, inputs), (outputs, inputs), (outputs,)))
    if 0 < batch <= 64 and weight.numel() > 0:
        assert (launch_fused(x, weight, *source, start, threshold, bias) is not None) == fused
    assert_matches(
        lambda x, w, h, ow, ob, b: chunk_masked_linear(x, w, h, ow, ob, start, threshold, b),
        lambda x, w, h, ow, ob, b: reference.chunk_masked_linear(x, w, h, ow, ob, start, threshold.double(), b),
        (x, weight, *source, bias),
        dtype,
    )


def test_strided_inputs():
    start, dtype = 24, torch.float32
    hidden, output_weight, output_bias = layer(24 * 40, 48, 10, start, 0, dtype)
    source = (hidden.t().contiguous().t(), output_weight.t().contiguous().t(), output_bias.repeat(2, 1).t()[:, 0])
    threshold = threshold_of(source, start, (40, 24))
    x, weight = randn(24, 5, dtype=dtype).t(), randn(24, 40, dtype=dtype).t()
    assert_matches(
        lambda x, w, h, ow, ob: chunk_masked_linear(x, w, h, ow, ob, start, threshold),
        lambda x, w, h, ow, ob: reference.chunk_masked_linear(x, w, h, ow, ob, start, threshold.double()),
        (x, weight, *source),
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("chunk_size", "start"), [(7, 3), (36, 0), (1000, 5)])
def test_conv2d_matches_reference(chunk_size, start, dtype):
    shape, geometry = (6, 2, 3, 3), (2, 1, 1, 2)
    source = layer(108, chunk_size, 5, start, 0, dtype)
    threshold = threshold_of(source, start, shape)
    assert_matches(
        lambda x, w, h, ow, ob, b: chunk_masked_conv2d(x, w, h, ow, ob, start, threshold, b, *geometry),
        lambda x, w, h, ow, ob, b: reference.chunk_masked_conv2d(
            x, w, h, ow, ob, start, threshold.double(), b, *geometry
        ),
        (randn(2, 4, 6, 5, dtype=dtype), randn(*shape, dtype=dtype), *source, randn(6, dtype=dtype)),
        dtype,
    )


def test_conv2d_channels_last():
    source = layer(108, 50, 5, 9, 1, torch.float32)
    threshold = threshold_of(source, 9, (6, 2, 3, 3))
    x, weight = (randn(*s, dtype=torch.float32) for s in ((2, 2, 6, 5), (6, 2, 3, 3)))
    x, weight = (t.to(memory_format=torch.channels_last) for t in (x, weight))
    assert_matches(
        lambda x, w, h, ow, ob: chunk_masked_conv2d(x, w, h, ow, ob, 9, threshold),
        lambda x, w, h, ow, ob: reference.chunk_masked_conv2d(x, w, h, ow, ob, 9, threshold.double()),
        (x, weight, *source),
        torch.float32,
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"start": 90}, "lie outside"),
        ({"start": -1}, "lie outside"),
        ({"hidden": torch.ones(10, 3)}, "hidden must be"),
        ({"output_bias": torch.ones(11)}, "output_bias must be"),
        ({"threshold": torch.ones(3)}, "threshold must be"),
        ({"hidden": torch.ones(10, 4).long()}, "int64"),
    ],
)
def test_bad_input(change, message):
    good = {
        "x": torch.ones(2, 5), "weight": torch.ones(3, 5), "hidden": torch.ones(10, 4),
        "output_weight": torch.ones(10, 4), "output_bias": torch.ones(10), "start": 3, "threshold": torch.ones(()),
    }  # fmt: skip
    given = {n: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for n, v in (good | change).items()}
    with pytest.raises(InputError, match=message):
        chunk_masked_linear(**given)
    given |= {"x": torch.ones(1, 5, 4, 4, device=DEVICE), "weight": torch.ones(3, 5, 1, 1, device=DEVICE)}
    with pytest.raises(InputError, match=message):
        chunk_masked_conv2d(**given)


def test_a_convolution_without_outputs_is_refused():
    """As by PyTorch, whose convolution of W * m it is."""
    source = (torch.ones(n, device=DEVICE) for n in ((10, 4), (10, 4), (10,)))
    x, weight = torch.ones(1, 5, 4, 4, device=DEVICE), torch.ones(0, 5, 1, 1, device=DEVICE)
    with pytest.raises(InputError, match="an output channel"):
        chunk_masked_conv2d(x, weight, *source, 0, torch.ones((), device=DEVICE))
