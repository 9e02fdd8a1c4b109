"""masked_linear and chunk_masked_linear of csrc/cuda for up to 16 rows, run by a CPU, against the float64 reference.

Most tests use whole numbers, and logits whose mask is exactly 0 or 1: every sum is exact in every dtype, so that one
entry too many, too few or in the wrong place shows.
"""

import pytest
import torch
from torch.library import opcheck

from hypermask_fast.ops import reference
from hypermask_fast.ops.native import few_rows as small_batch

NAN, INF = float("nan"), float("inf")
HALVES = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *HALVES)
NAMES = tuple(small_batch.FAKES)
TOLERANCES = {torch.float32: 32 * 2**-23, torch.float16: 2**-10, torch.bfloat16: 2**-7}  # of the largest result


@pytest.fixture(scope="module")
def small(emulated):
    """The emulated ops with the shape functions and gradients of the real ones."""
    for name in NAMES:
        torch.library.register_fake(f"hypermask_emulated::{name}", small_batch.FAKES[name])
        backward, setup = small_batch.GRADIENTS[name]
        torch.library.register_autograd(f"hypermask_emulated::{name}", backward, setup_context=setup)
    return emulated


def whole(*shape, low=-1, high=1, dtype=torch.float32):
    return torch.randint(low, high + 1, shape).to(dtype)


def double(values):
    return [v.double() if isinstance(v, torch.Tensor) else v for v in values]


def misaligned(tensor):
    """The same values, contiguous, at an address that is a multiple of the entry's size only."""
    memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    return memory[1:].view(tensor.shape).copy_(tensor)


def check_close(actual, expected):
    assert torch.equal(actual.isnan(), expected.isnan())
    error = (actual.double() - expected).nan_to_num().abs().max()
    assert error <= TOLERANCES[actual.dtype] * expected.nan_to_num().abs().max()


