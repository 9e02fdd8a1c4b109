"""Which path a layer takes: by a measured table, by the estimate without one, always mask first on the CPU."""

import dataclasses
import inspect
import json
import warnings

import pytest
import torch
from support import internals

import hypermask_fast as hmf
from hypermask_fast import InputError, ops
from hypermask_fast.ops import estimates, paths, reference, registry

GPU = "NVIDIA H200"


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """CPU tensors stand for a GPU's; the folder of its tables."""
    monkeypatch.setenv("HYPERMASK_TABLES", str(tmp_path))
    with internals.stand_in_gpu(monkeypatch, GPU):
        yield tmp_path


def linear(rows, outputs=4096, inputs=4096, dtype=torch.bfloat16, gradient=False):
    def tensor(*shape):
        return torch.empty(1, dtype=dtype).expand(shape).requires_grad_(gradient)

    return tensor(rows, inputs), tensor(outputs, inputs), tensor(outputs, inputs), torch.zeros(1, dtype=dtype)


def conv(batch, inputs, outputs, side, window, stride=1):
    x, weight = torch.empty(1).expand(batch, inputs, side, side), torch.empty(1).expand(outputs, inputs, window, window)
    return x, weight, weight, torch.zeros(1), None, stride, window // 2


def choose(op, args):
    """The choice for a call with these arguments, and the defaults of those that are not given."""
    entry = ops.OPS[op]
    defaults = [p.default for p in inspect.signature(entry.definition).parameters.values()]
    return entry.layer.choose(op, (*args, *defaults[len(args) :]))


def path(op, args):
    return choose(op, args).path


def entry(**changes):
    measured = {
        "op": "masked_linear", "rows": 16, "outputs": 4096, "reduced": 4096, "dtype": "bfloat16", "gradient": False,
        "fused_us": 90.0, "mask_first_us": 50.0,
    }  # fmt: skip
    return measured | changes


def write(folder, *entries, name="h200.json", gpu=GPU):
    (folder / name).write_text(json.dumps({"gpu": gpu, "entries": entries}))


def test_the_estimate_without_a_table(gpu):
    """Few rows: bytes count, and fused moves fewer. Many rows: cuBLAS. Training at batch 128: one mask for all."""
    for rows in (1, 16, 64):
        assert path("masked_linear", linear(rows)) == "fused"
    assert path("masked_linear", linear(8192)) == "mask first"
    assert path("masked_linear", linear(128, gradient=True)) == "mask first"
    with torch.no_grad():
        assert path("masked_linear", linear(16, gradient=True)) == "fused"
    assert path("masked_linear", linear(16, 100, 100)) == "mask first"  # saves less than a launch
    assert path("masked_conv2d", conv(32, 32, 32, 32, 3)) == "mask first"
    assert path("masked_conv2d", conv(1, 2048, 2048, 7, 3)) == "fused"
    choice = choose("masked_linear", linear(16))
    assert choice.why.startswith("fused: 16 rows of 4096 -> 4096 in bfloat16: fused 18.4 us (67.4 MB, ")
    assert (
        "mask first 31.3 us (134 MB, 35.7 MB through L2), estimated for H200: no table of NVIDIA H200; " in choice.why
    )
    assert "; cuda before triton, unmeasured: with so few rows W's bytes decide" in choice.why
    assert choice.order == ("cuda", "triton")
    assert choose("masked_linear", linear(32)).order == ("cuda", "triton")
    by_triton = choose("masked_linear", linear(64))  # whose tiles have twice the outputs, and so half the reads of x
    assert by_triton.order == ("triton", "cuda") and by_triton.path == "fused"
    assert "reads x more often: forward 23.5 us (68.2 MB, 134 MB through L2)" in by_triton.why
    assert "before" not in choose("masked_linear", linear(65)).why
    assert "before" not in choose("masked_linear", linear(17, dtype=torch.float32)).why
    x, weight = linear(5)[:2]
    hidden, layer, shift = torch.empty(10, 4), torch.empty(100, 4), torch.empty(100)
    choice = choose("chunk_masked_linear", (x, weight, hidden, layer, shift, 0, torch.zeros(1)))
    assert choice.path == "fused" and "cuda before triton" in choice.why
    assert ops.entropy_select.layer is None


