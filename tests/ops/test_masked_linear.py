"""masked_linear: y = x (W * m)^T + b, on every backend."""

import pytest
import torch
import torch.nn.functional as F
from support import few_rows as arguments
from support.backends import LAYERS, missing, on
from support.comparing import (
    DEVICE,
    DTYPES,
    INF,
    NAN,
    assert_matches,
    exact_threshold,
    launches,
    randn,
)
from support.few_rows import assert_bad_tensors_are_refused, assert_gradients_of_the_definition, double, linear, whole
from support.refusals import assert_kernel_refuses, assert_refused, changed, each_change, whoever_is_asked
from support.tolerances import assert_close
from torch.library import opcheck

from hypermask_fast import InputError, ops
from hypermask_fast.ops import reference, registry

F32 = torch.float32
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
on_layers = on(*LAYERS)


def masked(op, threshold):
    """The op as a function of what it differentiates."""
    return lambda x, w, a, b=None: op(x, w, a, threshold, b)


# The definition


def test_masked_linear_is_linear_of_the_masked_weight():
    x, weight, logits, bias = (torch.randn(s, dtype=torch.float64) for s in ((3, 4), (6, 4), (6, 4), (6,)))
    mask = torch.where(logits.abs() >= 0.4, logits.tanh().abs(), 0.0)
    y = reference.masked_linear(x, weight, logits, torch.tensor(0.4), bias)
    assert torch.equal(y, x @ (weight * mask).T + bias) and torch.equal(y, F.linear(x, weight * mask, bias))
    assert torch.equal(reference.masked_linear(x, weight, logits, torch.tensor(0.4)), F.linear(x, weight * mask))


# Plain and Triton


SHAPES = [  # batch, in, out
    ((1,), 1, 1),
    ((7,), 300, 65),  # a split reduction
    ((130,), 33, 70),  # several tiles of everything
    ((2, 3), 17, 5),
    ((), 5, 3),
    ((0,), 5, 3),
    ((3,), 0, 4),
    ((3,), 4, 0),
]


@on("automatic", *LAYERS)
@each_dtype
@pytest.mark.parametrize(("batch", "inputs", "outputs"), SHAPES)
def test_masked_linear_matches_the_definition(backend, batch, inputs, outputs, dtype):
    x, bias = randn(*batch, inputs, dtype=dtype), randn(outputs, dtype=dtype)
    weight, logits = randn(outputs, inputs, dtype=dtype), randn(outputs, inputs, dtype=dtype)
    threshold = exact_threshold(logits)
    op, definition = masked(backend.masked_linear, threshold), masked(reference.masked_linear, threshold.double())
    assert_matches(op, definition, (x, weight, logits, bias), dtype)


@on_layers
@each_dtype
def test_masked_linear_takes_any_strides_without_bias(backend, dtype):
    x = randn(20, 9, dtype=dtype).t()
    weight, logits = randn(14, 40, dtype=dtype)[::2, ::2], randn(20, 7, dtype=dtype).t()
    threshold = exact_threshold(logits)
    op, definition = masked(backend.masked_linear, threshold), masked(reference.masked_linear, threshold.double())
    assert_matches(op, definition, (x, weight, logits), dtype)


@on_layers
def test_masked_linear_keeps_the_precision_of_small_logits(backend):
    """tanh of tiny logits is their own value: the textbook formula in exponentials would return noise."""
    logits = torch.tensor([[1e-6, -1e-3, 0.0, 0.2499, -0.2501, 9.0, -30.0, 200.0]], device=DEVICE)
    x = torch.eye(8, device=DEVICE)
    weight, threshold = torch.ones_like(logits), torch.zeros((), device=DEVICE)
    y = backend.masked_linear(x, weight, logits, threshold, None)
    torch.testing.assert_close(y[:, 0].double(), logits[0].double().tanh().abs(), rtol=1e-6, atol=0, check_device=False)