# Rows 1 to 16; outputs and inputs at, below and beyond a tile's borders, aligned and not; the last ones are split.
LINEAR = [
    (1, 1, 1), (2, 15, 8), (3, 17, 40), (4, 32, 31), (5, 33, 32), (6, 16, 33), (7, 8, 64), (8, 31, 65), (9, 48, 520),
    (10, 49, 96), (11, 64, 7), (12, 65, 24), (13, 3, 3072), (14, 40, 1537), (15, 2, 1600), (16, 96, 1024),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, outputs, inputs", LINEAR)
def test_masked_linear_takes_every_entry_once(small, dtype, rows, outputs, inputs):
    x, weight = whole(rows, inputs, dtype=dtype), whole(outputs, inputs, dtype=dtype)
    logits, bias = 20 * whole(outputs, inputs, dtype=dtype), whole(outputs, dtype=dtype)
    args = (x, weight, logits, torch.tensor(0.5, dtype=dtype), bias)
    expected = reference.masked_linear(*double(args)).round()
    assert torch.equal(small.masked_linear(*args).double(), expected)
    args = (misaligned(x), misaligned(weight), misaligned(logits), torch.tensor([0.5]), None)
    expected = reference.masked_linear(*double(args)).round()
    assert torch.equal(small.masked_linear(*args).double(), expected)


def special_logits(*shape):
    logits = torch.randn(*shape)
    special = torch.tensor([0.0, -0.0, 1e-30, 0.06, -0.07, 0.3, -0.3, 0.62, 0.63, 9.0, -30.0, INF, -INF])
    logits.view(-1)[: len(special)] = special
    return logits


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threshold", [0.0, 0.3, NAN])
def test_masked_linear_is_accurate(small, instruction_errors, dtype, threshold):
    threshold = torch.tensor(threshold, dtype=dtype)
    args = (torch.randn(16, 200), torch.randn(40, 200), special_logits(40, 200), threshold, torch.randn(40))
    args = [a.to(dtype) for a in args]
    check_close(small.masked_linear(*args), reference.masked_linear(*double(args)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_a_number_shows_where_it_belongs(small, dtype):
    x, weight, logits = (t.to(dtype) for t in (torch.randn(3, 50), torch.randn(20, 50), torch.randn(20, 50)))
    logits[2, 7], logits[19, 49] = NAN, -NAN
    weight[5, 3], logits[5, 3] = INF, 0.0  # dropped, and so Inf * 0
    args = (x, weight, logits, torch.tensor(0.3), None)
    y = small.masked_linear(*args)
    assert y.isnan().any(0).nonzero().flatten().tolist() == [2, 5, 19]
    check_close(y, reference.masked_linear(*double(args)))


# rows, outputs, inputs, chunk size, width, start: chunks of whole rows, of parts of rows, of less than a step; a start
# within a chunk; widths that are copied entry by entry, that fill their products, that leave no room for the bias.
CHUNKED = [
    (1, 1, 1, 1, 1, 0), (2, 49, 64, 128, 12, 0), (3, 60, 100, 250, 13, 77), (16, 100, 40, 100, 20, 3),
    (5, 70, 33, 7, 4, 5), (16, 30, 64, 1000, 16, 9), (9, 9, 1600, 4000, 5, 11), (8, 97, 48, 96, 31, 95),
    (12, 5, 700, 40, 32, 1), (7, 150, 16, 8, 6, 4), (16, 20, 31, 100_000, 8, 99_990),
]  # fmt: skip


def chunked(rows, outputs, inputs, chunk_size, width, start, dtype, make=whole):
    """Valid arguments; of whole numbers the logits are multiples of 16, with a threshold of 8."""
    chunks = -(-(start + outputs * inputs) // chunk_size)
    hidden, layer, shift = make(chunks, width), 16 * make(chunk_size, width), 16 * make(chunk_size)
    tensors = [make(rows, inputs), make(outputs, inputs), hidden, layer, shift]
    return [*(t.to(dtype) for t in tensors), start, torch.tensor(8.0), make(outputs).to(dtype)]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", CHUNKED, ids=str)
def test_chunk_masked_linear_takes_every_entry_once(small, dtype, shape):
    args = chunked(*shape, dtype)
    assert torch.equal(small.chunk_masked_linear(*args).double(), reference.chunk_masked_linear(*double(args)).round())
    args = [misaligned(a) if isinstance(a, torch.Tensor) and a.dim() else a for a in args[:-1]] + [None]
    assert torch.equal(small.chunk_masked_linear(*args).double(), reference.chunk_masked_linear(*double(args)).round())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_chunk_masked_linear_is_accurate(small, instruction_errors, dtype):
    args = chunked(16, 90, 100, 250, 20, 77, dtype, make=torch.randn)
    args[3], args[4], args[6] = args[3] / 64, args[4] / 64, torch.tensor(0.0)  # no logit jumps over the threshold
    check_close(small.chunk_masked_linear(*args), reference.chunk_masked_linear(*double(args)))


@pytest.mark.parametrize("k, position", [(70, 247), (80, 7)])  # row 1 crosses from one chunk to the next at k = 73
def test_a_step_across_a_chunks_end_keeps_infinity(small, k, position):
    args = chunked(3, 60, 100, 250, 13, 77, torch.float16)
    args[1][1, k], args[0][:, k], args[4][position] = INF, 1.0, 2048.0
    y = small.chunk_masked_linear(*args)
    assert (y[:, 1] == INF).all() and y[:, 2:].isfinite().all()


def test_the_widest_hypernetwork(small):
    args = chunked(3, 60, 64, 128, small_batch.MAX_WIDTH, 0, torch.float16)
    assert torch.equal(small.chunk_masked_linear(*args).double(), reference.chunk_masked_linear(*double(args)).round())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("rows, outputs, inputs", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0)])
def test_empty(small, dtype, rows, outputs, inputs):
    x, weight, bias = torch.ones(rows, inputs).to(dtype), torch.ones(outputs, inputs).to(dtype), torch.randn(outputs)
    bias, threshold = bias.to(dtype), torch.tensor(0.0)
    expected = bias.expand(rows, outputs)
    if outputs * inputs == 0 or rows == 0:
        assert torch.equal(small.masked_linear(x, weight, weight, threshold, bias), expected)
        for chunks, chunk_size in ((5, 7), (12, 1), *([] if outputs * inputs else [(0, 7), (0, 0)])):
            layer = [torch.ones(*s).to(dtype) for s in ((chunks, 3), (chunk_size, 3), (chunk_size,))]
            start = chunks * chunk_size - outputs * inputs
            y = small.chunk_masked_linear(x, weight, *layer, start, threshold, bias)
            assert torch.equal(y, expected)


# Arguments that do not fit


def valid(name, dtype=torch.float16):
    if name == "masked_linear":
        x, weight, logits, bias = (torch.randn(*s).to(dtype) for s in ((3, 10), (20, 10), (20, 10), (20,)))
        return [x, weight, logits, torch.tensor(0.5), bias]
    return chunked(3, 20, 10, 50, 6, 7, dtype, make=torch.randn)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", ["dtype", "stride", "shape", "dimensions"])
def test_bad_tensors_are_refused(small, name, how):
    changes = {
        "dtype": lambda t: t.double(),
        "stride": lambda t: t.repeat_interleave(2, -1)[..., ::2],
        "shape": lambda t: torch.cat([t, t], -1),
        "dimensions": lambda t: t[None],
    }
    for i, value in enumerate(valid(name)):
        if not isinstance(value, torch.Tensor) or (value.dim() == 0 and how != "dtype"):
            continue
        bad = valid(name)
        bad[i] = changes[how](value)
        with pytest.raises(RuntimeError, match=f"^{name}: ") as caught:
            getattr(small, name)(*bad)
        assert "\n" not in str(caught.value).split("(origin")[0]


def test_other_bad_arguments_are_refused(small):
    x, *rest = valid("masked_linear")
    with pytest.raises(RuntimeError, match="17 rows, more than 16"):
        small.masked_linear(x.new_zeros(17, 10), *rest)
    with pytest.raises(RuntimeError, match="threshold must have one entry, not 2"):
        small.masked_linear(x, *rest[:2], torch.zeros(2), None)
    args = valid("chunk_masked_linear")
    for start in (-1, 51, 2**62):
        args[5] = start
        with pytest.raises(RuntimeError, match="lie outside the 250"):
            small.chunk_masked_linear(*args)
    with pytest.raises(RuntimeError, match="float16 or bfloat16"):
        small.chunk_masked_linear(*valid("chunk_masked_linear", torch.float32))
    with pytest.raises(RuntimeError, match="513 wide"):
        small.chunk_masked_linear(*chunked(3, 20, 10, 50, 513, 7, torch.float16))


# What PyTorch needs to know


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients(small, name, dtype):
    if name == "chunk_masked_linear" and dtype == torch.float32:
        return  # which it does not take
    args = valid(name, dtype)
    if name == "chunk_masked_linear":
        args[3], args[4], args[6] = args[3] / 64, args[4] / 64, torch.tensor(0.0)
    exact = double(args)
    leaves = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor) and a.dim()]
    for values in (args, exact):
        for i in leaves:
            values[i] = values[i].detach().requires_grad_()
    y = getattr(torch.ops.hypermask_emulated, name)(*args)
    expected = getattr(reference, name.removeprefix("small_"))(*exact)
    outer = torch.randn_like(y)
    grads = torch.autograd.grad(y, [args[i] for i in leaves], outer)
    for actual, wanted in zip(
        grads, torch.autograd.grad(expected, [exact[i] for i in leaves], outer.double()), strict=True
    ):
        assert actual.dtype == dtype and actual.shape == wanted.shape
        assert (actual.double() - wanted).abs().max() <= 4 * TOLERANCES[dtype] * wanted.abs().max()


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(small, name):
    torch.use_deterministic_algorithms(False)  # opcheck runs the ops through inductor's own paths
    args = [a.requires_grad_() if isinstance(a, torch.Tensor) and a.dim() else a for a in valid(name)]
    opcheck(getattr(torch.ops.hypermask_emulated, name).default, args)