def test_the_estimate_by_hand():
    """One row of a 1000 x 1000 float32 layer on a GPU of round rates, worked out term by term."""
    slow = estimates.Gpu("slow", bytes=1e9, float32=1e12, tf32=1e12, half=1e12, tanh=1e12)
    call = estimates.Call("masked_linear", 1, 1000, 1000, "float32", 4, gradient=False)
    io = 4 * 2000
    fused, first = estimates.estimate(call, slow)
    assert fused == pytest.approx((8e6 + io) / 0.85e9)
    assert first == pytest.approx(12e6 / 1e9 + (4e6 + io) / 1e9)
    fused, first = estimates.estimate(estimates.Call("masked_linear", 1, 1000, 1000, "float32", 4, True), slow)
    assert fused == pytest.approx((2 * (8e6 + io) + 16e6 + io) / 0.85e9 + 8e-3)
    assert first == pytest.approx(12e-3 + 3 * (4e6 + io) / 1e9 + 20e-3)
    no_tanh = estimates.Gpu("no tanh", bytes=1e20, float32=1e20, tf32=1e20, half=1e20, tanh=1e6, l2=1e20)
    many = estimates.Call("masked_linear", 1024, 10, 100, "bfloat16", 2, gradient=False)
    assert estimates.estimate(many, no_tanh) == pytest.approx((16 * 1000 / 1e6, 1000 / 1e6))  # tiles of 64 rows


def test_the_estimate_counts_what_tiles_read_through_l2():
    """256 rows of 4096 x 4096: as 64 x 64 tiles 403 MB and 70 us; as (128, 256) in 4 splits less than half."""
    call = estimates.Call("masked_linear", 256, 4096, 4096, "bfloat16", 2, gradient=False)
    found = estimates.count(call, estimates.H200)
    weights, x, y, partial = 2 * 2 * 4096**2, 32 * 2 * 256 * 4096, 2 * 256 * 4096, 8 * 4 * 256 * 4096
    assert found.fused.l2 == weights + x + y + partial and 165e6 < found.fused.l2 < 175e6
    assert found.fused.seconds == pytest.approx(found.fused.l2 / 5.7e12) and 25e-6 < found.fused.seconds < 35e-6
    few = dataclasses.replace(call, rows=64)
    assert estimates.count(few, estimates.H200).fused.seconds < 20e-6
    slow = dataclasses.replace(estimates.H200, l2=1e12)
    assert estimates.count(call, slow).fused.seconds == pytest.approx(found.fused.l2 / 1e12)


@pytest.mark.parametrize(
    ("op", "more"),
    [
        ("masked_conv2d", {"taps": 9, "convolution": True}),
        ("chunk_masked_linear", {"generated": True, "chunk_size": 8000, "width": 100}),
        ("chunk_masked_conv2d", {"taps": 9, "convolution": True, "generated": True, "chunk_size": 8000, "width": 100}),
        ("task_batched_linear", {"tasks": 10}),
    ],
)
@pytest.mark.parametrize("gradient", [False, True])
def test_every_layer_counts_l2(op, more, gradient):
    """More of it with more rows on either path, and where nothing else takes time it is what the time is."""
    call = estimates.Call(op, 64, 1152, 1152, "bfloat16", 2, gradient=gradient, **more)
    l2_only = estimates.Gpu("l2", bytes=1e30, float32=1e30, tf32=1e30, half=1e30, tanh=1e30, l2=1e9)
    few, many = (estimates.count(dataclasses.replace(call, rows=rows), l2_only) for rows in (64, 4096))
    for path in ("fused", "first", "kept"):
        before, after = getattr(few, path), getattr(many, path)
        assert 1152**2 * 2 <= before.l2 < after.l2
        assert before.seconds == pytest.approx(before.l2 / 1e9)


