"""The backward passes of the CUDA ops for a few rows, which are Triton's where Triton is there."""

import pytest
import torch
from comparing import DTYPES, assert_matches, exact_threshold, gap_threshold, launches, randn

from hypermask_fast.ops import reference
from hypermask_fast.ops.native import few_rows as small_batch


def small(op):
    """The CUDA op, its forward pass taken over by the reference."""

    class Small(torch.autograd.Function):
        forward = staticmethod(getattr(reference, op))
        backward, setup_context = map(staticmethod, small_batch.GRADIENTS[f"small_{op}"])

    return Small.apply


@pytest.fixture(autouse=True)
def no_mask_in_memory(monkeypatch):
    monkeypatch.setattr(small_batch, "_mask_and_slope", lambda *args: pytest.fail("PyTorch made the mask"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(5, 9, 20), (0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_masked_linear(rows, outputs, inputs, dtype):
    x, weight, logits, bias = (
        randn(*s, dtype=dtype) for s in ((rows, inputs), (outputs, inputs), (outputs, inputs), (outputs,))
    )
    threshold = exact_threshold(logits)
    assert_matches(
        lambda x, w, a, b: small("masked_linear")(x, w, a, threshold, b),
        lambda x, w, a, b: reference.masked_linear(x, w, a, threshold.double(), b),
        (x, weight, logits, bias),
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("outputs", "inputs"), [(40, 24), (0, 4), (3, 0)])
def test_chunk_masked_linear(outputs, inputs, dtype):
    start, chunk_size, width = 77, 48, 10
    chunks = -(-(start + outputs * inputs) // chunk_size) + 1
    hidden, output_weight = randn(chunks, width, dtype=dtype), randn(chunk_size, width, dtype=dtype) / width**0.5
    source = hidden, output_weight, randn(chunk_size, dtype=dtype)
    threshold = gap_threshold(reference.chunk_logits(*(t.double() for t in source), start, (outputs, inputs)))
    x, weight, bias = (randn(*s, dtype=dtype) for s in ((5, inputs), (outputs, inputs), (outputs,)))
    assert_matches(
        lambda x, w, h, ow, ob, b: small("chunk_masked_linear")(x, w, h, ow, ob, start, threshold.to(dtype), b),
        lambda x, w, h, ow, ob, b: reference.chunk_masked_linear(x, w, h, ow, ob, start, threshold.double(), b),
        (x, weight, *source, bias),
        dtype,
    )


def test_what_nobody_wants_is_not_made():
    x, weight, logits = (randn(*s, dtype=torch.float32) for s in ((5, 20), (9, 20), (9, 20)))
    y = small("masked_linear")(x.requires_grad_(), weight, logits, exact_threshold(logits), None)
    with launches() as launched:
        y.sum().backward()
    assert launched == ["_masked_product"] and x.grad is not None and weight.grad is None