# What the backend says it serves


def refusal(op, args):
    return small_batch.CALLS[op][1](*args)


def test_masked_linear_condition():
    x, weight, logits, threshold, bias = valid("masked_linear")
    refused = lambda *args: refusal("masked_linear", args)  # noqa: E731
    assert refused(x, weight, logits, threshold, bias) == "" == refused(x[0], weight, logits, threshold, None)
    assert refused(torch.zeros(0, 5, 10).half(), weight, logits, threshold.half(), None) == ""
    assert "20 rows of x" in refused(x.new_zeros(4, 5, 10), weight, logits, threshold, bias)
    for args in (
        (x.float(), weight, logits, threshold, bias),
        (x, weight, logits.float(), threshold, bias),
        (x, weight, logits, threshold.double(), bias),
        (x, weight, logits, threshold, bias.float()),
    ):
        assert "dtype" in refused(*args)
    assert "shape" in refused(x, weight, logits[:5], threshold, bias)
    assert "do not fit" in refused(x, weight, logits, torch.zeros(2), bias)
    assert "do not fit" in refused(x[:, :4], weight, logits, threshold, bias)
    assert "device" in refused(x, weight.to("meta"), logits, threshold, bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "autocast" in refused(x, weight, logits, threshold, bias)


def test_chunk_masked_linear_condition():
    refused = lambda *shape: refusal("chunk_masked_linear", chunked(*shape, torch.float16))  # noqa: E731
    assert refused(16, 64, 32, 64, 8, 5) == "" == refused(1, 2000, 40, 4000, 100, 0)
    assert "17 rows" in refused(17, 64, 32, 64, 8, 5)
    assert "513 wide" in refused(16, 64, 32, 64, 513, 5)
    assert "shorter" in refused(16, 64, 32, 31, 8, 5)
    assert "fewer than 16 rows" in refused(16, 64, 32, 6400, 8, 5)
    args = chunked(16, 64, 32, 64, 8, 5, torch.float16)
    args[5] = 65
    assert "do not generate" in refusal("chunk_masked_linear", args)
    assert torch.float32 not in small_batch.CALLS["chunk_masked_linear"][2]


@pytest.mark.native
def test_calls_take_any_strides_and_leading_dimensions():
    """Shapes only: the ops themselves have no kernel for these tensors."""
    meta = [t.to("meta") for t in valid("masked_linear")]
    function = small_batch.CALLS["masked_linear"][0]
    assert function(meta[0].view(3, 1, 10), meta[1].t().contiguous().t(), *meta[2:]).shape == (3, 1, 20)
    assert function(meta[0][0], *meta[1:4]).shape == (20,)
    meta = [t.to("meta") if isinstance(t, torch.Tensor) else t for t in valid("chunk_masked_linear")]
    assert small_batch.CALLS["chunk_masked_linear"][0](meta[0][None], *meta[1:]).shape == (1, 3, 20)