@on_layers
def test_masked_linear_keeps_nan_logits_and_shows_them(backend):
    logits = torch.tensor([[0.1, NAN], [0.1, 2.0]], device=DEVICE)
    x, threshold = torch.ones(1, 2, device=DEVICE), torch.tensor(1.0).to(DEVICE)
    y = backend.masked_linear(x, torch.ones_like(logits), logits, threshold, None)
    assert y[0, 0].isnan() and not y[0, 1].isnan()


@on_layers
def test_masked_linear_repeats_bit_for_bit(backend):
    x, weight, logits = (randn(*s).requires_grad_() for s in ((5, 300), (20, 300), (20, 300)))
    threshold = exact_threshold(logits)

    def once():
        y = backend.masked_linear(x, weight, logits, threshold, None)
        return y, *torch.autograd.grad(y.sum(), (x, weight, logits))

    for first, second in zip(once(), once(), strict=True):
        assert torch.equal(first, second)


def test_masked_linear_by_triton_takes_weight_and_logits_of_other_dtypes(triton):
    """As under autocast: products in x's dtype, weight and logits as stored, their gradients too."""
    x, w, a = randn(6, 20, dtype=torch.float16), randn(9, 20), randn(9, 20)
    threshold = exact_threshold(a)
    op, definition = masked(triton.masked_linear, threshold), masked(reference.masked_linear, threshold.double())
    y = assert_matches(op, definition, (x, w, a), torch.float16)
    assert y.dtype == torch.float16


@pytest.mark.parametrize("splits", [1, 3])
def test_masked_linear_by_triton_in_tiles_that_do_not_divide(triton, splits):
    from hypermask_fast.kernels.masked_linear import launch_product
    from hypermask_fast.kernels.tiles import Tiles

    x, w, a, bias = (randn(*s) for s in ((45, 50), (35, 50), (35, 50), (35,)))
    threshold = exact_threshold(a)
    expected = reference.masked_linear(x.double(), w.double(), a.double(), threshold.double(), bias.double())
    tiles = Tiles(16, 32, 16, splits=splits)
    found = launch_product(x, w, a, threshold, bias, tiles)
    assert_close(found, expected, "triton")
    assert torch.equal(
        found, launch_product(x, w, a, threshold, bias, tiles)
    )  # partial sums in the order of the splits
    dy = randn(45, 35)
    dx = launch_product(dy, w.t(), a.t(), threshold, None, tiles)
    mask = torch.where(a.abs() < threshold, 0.0, a.tanh().abs())
    assert_close(dx, dy.double() @ (w * mask).double(), "triton")


def test_masked_linear_by_triton_makes_only_the_wanted_gradient(triton):
    from hypermask_fast.kernels.masked_linear import launch_weight_gradient

    x, w, a = (randn(*s) for s in ((4, 6), (5, 6), (5, 6)))
    dw, da = launch_weight_gradient(randn(4, 5), x, w, a, exact_threshold(a), False, True)
    assert dw.numel() == 0 and da.shape == a.shape and not da.isnan().any()


def test_masked_linear_by_triton_is_one_launch_each_for_the_output_dx_and_the_layers_gradients(triton):
    x, w, a = (randn(*s).requires_grad_() for s in ((5, 20), (9, 20), (9, 20)))
    threshold = exact_threshold(a)
    with launches() as forward:
        y = ops.masked_linear(x, w, a, threshold, backend="triton")
    with launches() as backward:
        y.sum().backward()
    assert forward == ["_masked_product"] and backward == ["_masked_product", "_weight_gradient"]


# CUDA for few rows of x, run by a CPU. Rows 1 to 16, in half precision up to 64; outputs and inputs at, below and
# beyond a tile's borders, aligned and not; the last ones are split.

FEW_ROWS = [
    (1, 1, 1), (2, 15, 8), (3, 17, 40), (4, 32, 31), (5, 33, 32), (6, 16, 33), (7, 8, 64), (8, 31, 65), (9, 48, 520),
    (10, 49, 96), (11, 64, 7), (12, 65, 24), (13, 3, 3072), (14, 40, 1537), (15, 2, 1600), (16, 96, 1024),
    (17, 33, 72), (24, 40, 39), (32, 16, 136), (33, 20, 2120), (63, 31, 65), (64, 34, 1544),
]  # fmt: skip
each_few_rows_dtype = pytest.mark.parametrize("dtype", arguments.DTYPES["masked_linear"], ids=str)


