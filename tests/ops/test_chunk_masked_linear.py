"""chunk_masked_linear: masked_linear with the logits that a chunked hypernetwork generates, on every backend."""

import pytest
import torch
from support import few_rows as arguments
from support.backends import LAYERS, missing, on
from support.chunks import generated, source_of, threshold_of
from support.comparing import DTYPES, INF, assert_matches, launches, randn
from support.few_rows import (
    HALVES,
    assert_bad_tensors_are_refused,
    assert_gradients_of_the_definition,
    chunked,
    double,
    misaligned,
    without_jumps,
)
from support.refusals import assert_kernel_refuses, assert_refused, changed, each_change, whoever_is_asked
from support.tolerances import assert_close
from torch.library import opcheck

from hypermask_fast import InputError, ops
from hypermask_fast.ops import reference, registry

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
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def masked(op, start, threshold):
    """The op as a function of what it differentiates."""
    return lambda x, w, h, ow, ob, b=None: op(x, w, h, ow, ob, start, threshold, b)


# The definition


@pytest.mark.parametrize(("chunk_size", "start"), [(1, 0), (5, 3), (24, 0), (100, 7)])
def test_chunk_masked_linear_is_masked_linear_of_the_generated_logits(chunk_size, start):
    """Entry f of the hypernetwork's output is hidden[f // C] . W[f % C] + b[f % C]."""
    x, weight, bias = (torch.randn(s, dtype=torch.float64) for s in ((3, 4), (6, 4), (6,)))
    source = source_of(24, chunk_size, 5, start, 1, torch.float64)
    logits = generated(source, start, (6, 4))
    y = reference.chunk_masked_linear(x, weight, *source, start, torch.tensor(0.4), bias)
    torch.testing.assert_close(y, reference.masked_linear(x, weight, logits, torch.tensor(0.4), bias))


# Plain and Triton


@on("automatic", *LAYERS)
@each_dtype
@pytest.mark.parametrize("case", LINEAR)
def test_chunk_masked_linear_matches_the_definition(backend, case, dtype):
    (batch, inputs, outputs, chunk_size, width, start, more), _ = LINEAR[case]
    source = source_of(inputs * outputs, chunk_size, width, start, more, dtype)
    threshold = threshold_of(source, start, (outputs, inputs))
    x, weight, bias = (randn(*s, dtype=dtype) for s in ((batch, inputs), (outputs, inputs), (outputs,)))
    op = masked(backend.chunk_masked_linear, start, threshold)
    definition = masked(reference.chunk_masked_linear, start, threshold.double())
    assert_matches(op, definition, (x, weight, *source, bias), dtype)


@each_dtype
@pytest.mark.parametrize(
    "case", [name for name, ((batch, inputs, *_), _) in LINEAR.items() if 0 < batch <= 64 and inputs]
)
def test_chunk_masked_linear_by_triton_is_one_kernel_where_chunks_and_rows_keep_step(triton, case, dtype):
    from hypermask_fast.kernels.chunk_masked_linear import launch_fused

    (batch, inputs, outputs, chunk_size, width, start, more), fused = LINEAR[case]
    source = source_of(inputs * outputs, chunk_size, width, start, more, dtype)
    threshold = threshold_of(source, start, (outputs, inputs))
    x, weight, bias = (randn(*s, dtype=dtype) for s in ((batch, inputs), (outputs, inputs), (outputs,)))
    assert (launch_fused(x, weight, *source, start, threshold, bias) is not None) == fused


@on(*LAYERS)
def test_chunk_masked_linear_takes_any_strides_without_bias(backend):
    start = 24
    hidden, output_weight, output_bias = source_of(24 * 40, 48, 10, start, 0, torch.float32)
    source = hidden.t().contiguous().t(), output_weight.t().contiguous().t(), output_bias.repeat(2, 1).t()[:, 0]
    threshold = threshold_of(source, start, (40, 24))
    x, weight = randn(24, 5).t(), randn(24, 40).t()
    op = masked(backend.chunk_masked_linear, start, threshold)
    assert_matches(op, masked(reference.chunk_masked_linear, start, threshold.double()), (x, weight, *source))


def test_chunk_masked_linear_by_triton_launches_what_it_says(triton):
    """One kernel where it is fused."""
    (batch, inputs, outputs, chunk_size, width, start, more), _ = LINEAR["chunks of two rows"]
    source = source_of(inputs * outputs, chunk_size, width, start, more, torch.float32)
    x, weight, limit = randn(batch, inputs), randn(outputs, inputs), threshold_of(source, start, (outputs, inputs))
    with launches() as launched:
        ops.chunk_masked_linear(x, weight, *source, start, limit, backend="triton")
    assert len(launched) == 1


# CUDA for up to 16 rows of x, run by a CPU. rows, outputs, inputs, chunk size, width, start: chunks of whole rows, of
# parts of rows, of less than a step; a start within a chunk; widths that are copied entry by entry, that fill their
# products, that leave no room for the bias.

