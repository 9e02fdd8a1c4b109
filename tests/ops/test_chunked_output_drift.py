"""chunked_output_drift: R against the same layer as it stood, from the Gram matrices of both."""

import pytest
import torch
from support.refusals import assert_refused, each_change, whoever_is_asked

from hypermask_fast import ops
from hypermask_fast.ops import reference


@pytest.mark.parametrize(
    ("size", "rows", "width"),
    [
        (45, 12, 5),
        (48, 12, 5),
        (60, 12, 5),
        (41, 12, 5),
        (7, 12, 5),
        (7990, 400, 32),
        (8000, 400, 32),
        (1990, 2000, 100),
    ],
)  # by the residuals themselves, and where they are many by the Gram matrices
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chunked_output_drift_matches_the_definition(size, rows, width, dtype):
    torch.manual_seed(1)
    tasks, chunks = 3, -(-size // rows)
    old = [torch.randn(tasks, chunks, width), torch.randn(rows, width), torch.randn(rows)]
    new = [(x + 1e-3 * torch.randn_like(x)) for x in old]
    mine = [x.to(dtype, copy=True).requires_grad_() for x in new]
    drift = ops.chunked_output_drift(*mine, *(x.to(dtype) for x in old), size)
    drift.backward()
    exact = [x.to(dtype).double().detach().clone().requires_grad_() for x in new]
    expected = reference.chunked_output_drift(*exact, *(x.double() for x in old), size)
    expected.backward()
    # Subtracting outputs in float32 would cost three digits here; the Gram form does not subtract them.
    torch.testing.assert_close(drift.double(), expected, rtol=2e-5 if dtype is torch.float32 else 1e-9, atol=0)
    for x, y in zip(mine, exact, strict=True):
        scale = y.grad.abs().max()
        torch.testing.assert_close(x.grad.double() / scale, y.grad / scale, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("rows", "width"), [(12, 5), (400, 32)])
def test_chunked_output_drift_keeps_its_dtype_under_autocast(rows, width):
    """By the residuals and by the Gram matrices, backward too."""
    old = [torch.randn(3, 20, width), torch.randn(rows, width), torch.randn(rows)]
    new = [(x + 1e-3 * torch.randn_like(x)).requires_grad_() for x in old]
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            drift = ops.chunked_output_drift(*new, *old, 20 * rows - 5)
            results.append([drift, *torch.autograd.grad(drift, new)])
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype == torch.float32 and torch.equal(a, b)


# Bad input

does_not_fit = each_change(
    ({"old_hidden": torch.ones(2, 2, 6)}, "old_hidden must have shape (3, 2, 6), not (2, 2, 6)"),
    ({"old_bias": torch.ones(49)}, "old_bias must have shape (50,), not (49,)"),
    ({"size": -1}, "size must be 0 to chunks * chunk_size = 100, not -1"),
)


@whoever_is_asked
@does_not_fit
def test_chunked_output_drift_refuses_what_does_not_fit(asked, change, message):
    assert_refused("chunked_output_drift", asked, change, message)