def test_without_a_table_many_rows_mask_first(gpu):
    """Whatever was counted: the library's product is known, a fused kernel that nobody has timed is not."""
    choice = choose("masked_linear", linear(128))
    assert choice.path == "mask first" and "unmeasured, so mask first above 64 rows" in choice.why
    assert "fused 20.8 us" in choice.why and "mask first 32.2 us" in choice.why
    write(gpu, entry(rows=128, fused_us=20.0))
    paths.tables.cache_clear(), paths._decide.cache_clear()
    assert path("masked_linear", linear(128)) == "fused"


def test_many_tasks_are_counted_as_one_launch_against_two_each(gpu):
    """A batch that meets every task; one that is dealt out by task ids stays fused: nothing waits for the device."""
    weight, logits = torch.empty(1).expand(1000, 1024), torch.empty(1).expand(10, 1000, 1024)
    limits, ids = torch.zeros(10), torch.zeros(256, dtype=torch.int64)

    def of(rows, ids=None):
        return choose("task_batched_linear", (torch.empty(1).expand(rows, 1024), weight, logits, limits, ids))

    assert of(64).path == "fused" and "10 tasks, each 64 rows of 1024 -> 1000 in float32" in of(64).why
    assert of(65536).path == "mask first" and "MB through L2" in of(65536).why
    grouped = of(256, ids)
    assert grouped.path == "fused" and "10 tasks, each 32 rows" in grouped.why and "wait for the device" in grouped.why


def test_ops_that_generate_logits_decide_by_the_count(gpu):
    """In one kernel with few rows; W * m first where each residue's pass over the layer takes longer. Either is said,
    and what keeping W * m from call to call would take."""

    def of(rows):
        x, weight = linear(rows)[:2]
        hidden, layer, shift = (torch.empty(1).expand(s) for s in ((2098, 100), (8000, 100), (8000,)))
        return choose("chunk_masked_linear", (x, weight, hidden, layer, shift, 0, torch.zeros(1)))

    assert of(16).path == of(64).path == of(4096).path == "fused"
    assert "in one kernel 26.7 us" in of(16).why and of(16).order == ("cuda", "triton")
    assert "the op makes W * m once, then the library multiplies: 26.5 us" in of(64).why
    assert of(64).order == ("triton", "cuda")
    assert "W * m kept from call to call 7.86 us (33.8 MB, " in of(16).why
    call = estimates.Call(
        "chunk_masked_linear", 16, 4096, 4096, "bfloat16", 2, False, generated=True, chunk_size=8000, width=100
    )
    assert estimates.in_one_kernel(call, estimates.H200)
    assert not estimates.in_one_kernel(dataclasses.replace(call, rows=64), estimates.H200)


@pytest.mark.parametrize(("dtype", "size", "lines"), [("bfloat16", 2, 5), ("float32", 4, 9)])
def test_the_estimate_counts_the_lines_that_a_window_is_read_in(dtype, size, lines):
    """32 neighbours along the channels, 9 entries apart, take 5 lines of 128 bytes, or 9; one tap hides behind tanh."""
    call = estimates.Call("masked_conv2d", 7, 1024, 9216, dtype, size, gradient=False, taps=9)
    fused, _ = estimates.estimate(call, estimates.H200)
    assert fused == pytest.approx(1024 * 9216 * lines / 3.7e12)
    assert 0.6 < (2 * 1024 * 9216 * size / estimates.H200.bytes) / fused < 0.85
    plain, _ = estimates.estimate(dataclasses.replace(call, taps=1), estimates.H200)
    assert plain < fused and plain == pytest.approx((2 * size * 1024 * 9216 + 7 * 10240 * size) / 0.85 / 4.3e12)


@pytest.fixture
def settings():
    """PyTorch's settings of float32 products are at their defaults, and back there afterwards."""
    torch.backends.cudnn.allow_tf32 = True
    yield
    torch.backends.fp32_precision = "none"
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.fp32_precision = "none"
    torch.backends.cudnn.allow_tf32 = True
    assert not torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32  # neither raises