FEW_ROWS = [
    (1, 1, 1, 1, 1, 0), (2, 49, 64, 128, 12, 0), (3, 60, 100, 250, 13, 77), (16, 100, 40, 100, 20, 3),
    (5, 70, 33, 7, 4, 5), (16, 30, 64, 1000, 16, 9), (9, 9, 1600, 4000, 5, 11), (8, 97, 48, 96, 31, 95),
    (12, 5, 700, 40, 32, 1), (7, 150, 16, 8, 6, 4), (16, 20, 31, 100_000, 8, 99_990),
]  # fmt: skip
each_half = pytest.mark.parametrize("dtype", HALVES, ids=str)


def exact(args):
    return arguments.exact("chunk_masked_linear", args)


@each_half
@pytest.mark.parametrize("shape", FEW_ROWS, ids=str)
def test_chunk_masked_linear_of_few_rows_takes_every_entry_once(few_rows, dtype, shape):
    args = chunked(*shape, dtype)
    assert torch.equal(few_rows.chunk_masked_linear(*args).double(), exact(args))
    args = [misaligned(a) if isinstance(a, torch.Tensor) and a.dim() else a for a in args[:-1]] + [None]
    assert torch.equal(few_rows.chunk_masked_linear(*args).double(), exact(args))


@each_half
def test_chunk_masked_linear_of_few_rows_is_accurate(few_rows, instruction_errors, dtype):
    args = without_jumps(chunked(16, 90, 100, 250, 20, 77, dtype, make=torch.randn))
    y = few_rows.chunk_masked_linear(*args)
    assert_close(y, reference.chunk_masked_linear(*double(args)), arguments.KINDS[dtype])


@pytest.mark.parametrize(("k", "position"), [(70, 247), (80, 7)])  # row 1 crosses from one chunk to the next at k = 73
def test_chunk_masked_linear_of_few_rows_keeps_infinity_in_a_step_across_a_chunks_end(few_rows, k, position):
    args = chunked(3, 60, 100, 250, 13, 77, torch.float16)
    args[1][1, k], args[0][:, k], args[4][position] = INF, 1.0, 2048.0
    y = few_rows.chunk_masked_linear(*args)
    assert (y[:, 1] == INF).all() and y[:, 2:].isfinite().all()


def test_chunk_masked_linear_of_few_rows_takes_the_widest_hypernetwork(few_rows):
    args = chunked(3, 60, 64, 128, arguments.MAX_WIDTH, 0, torch.float16)
    assert torch.equal(few_rows.chunk_masked_linear(*args).double(), exact(args))


@each_half
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0)])
def test_chunk_masked_linear_of_few_rows_with_nothing_in_a_dimension(few_rows, dtype, rows, outputs, inputs):
    x, weight, bias = torch.ones(rows, inputs).to(dtype), torch.ones(outputs, inputs).to(dtype), torch.randn(outputs)
    bias = bias.to(dtype)
    for chunks, chunk_size in ((5, 7), (12, 1), *([] if outputs * inputs else [(0, 7), (0, 0)])):
        layer = [torch.ones(*s).to(dtype) for s in ((chunks, 3), (chunk_size, 3), (chunk_size,))]
        start = chunks * chunk_size - outputs * inputs
        y = few_rows.chunk_masked_linear(x, weight, *layer, start, torch.tensor(0.0), bias)
        assert torch.equal(y, bias.expand(rows, outputs))


@each_half
@pytest.mark.parametrize("by", ["triton", "pytorch"])
def test_chunk_masked_linear_of_few_rows_gradients(few_rows, dtype, by):
    if by == "triton" and dtype not in DTYPES:
        pytest.skip("bfloat16 is garbage in Triton's interpreter")
    args = without_jumps(chunked(3, 20, 10, 50, 6, 7, dtype, make=torch.randn))
    with missing(*["triton"] * (by == "pytorch")):
        assert_gradients_of_the_definition(few_rows, "chunk_masked_linear", args)


@each_dtype
@pytest.mark.parametrize(("outputs", "inputs"), [(40, 24), (0, 4), (3, 0)])
def test_chunk_masked_linear_of_few_rows_gradients_by_triton_keep_no_mask(triton, monkeypatch, outputs, inputs, dtype):
    monkeypatch.setattr(arguments.few_rows, "_mask_and_slope", lambda *args: pytest.fail("PyTorch made the mask"))
    start = 77
    source = source_of(outputs * inputs, 48, 10, start, 1, dtype)
    threshold = threshold_of(source, start, (outputs, inputs))
    x, weight, bias = (randn(*s, dtype=dtype) for s in ((5, inputs), (outputs, inputs), (outputs,)))
    op = masked(arguments.with_forward_of_the_definition("chunk_masked_linear"), start, threshold.to(dtype))
    definition = masked(reference.chunk_masked_linear, start, threshold.double())
    assert_matches(op, definition, (x, weight, *source, bias), dtype)


