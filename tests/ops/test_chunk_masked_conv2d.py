"""chunk_masked_conv2d: masked_conv2d with the logits that a chunked hypernetwork generates, on every backend."""

import pytest
import torch
from support.backends import LAYERS, on
from support.chunks import generated, source_of, threshold_of
from support.comparing import DTYPES, assert_matches, launches, randn
from support.refusals import assert_kernel_refuses, assert_refused, changed, each_change, whoever_is_asked

from hypermask_fast import InputError, ops
from hypermask_fast.ops import reference

SIMPLE = (1, 0, 1, 1)  # stride, padding, dilation, groups


def masked(op, start, threshold, geometry=SIMPLE):
    """The op as a function of what it differentiates."""
    return lambda x, w, h, ow, ob, b=None: op(x, w, h, ow, ob, start, threshold, b, *geometry)


@pytest.mark.parametrize(("chunk_size", "start"), [(7, 3), (108, 0), (1000, 5)])
def test_chunk_masked_conv2d_is_masked_conv2d_of_the_generated_logits(chunk_size, start):
    """Entry f of the hypernetwork's output is hidden[f // C] . W[f % C] + b[f % C]."""
    x, weight, bias = (torch.randn(s, dtype=torch.float64) for s in ((2, 4, 6, 5), (6, 2, 3, 3), (6,)))
    source = source_of(108, chunk_size, 5, start, 1, torch.float64)
    logits, threshold, geometry = generated(source, start, (6, 2, 3, 3)), torch.tensor(0.4), (2, 1, 1, 2)
    y = reference.chunk_masked_conv2d(x, weight, *source, start, threshold, bias, *geometry)
    torch.testing.assert_close(y, reference.masked_conv2d(x, weight, logits, threshold, bias, *geometry))


@on("automatic", *LAYERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("chunk_size", "start"), [(7, 3), (36, 0), (1000, 5)])
def test_chunk_masked_conv2d_matches_the_definition(backend, chunk_size, start, dtype):
    shape, geometry = (6, 2, 3, 3), (2, 1, 1, 2)
    source = source_of(108, chunk_size, 5, start, 0, dtype)
    threshold = threshold_of(source, start, shape)
    op = masked(backend.chunk_masked_conv2d, start, threshold, geometry)
    definition = masked(reference.chunk_masked_conv2d, start, threshold.double(), geometry)
    x, weight, bias = randn(2, 4, 6, 5, dtype=dtype), randn(*shape, dtype=dtype), randn(6, dtype=dtype)
    assert_matches(op, definition, (x, weight, *source, bias), dtype)


@on(*LAYERS)
def test_chunk_masked_conv2d_takes_channels_last_without_bias(backend):
    source = source_of(108, 50, 5, 9, 1, torch.float32)
    threshold = threshold_of(source, 9, (6, 2, 3, 3))
    x, weight = (randn(*s).to(memory_format=torch.channels_last) for s in ((2, 2, 6, 5), (6, 2, 3, 3)))
    op = masked(backend.chunk_masked_conv2d, 9, threshold)
    assert_matches(op, masked(reference.chunk_masked_conv2d, 9, threshold.double()), (x, weight, *source))


def test_chunk_masked_conv2d_by_triton_launches_one_kernel_that_makes_the_masked_weight(triton):
    source = source_of(108, 36, 5, 0, 0, torch.float32)
    x, weight = randn(2, 2, 6, 5), randn(6, 2, 3, 3)
    threshold = threshold_of(source, 0, (6, 2, 3, 3))
    with launches() as launched:
        ops.chunk_masked_conv2d(x, weight, *source, 0, threshold, backend="triton")
    assert len(launched) == 1


# Bad input

does_not_fit = each_change(
    (
        {"weight": torch.ones(0, 2, 3, 3)},
        "weight must be (out, in / groups, kh, kw), out, kh and kw at least 1, not (0, 2, 3, 3)",
    ),
    ({"x": torch.ones(2, 3, 5, 5)}, "x must have 2 channels for this weight, not 3"),
    ({"padding": "same"}, "padding must be a number of at least 0, or two, not 'same'"),
    ({"start": 110}, "entries 110 to 182 lie outside the 120 that the chunks generate"),
    ({"start": -1}, "entries -1 to 71 lie outside the 120 that the chunks generate"),
    ({"hidden": torch.ones(10, 5)}, "hidden must be (chunks, H) and output_weight (C, H), not (10, 5) and (12, 6)"),
    ({"output_bias": torch.ones(11)}, "output_bias must have shape (12,), not (11,)"),
    ({"threshold": torch.ones(3)}, "threshold must have one entry, not 3"),
    ({"bias": torch.ones(5)}, "bias must have shape (4,), not (5,)"),
    ({"weight": torch.ones(5)}, "weight must be (out, in / groups, kh, kw), out, kh and kw at least 1, not (5,)"),
)


@whoever_is_asked
@does_not_fit
def test_chunk_masked_conv2d_refuses_what_does_not_fit(asked, change, message):
    assert_refused("chunk_masked_conv2d", asked, change, message)


@does_not_fit
def test_chunk_masked_conv2d_by_triton_called_directly_refuses_in_the_same_words(triton, change, message):
    assert_kernel_refuses(triton, "chunk_masked_conv2d", change, message)


@each_change(
    ({"hidden": torch.ones(10, 6).long()}, "int64"),
)
def test_chunk_masked_conv2d_by_triton_called_directly_refuses_other_dtypes(triton, change, message):
    with pytest.raises(InputError, match=message):
        triton.chunk_masked_conv2d(**changed("chunk_masked_conv2d", change))