@each_few_rows_dtype
@pytest.mark.parametrize(("rows", "outputs", "inputs"), FEW_ROWS)
def test_masked_linear_of_few_rows_takes_every_entry_once(few_rows, dtype, rows, outputs, inputs):
    if rows > arguments.most_rows("masked_linear", dtype):
        pytest.skip("few rows are fewer in float32")
    x, weight = whole(rows, inputs, dtype=dtype), whole(outputs, inputs, dtype=dtype)
    logits, bias = 20 * whole(outputs, inputs, dtype=dtype), whole(outputs, dtype=dtype)
    args = (x, weight, logits, torch.tensor(0.5, dtype=dtype), bias)
    assert torch.equal(few_rows.masked_linear(*args).double(), arguments.exact("masked_linear", args))
    args = (*map(arguments.misaligned, (x, weight, logits)), torch.tensor([0.5]), None)
    assert torch.equal(few_rows.masked_linear(*args).double(), arguments.exact("masked_linear", args))


def split_arguments(rows=5, outputs=20, inputs=4096):
    """Of one tile of outputs, which the emulated GPU's three multiprocessors share."""
    x, weight, bias = (whole(*s, dtype=torch.bfloat16) for s in ((rows, inputs), (outputs, inputs), (outputs,)))
    return x, weight, 20 * whole(outputs, inputs, dtype=torch.bfloat16), torch.tensor(0.5), bias


def test_a_split_reduction_of_few_rows_is_one_launch(few_rows, emulated):
    """The last split to end adds up; its counter is 0 again for the next call, whichever outputs that has."""
    launched = emulated.library.emulation_launches
    for args in (split_arguments(), split_arguments(3, 30), split_arguments(64, 1, 8192)):
        before = launched()
        assert torch.equal(few_rows.masked_linear(*args).double(), arguments.exact("masked_linear", args))
        assert launched() - before == 2  # the emulation runs each call in two orders


def test_a_captured_split_reduction_has_counters_of_its_own(few_rows, emulated):
    """As long as there are any; then a second launch adds up, and calls that run at once still have the stream's."""
    launched, capturing = emulated.library.emulation_launches, emulated.library.emulation_set_capturing
    args = split_arguments(1, 1, 1024)
    exact = arguments.exact("masked_linear", args)

    def launches_of_a_call():
        before = launched()
        assert torch.equal(few_rows.masked_linear(*args).double(), exact)
        return launched() - before

    assert launches_of_a_call() == 2
    try:
        capturing(1)
        found = [launches_of_a_call() for _ in range(1100)]
    finally:
        capturing(0)
    assert found[0] == 2 and found[-1] == 4 and found == sorted(found)
    assert launches_of_a_call() == 2


def special_logits(*shape):
    logits = torch.randn(*shape)
    special = torch.tensor([0.0, -0.0, 1e-30, 0.06, -0.07, 0.3, -0.3, 0.62, 0.63, 9.0, -30.0, INF, -INF])
    logits.view(-1)[: len(special)] = special
    return logits


@each_few_rows_dtype
@pytest.mark.parametrize("threshold", [0.0, 0.3, NAN])
def test_masked_linear_of_few_rows_is_accurate(few_rows, instruction_errors, dtype, threshold):
    threshold = torch.tensor(threshold, dtype=dtype)
    args = (
        torch.randn(arguments.most_rows("masked_linear", dtype), 200),
        torch.randn(40, 200),
        special_logits(40, 200),
        threshold,
        torch.randn(40),
    )
    args = [a.to(dtype) for a in args]
    y = few_rows.masked_linear(*args)
    assert_close(y, reference.masked_linear(*double(args)), arguments.KINDS[dtype])