@pytest.mark.parametrize(
    ("change", "products", "convolutions"),
    [
        (lambda: None, False, True),
        (lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True), True, True),
        (lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"), True, True),
        (lambda: setattr(torch.backends, "fp32_precision", "tf32"), True, True),
        (lambda: torch.set_float32_matmul_precision("high"), True, True),
        (lambda: setattr(torch.backends.cudnn, "allow_tf32", False), False, False),
        (lambda: setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee"), False, False),
    ],
)
def test_whether_float32_is_tf32(gpu, settings, change, products, convolutions):
    """By every switch that PyTorch has, older and newer, and for a choice that was made before."""
    calls = [("masked_linear", linear(8192, dtype=torch.float32)), ("masked_conv2d", conv(32, 256, 256, 32, 3))]
    for op, args in calls:
        choose(op, args)
    change()
    assert (paths.allows_tf32(convolution=False), paths.allows_tf32(convolution=True)) == (products, convolutions)
    for (op, args), tf32 in zip(calls, (products, convolutions), strict=True):
        rows = 8192 if op == "masked_linear" else 32 * 32 * 32
        outputs, reduced, taps = args[1].shape[0], args[1].shape[1:].numel(), args[1].shape[2:].numel()
        call = estimates.Call(op, rows, outputs, reduced, "float32", 4, False, taps, tf32)
        fused, first, _ = estimates.count(call, estimates.H200)
        assert f"fused {fused}, mask first {first}" in choose(op, args).why


def test_a_table_decides(gpu):
    write(gpu, entry(), entry(rows=1024, fused_us=40.0), entry(gradient=True, fused_us=1.0))
    choice = choose("masked_linear", linear(16))
    assert choice == (
        "mask first",
        "mask first: 16 rows of 4096 -> 4096 in bfloat16: fused 90 us, mask first 50 us, by the table of NVIDIA H200, "
        "measured at 16 x 4096 -> 4096",
        ("cuda", "triton"),
    )
    assert path("masked_linear", linear(20, 4096, 4000)) == "mask first"  # near enough
    assert path("masked_linear", linear(700)) == "fused"
    assert path("masked_linear", linear(16, gradient=True)) == "fused"
    assert "no table" not in choose("masked_linear", linear(16, dtype=torch.float32)).why
    assert "estimated" in choose("masked_linear", linear(16, dtype=torch.float32)).why
    assert "estimated" in choose("masked_linear", linear(16, 400, 784)).why  # far from what was measured


def test_a_table_names_the_fused_backend(gpu, monkeypatch):
    """The layer and `explain` follow it; where it can't serve the call, the other one does."""
    write(gpu, entry(fused_us=9.0, backend="triton"), entry(rows=4, fused_us=9.0, backend="cuda"), entry(rows=256))
    choice = choose("masked_linear", linear(16))
    assert choice.order == ("triton", "cuda") and "fused 9 us by triton, mask first 50 us, by the table" in choice.why
    assert choose("masked_linear", linear(4)).order == ("cuda", "triton")
    assert " by cuda" not in choose("masked_linear", linear(256)).why
    internals.automatic(monkeypatch, "meta", "cuda", "triton")
    internals.product_dtype(monkeypatch, "bfloat16")
    refused = {"triton": "", "cuda": ""}
    monkeypatch.setattr(registry.Op, "refusal", lambda op, name, *values: refused.get(name, ""))
    functions = {name: lambda *values, name=name: name for name in refused}
    for name, function in functions.items():
        monkeypatch.setitem(ops.masked_linear.offers, name, registry.Offer(function))
    args = [t.to("meta") for t in linear(16)]
    assert ops.masked_linear.fused(*args, None) is functions["triton"]
    assert hmf.explain("masked_linear", *args).startswith("masked_linear: triton (chosen")
    refused["triton"] = "broken"
    assert ops.masked_linear.fused(*args, None) is functions["cuda"]
    assert hmf.explain("masked_linear", *args).splitlines()[0] == "masked_linear: cuda (chosen automatically)"


def test_a_table_keeps_windows_of_one_tap_and_of_several_apart(gpu):
    one = entry(op="masked_conv2d", rows=32768, outputs=64, reduced=576, dtype="float32")
    write(gpu, one, one | {"rows": 16384, "taps": 9, "fused_us": 40.0})
    assert path("masked_conv2d", conv(32, 576, 64, 32, 1)) == "mask first"
    assert path("masked_conv2d", conv(32, 64, 64, 32, 3)) == "fused"  # though the other has just its sizes


def test_another_gpus_table_says_nothing(gpu):
    write(gpu, entry(), gpu="NVIDIA A100-SXM4-80GB")
    assert path("masked_linear", linear(16)) == "fused"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        ('{"gpu": "NVIDIA H200"}', "KeyError: 'entries'"),
        (json.dumps({"gpu": GPU, "entries": [entry(fused_us=0)]}), "positive microseconds"),
        (json.dumps({"gpu": GPU, "entries": [entry(rows="16")]}), "positive integers"),
        (json.dumps({"gpu": GPU, "entries": [entry() | {"colour": 1}]}), "unexpected keyword argument"),
        (json.dumps({"gpu": GPU, "entries": [entry(backend="cpu")]}), "backend must be one of cuda, triton"),
        (b"\xff\xfe", "UnicodeDecodeError"),
    ],
)
def test_a_broken_table_is_named_and_ignored(gpu, text, problem):
    (gpu / "broken.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.warns(UserWarning, match=f"broken.json is no table of measured paths .*{problem}") as caught:
        assert path("masked_linear", linear(16)) == "fused"
    assert len(caught) == 1 and "\n" not in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        assert path("masked_linear", linear(17)) == "fused"


def test_shapes_without_a_kernel_mask_first(gpu):
    x, weight, logits, threshold = linear(4)
    assert path("masked_conv2d", (x, weight, logits, threshold)) == "mask first"
    assert path("masked_linear", (x, weight[None], logits, threshold)) == "mask first"
    assert path("masked_linear", linear(4, 0, 4096)) == "mask first"


def test_explain_without_kernels(gpu, monkeypatch):
    """The path, its reason, and why no fused kernel takes the call; the layer then masks first."""
    internals.automatic(monkeypatch, "meta", "cuda", "triton")
    internals.missing(monkeypatch, cuda="no CUDA device", triton="triton is not installed")
    internals.product_dtype(monkeypatch, "bfloat16")
    args = [t.to("meta") for t in linear(16)]
    lines = hmf.explain("masked_linear", *args).splitlines()
    assert lines[0] == "masked_linear: plain (chosen automatically)"
    assert lines[1].startswith("  fused: 16 rows of 4096 -> 4096 in bfloat16")
    assert lines[2].startswith("  not cuda: ") and lines[3] == "  not triton: triton is not installed"
    assert ops.masked_linear.fused(*args, None) is None
    assert (
        hmf.explain("masked_linear", *[t.to("meta") for t in linear(8192)]).splitlines()[1].startswith("  mask first")
    )
    with pytest.raises(InputError, match="explain needs the op's arguments"):
        registry.explain("masked_linear", torch.ones(2))


def test_on_the_cpu_it_is_always_mask_first():
    x, weight, logits = torch.randn(2, 5), torch.randn(3, 5), torch.randn(3, 5)
    args = (x, weight, logits, torch.tensor(0.3))
    assert ops.masked_linear.fused(*args, None) is None
    assert "\n  mask first: on cpu W * m is made once" in hmf.explain("masked_linear", *args)
    torch.testing.assert_close(ops.masked_linear(*args), reference.masked_linear(*args))
    wide = [t.double() for t in args]
    assert torch.equal(ops.masked_linear(*wide), reference.masked_linear(*wide))


def test_a_compiled_graph_serves_a_bucket_of_batch_sizes(gpu):
    """The choice is a constant of the graph, made again only where the batch passes a power of 2."""
    weight = torch.empty(4096, 4096)

    def chosen(x):
        return x.sum() + (choose("masked_linear", (x, weight, weight, weight[0, :1])).path == "fused")

    from torch._dynamo.utils import counters

    counters.clear()
    compiled = torch.compile(chosen, fullgraph=True, backend="eager", dynamic=True)
    for rows in (40, 50, 64):
        assert compiled(torch.zeros(rows, 4096)) == 1
    assert counters["stats"]["unique_graphs"] == 1
    assert compiled(torch.zeros(8192, 4096)) == 0
    assert counters["stats"]["unique_graphs"] == 2