def test_chunk_masked_linear_of_few_rows_passes_opcheck(few_rows):
    torch.use_deterministic_algorithms(False)  # opcheck runs the ops through inductor's own paths
    args = arguments.valid("chunk_masked_linear")
    args = [a.requires_grad_() if isinstance(a, torch.Tensor) and a.dim() else a for a in args]
    opcheck(few_rows.operator("chunk_masked_linear"), args)


@pytest.mark.parametrize("how", ["dtype", "stride", "shape", "dimensions"])
def test_chunk_masked_linear_of_few_rows_refuses_bad_tensors(few_rows, how):
    assert_bad_tensors_are_refused(few_rows, "chunk_masked_linear", how)


def test_chunk_masked_linear_of_few_rows_refuses_other_bad_arguments(few_rows):
    args = arguments.valid("chunk_masked_linear")
    for start in (-1, 51, 2**62):
        args[5] = start
        with pytest.raises(RuntimeError, match="lie outside the 250"):
            few_rows.chunk_masked_linear(*args)
    with pytest.raises(RuntimeError, match="float16 or bfloat16"):
        few_rows.chunk_masked_linear(*arguments.valid("chunk_masked_linear", torch.float32))
    with pytest.raises(RuntimeError, match="513 wide"):
        few_rows.chunk_masked_linear(*chunked(3, 20, 10, 50, 513, 7, torch.float16))


def test_chunk_masked_linear_of_few_rows_says_what_it_does_not_serve():
    refused = lambda *shape: arguments.refusal("chunk_masked_linear", *chunked(*shape, torch.float16))  # noqa: E731
    assert refused(16, 64, 32, 64, 8, 5) == "" == refused(1, 2000, 40, 4000, 100, 0)
    assert "17 rows" in refused(17, 64, 32, 64, 8, 5)
    assert "513 wide" in refused(16, 64, 32, 64, 513, 5)
    assert "shorter" in refused(16, 64, 32, 31, 8, 5)
    assert "fewer than 16 rows" in refused(16, 64, 32, 6400, 8, 5)
    assert torch.float32 not in arguments.offered_dtypes("chunk_masked_linear")


@pytest.mark.native
def test_chunk_masked_linear_of_few_rows_takes_leading_dimensions():
    """Shapes only: the ops themselves have no kernel for these tensors."""
    x, *rest = (t.to("meta") if isinstance(t, torch.Tensor) else t for t in arguments.valid("chunk_masked_linear"))
    assert arguments.call("chunk_masked_linear", x[None], *rest).shape == (1, 3, 20)


@pytest.mark.skipif(bool(registry.problem("cuda")), reason=registry.problem("cuda") or "there is one")
@each_half
@pytest.mark.parametrize("rows", [1, 5, 16])
def test_chunk_masked_linear_of_few_rows_on_a_gpu(rows, dtype):
    shapes = (rows, 1000), (1024, 1000), (129, 64), (8000, 64), (8000,)
    tensors = (torch.randn(*s).to("cuda", dtype) for s in shapes)
    args = (*tensors, 16, torch.zeros((), device="cuda", dtype=dtype))
    ours, theirs = ops.chunk_masked_linear(*args, backend="cuda"), reference.chunk_masked_linear(*args)
    assert_close(ours, reference.chunk_masked_linear(*double(args)), "cuda", peer=theirs, rounding=1)


# Bad input

does_not_fit = each_change(
    ({"x": torch.ones(3, 4)}, "x must be (..., 5) for a weight of (4, 5), not (3, 4)"),
    ({"start": 110}, "entries 110 to 130 lie outside the 120 that the chunks generate"),
    ({"start": -1}, "entries -1 to 19 lie outside the 120 that the chunks generate"),
    ({"hidden": torch.ones(10, 5)}, "hidden must be (chunks, H) and output_weight (C, H), not (10, 5) and (12, 6)"),
    ({"output_bias": torch.ones(11)}, "output_bias must have shape (12,), not (11,)"),
    ({"threshold": torch.ones(3)}, "threshold must have one entry, not 3"),
    ({"bias": torch.ones(5)}, "bias must have shape (4,), not (5,)"),
    ({"weight": torch.ones(5)}, "weight must be (out, in), not (5,)"),
)


@whoever_is_asked
@does_not_fit
def test_chunk_masked_linear_refuses_what_does_not_fit(asked, change, message):
    assert_refused("chunk_masked_linear", asked, change, message)


@does_not_fit
def test_chunk_masked_linear_by_triton_called_directly_refuses_in_the_same_words(triton, change, message):
    assert_kernel_refuses(triton, "chunk_masked_linear", change, message)


@each_change(
    ({"hidden": torch.ones(10, 6).long()}, "int64"),
)
def test_chunk_masked_linear_by_triton_called_directly_refuses_other_dtypes(triton, change, message):
    with pytest.raises(InputError, match=message):
        triton.chunk_masked_linear(**changed("chunk_masked_linear", change))