@each_few_rows_dtype
def test_masked_linear_of_few_rows_shows_what_is_not_a_number_where_it_belongs(few_rows, dtype):
    x, weight, logits = (t.to(dtype) for t in (torch.randn(3, 50), torch.randn(20, 50), torch.randn(20, 50)))
    logits[2, 7], logits[19, 49] = NAN, -NAN
    weight[5, 3], logits[5, 3] = INF, 0.0  # dropped, and so Inf * 0
    args = (x, weight, logits, torch.tensor(0.3), None)
    y = few_rows.masked_linear(*args)
    assert y.isnan().any(0).nonzero().flatten().tolist() == [2, 5, 19]
    assert_close(y, reference.masked_linear(*double(args)), arguments.KINDS[dtype])


@pytest.mark.parametrize("dtype", arguments.HALVES, ids=str)
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0)])
def test_masked_linear_of_few_rows_with_nothing_in_a_dimension(few_rows, dtype, rows, outputs, inputs):
    x, weight, bias = torch.ones(rows, inputs).to(dtype), torch.ones(outputs, inputs).to(dtype), torch.randn(outputs)
    y = few_rows.masked_linear(x, weight, weight, torch.tensor(0.0), bias.to(dtype))
    assert torch.equal(y, bias.to(dtype).expand(rows, outputs))


@each_few_rows_dtype
@pytest.mark.parametrize("by", ["triton", "pytorch"])
def test_masked_linear_of_few_rows_gradients(few_rows, dtype, by):
    if by == "triton" and dtype not in DTYPES:
        pytest.skip("bfloat16 is garbage in Triton's interpreter")
    with missing(*["triton"] * (by == "pytorch")):
        assert_gradients_of_the_definition(few_rows, "masked_linear", linear(3, 20, 10, dtype))


@pytest.fixture
def no_mask_in_memory(monkeypatch):
    monkeypatch.setattr(arguments.few_rows, "_mask_and_slope", lambda *args: pytest.fail("PyTorch made the mask"))


@each_dtype
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(5, 9, 20), (0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_masked_linear_of_few_rows_gradients_by_triton_keep_no_mask(
    triton, no_mask_in_memory, rows, outputs, inputs, dtype
):
    x, weight, logits, _, bias = (t.to(DEVICE) for t in linear(rows, outputs, inputs, dtype))
    threshold = exact_threshold(logits)
    op = masked(arguments.with_forward_of_the_definition("masked_linear"), threshold)
    assert_matches(op, masked(reference.masked_linear, threshold.double()), (x, weight, logits, bias), dtype)


def test_masked_linear_of_few_rows_makes_no_gradient_that_nobody_wants(triton, no_mask_in_memory):
    x, weight, logits = (randn(*s) for s in ((5, 20), (9, 20), (9, 20)))
    op = arguments.with_forward_of_the_definition("masked_linear")
    y = op(x.requires_grad_(), weight, logits, exact_threshold(logits), None)
    with launches() as launched:
        y.sum().backward()
    assert launched == ["_masked_product"] and x.grad is not None and weight.grad is None


def test_masked_linear_of_few_rows_passes_opcheck(few_rows):
    torch.use_deterministic_algorithms(False)  # opcheck runs the ops through inductor's own paths
    args = [a.requires_grad_() if a.dim() else a for a in arguments.valid("masked_linear")]
    opcheck(few_rows.operator("masked_linear"), args)


@pytest.mark.parametrize("how", ["dtype", "stride", "shape", "dimensions"])
def test_masked_linear_of_few_rows_refuses_bad_tensors(few_rows, how):
    assert_bad_tensors_are_refused(few_rows, "masked_linear", how)


def test_masked_linear_of_few_rows_refuses_other_bad_arguments(few_rows):
    x, *rest = arguments.valid("masked_linear")
    with pytest.raises(RuntimeError, match="65 rows, more than 64"):
        few_rows.masked_linear(x.new_zeros(65, 10), *rest)
    in_float32 = [t.float() for t in rest]
    with pytest.raises(RuntimeError, match="17 rows, more than 16"):
        few_rows.masked_linear(torch.zeros(17, 10), *in_float32)
    with pytest.raises(RuntimeError, match="threshold must have one entry, not 2"):
        few_rows.masked_linear(x, *rest[:2], torch.zeros(2), None)


def test_masked_linear_of_few_rows_says_what_it_does_not_serve():
    x, weight, logits, threshold, bias = arguments.valid("masked_linear")
    refused = lambda *args: arguments.refusal("masked_linear", *args)  # noqa: E731
    assert refused(x, weight, logits, threshold, bias) == "" == refused(x[0], weight, logits, threshold, None)
    assert refused(torch.zeros(0, 5, 10).half(), weight, logits, threshold.half(), None) == ""
    assert "68 rows of x are more than 64" in refused(x.new_zeros(4, 17, 10), weight, logits, threshold, bias)
    in_float32 = [t.float() for t in (weight, logits, threshold, bias)]
    assert "20 rows of x are more than 16" in refused(torch.zeros(4, 5, 10), *in_float32)
    for args in (
        (x.float(), weight, logits, threshold, bias),
        (x, weight, logits.float(), threshold, bias),
        (x, weight, logits, threshold.double(), bias),
        (x, weight, logits, threshold, bias.float()),
    ):
        assert "dtype" in refused(*args)
    assert "device" in refused(x, weight, logits, threshold.to("meta"), bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "autocast" in refused(x, weight, logits, threshold, bias)


@pytest.mark.native
def test_masked_linear_of_few_rows_takes_any_strides_and_leading_dimensions():
    """Shapes only: the ops themselves have no kernel for these tensors."""
    x, weight, logits, threshold, bias = (t.to("meta") for t in arguments.valid("masked_linear"))
    turned = weight.t().contiguous().t()
    assert arguments.call("masked_linear", x.view(3, 1, 10), turned, logits, threshold, bias).shape == (3, 1, 20)
    assert arguments.call("masked_linear", x[0], weight, logits, threshold, None).shape == (20,)


@pytest.mark.skipif(bool(registry.problem("cuda")), reason=registry.problem("cuda") or "there is one")
@each_few_rows_dtype
@pytest.mark.parametrize("rows", [1, 5, 16, 64])
def test_masked_linear_of_few_rows_on_a_gpu(rows, dtype):
    if rows > arguments.most_rows("masked_linear", dtype):
        pytest.skip("few rows are fewer in float32")
    x, weight, logits = (torch.randn(*s).to("cuda", dtype) for s in ((rows, 1000), (1024, 1000), (1024, 1000)))
    args = (x, weight, logits, torch.zeros((), device="cuda", dtype=dtype))
    ours, theirs = ops.masked_linear(*args, backend="cuda"), reference.masked_linear(*args)
    assert_close(ours, reference.masked_linear(*double(args)), "cuda", peer=theirs, rounding=1)


# Bad input

does_not_fit = each_change(
    ({"threshold": torch.ones(5)}, "threshold must have one entry, not 5"),
    ({"logits": torch.ones(1, 5)}, "logits must have shape (4, 5), not (1, 5)"),
    ({"logits": torch.ones(5, 4)}, "logits must have shape (4, 5), not (5, 4)"),
    ({"x": torch.ones(3, 4)}, "x must be (..., 5) for a weight of (4, 5), not (3, 4)"),
    ({"x": torch.ones(())}, "x must be (..., 5) for a weight of (4, 5), not ()"),
    ({"bias": torch.ones(5)}, "bias must have shape (4,), not (5,)"),
    ({"weight": torch.ones(5)}, "weight must be (out, in), not (5,)"),
)


@whoever_is_asked
@does_not_fit
def test_masked_linear_refuses_what_does_not_fit(asked, change, message):
    assert_refused("masked_linear", asked, change, message)


@does_not_fit
def test_masked_linear_by_triton_called_directly_refuses_in_the_same_words(triton, change, message):
    assert_kernel_refuses(triton, "masked_linear", change, message)


@each_change(
    ({"x": torch.ones(3, 5).double()}, "float64"),
    ({"weight": torch.ones(4, 5).int()}, "int32"),
    ({"logits": torch.ones(4, 5, device="meta")}, "one device"),
)
def test_masked_linear_by_triton_called_directly_refuses_other_dtypes(triton, change, message):
    with pytest.raises(InputError, match=message):
        triton.masked_linear(**changed("masked_linear", change))
