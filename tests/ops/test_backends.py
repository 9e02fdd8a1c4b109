"""Which backend runs an op, what a refusal says, and what an installation without the extension does."""

import dataclasses
import os
import re
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from support import internals

from hypermask_fast import InputError, env, ops
from hypermask_fast.ops import reference, registry


def run_python(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.native
def test_order_of_choice():
    a, threshold = torch.randn(5), torch.tensor(0.1)
    choose = lambda backend=None: ops.semi_binary_mask.choose(a, threshold, backend=backend).backend  # noqa: E731
    assert choose() == "cpu"
    with registry.use_backend("reference"):
        assert choose() == "reference"
        assert choose("cpu") == "cpu"
        with registry.use_backend("auto"):
            assert choose() == "cpu"
        seen = []
        thread = threading.Thread(target=lambda: seen.append(choose()))
        thread.start()
        thread.join()
        assert seen == ["cpu"]  # another thread has its own scope


@pytest.mark.native
def test_the_function_chosen_is_the_backends_own():
    a, threshold = torch.randn(5), torch.tensor(0.1)
    op = ops.semi_binary_mask
    assert op.choose(a, threshold).function is op.offers["cpu"].function is not reference.semi_binary_mask
    assert op.choose(a, threshold, backend="reference").function is op.definition is reference.semi_binary_mask


@pytest.mark.native
def test_a_named_backend_says_why_it_cannot():
    a, threshold = torch.randn(5, dtype=torch.float64), torch.tensor(0.1, dtype=torch.float64)
    with pytest.raises(InputError, match="computes in float32, not float64"):
        ops.semi_binary_mask(a, threshold, backend="cpu")
    with pytest.raises(InputError, match="cpu has no entropy_select"):
        ops.entropy_select(a[None, None], backend="cpu")
    with pytest.raises(InputError, match="can't run semi_binary_mask"):
        ops.semi_binary_mask(a, threshold, backend="cuda")
    with pytest.raises(InputError, match="must be one of"):
        ops.semi_binary_mask(a, threshold, backend="gpu")
    with pytest.raises(InputError, match="must be one of"), registry.use_backend("gpu"):
        pass


@pytest.mark.native
def test_auto_falls_back_for_what_the_kernels_do_not_serve():
    a = torch.randn(4, 5, dtype=torch.float64)
    threshold = torch.rand(5, dtype=torch.float64)  # one per column
    assert torch.equal(ops.semi_binary_mask(a, threshold), reference.semi_binary_mask(a, threshold))
    single = ops.semi_binary_mask(a.float(), threshold.float())
    assert torch.equal(single, reference.semi_binary_mask(a.float(), threshold.float()))
    hidden, weight, bias, targets = torch.randn(2, 3, 4), torch.randn(5, 4), torch.randn(5), torch.randn(2, 13)
    assert torch.equal(
        ops.output_drift(hidden, weight, bias, targets), reference.output_drift(hidden, weight, bias, targets)
    )


@pytest.mark.native
def test_what_is_stepped_is_not_copied():
    """Where weight or moments are not contiguous the reference steps them; what is only read may have any strides."""
    hidden, weight, targets = torch.randn(4, 3).t(), torch.randn(4, 50).t(), torch.randn(50, 2).t()
    state = [weight, *(torch.zeros(size) for size in (50, (50, 4), (50, 4), 50, 50))]
    one = torch.tensor(1.0)
    arguments = hidden, one.expand(50), targets, one, *state, one, one
    results = []
    for weight_now, chosen in ((weight.clone(memory_format=torch.contiguous_format), "cpu"), (weight, "reference")):
        moments = [m.clone() for m in state[1:]]
        now = *arguments[:4], weight_now, *moments, *arguments[-2:]
        assert registry.explain("hypernet_adam", *now).startswith(f"hypernet_adam: {chosen} ")
        results.append([*ops.hypernet_adam(*now), weight_now, *moments])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def warnings_of(dtype=torch.float32):
    """What two calls each of two ops warn of."""
    a, ranks = torch.randn(5, dtype=dtype), torch.tensor([2])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            ops.mask_thresholds(a, [0, 5], ranks)
            ops.weight_drift([a], a, [0, 5])
    assert all(w.filename == __file__ for w in caught)
    return [str(w.message) for w in caught]


@pytest.fixture
def problems(monkeypatch):
    """Sets why backends are not to be had; nobody has been warned yet."""
    internals.nobody_was_warned(monkeypatch)
    return lambda **why: internals.missing(monkeypatch, **why)


def test_the_reference_in_place_of_one_missing_backend_is_said_once_per_op(problems, monkeypatch):
    """As on a GPU with Triton but without the extension: most ops run fast, and these don't."""
    internals.automatic(monkeypatch, "cpu", "cpu", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # so that Triton does not serve the drift
    problems(cpu="nvcc failed", triton="")
    assert warnings_of(torch.float64) == []  # which neither serves
    said = "hypermask_fast runs the reference of {} on cpu (cpu: nvcc failed)"
    assert warnings_of() == [said.format("mask_thresholds"), said.format("weight_drift")]
    assert warnings_of() == []


def test_the_reference_in_place_of_all_backends_is_said_once(problems):
    problems(cpu="no compiler")
    assert warnings_of(torch.float64) == []
    assert warnings_of() == ["hypermask_fast runs its reference ops on cpu (cpu: no compiler)"]


def test_a_backend_that_is_there_and_does_not_serve_is_no_surprise(problems):
    problems(cpu="")
    assert warnings_of(torch.float64) == []


class OwnTensor(torch.Tensor):
    """A tensor of a class of its own."""


CALL = (torch.tensor([0.1, -0.4, 0.3, 2.0]), [0, 4], torch.tensor([2]))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ((CALL[0], [0, 4], torch.tensor([4])), "rank 4 is outside segment 0 of 4 entries"),
        ((CALL[0], [0, 5], CALL[2]), "offsets must ascend from 0 or more to at most 4 entries"),
        ((CALL[0], [0, 4.0], torch.tensor([2], dtype=torch.int32)), "ranks int64"),
        ((CALL[0][None, :3], *CALL[1:]), "at most 3 entries"),
        ((CALL[0], [0, 4], 2), "ranks must be a tensor, not int"),
        ((CALL[0], [0, 4], CALL[2].to("meta")), "all tensors must be on one device"),
        ((CALL[0].as_subclass(OwnTensor), [0, 5], CALL[2]), "at most 4 entries"),
    ],
)
def test_a_call_like_one_before_is_judged_as_the_first(bad, message):
    """Who serves a kind of call is remembered; what no longer fits is refused all the same."""
    for _ in range(2):
        assert torch.equal(ops.mask_thresholds(*CALL), torch.tensor([0.4]))
        with pytest.raises(InputError, match=message):
            ops.mask_thresholds(*bad)
        with pytest.raises(InputError, match="can't run mask_thresholds"):
            ops.mask_thresholds(*CALL, backend="plain")


@pytest.mark.native
def test_a_call_like_one_before_follows_what_is_around_it(monkeypatch):
    internals.nothing_was_chosen(monkeypatch)  # of the functions that are replaced here
    calls = []
    for name in ("cpu", "plain"):
        function = ops.masked_linear.offers[name].function
        counted = lambda *values, name=name, function=function: calls.append(name) or function(*values)  # noqa: E731
        offer = dataclasses.replace(ops.masked_linear.offers[name], function=counted)
        monkeypatch.setitem(ops.masked_linear.offers, name, offer)
    args = torch.randn(2, 3), torch.randn(4, 3), torch.randn(4, 3), torch.tensor(0.1)
    for _ in range(2):
        expected = ops.masked_linear(*args)
        with registry.use_backend("plain"):
            ops.masked_linear(*args)
        ops.masked_linear(*args, backend="plain")
        ops.masked_linear(*args[:3], threshold=args[3].double())
        assert calls == ["cpu", "plain", "plain", "plain"]
        calls.clear()
        with torch.autocast("cpu", torch.bfloat16):
            assert ops.masked_linear(*args).dtype == torch.bfloat16
        assert calls == ["cpu"]
        calls.clear()
    torch.testing.assert_close(expected, reference.masked_linear(*args))


def test_kinds_of_calls_are_remembered_up_to_a_number(monkeypatch):
    internals.most_choices(monkeypatch, 3)
    for size in range(1, 9):
        logits = torch.randn(size)
        torch.testing.assert_close(ops.semi_binary_mask(logits, torch.tensor(0.0)), logits.tanh().abs())


@pytest.mark.native
def test_explain():
    a, threshold = torch.randn(5), torch.tensor(0.1)
    assert registry.explain("semi_binary_mask", a, threshold) == "semi_binary_mask: cpu (chosen automatically)"
    text = registry.explain("semi_binary_mask", a.double(), threshold.double())
    assert "reference" in text and "not cpu: cpu computes in float32" in text
    text = registry.explain("masked_weights", [a], a, threshold[None], [0, 5], backend="cuda")
    assert "nothing (asked for)" in text
    with pytest.raises(InputError, match="no op"):
        registry.explain("sofmax", a)


def test_environment_chooses():
    code = "import torch; from hypermask_fast.ops import registry as r; print(r.requested())"
    assert run_python(code, HYPERMASK_BACKEND="reference").strip() == "reference"
    code = "import torch; from hypermask_fast import ops; ops.semi_binary_mask(torch.ones(2), torch.tensor(0.))"
    with pytest.raises(AssertionError, match="backend must be one of"):
        run_python(code, HYPERMASK_BACKEND="fast")


def test_without_the_extension_the_reference_serves_and_says_so_once():
    code = """
import importlib.util as util
find = util.find_spec
util.find_spec = lambda name, package=None: None if name == "hypermask_fast._native" else find(name, package)
import torch
from hypermask_fast import ops, env
for _ in range(3):
    ops.semi_binary_mask(torch.ones(2), torch.tensor(0.0))
print(env.report())
"""
    text = run_python(code)
    assert text.count("hypermask_fast runs its reference ops on cpu") == 1
    assert "pip install --no-build-isolation ." in text


@pytest.mark.native
def test_report():
    text = env.report()
    assert re.search(r"backend cpu: +ready \(.*\): .*hypernet_adam", text)
    rest = "entropy_select" if registry.problem("triton") else ": nothing"  # Triton's kernels serve what is left
    assert rest in text.splitlines()[-1]


@pytest.mark.native
def test_the_ops_that_the_cpu_has():
    """Under `use_backend("cpu")` one that it lost would be chosen automatically, and no test of values would fail."""
    missing = set(ops.OPS) - set(registry.served("cpu"))
    assert missing == {
        "chunk_masked_conv2d",
        "chunk_masked_linear",
        "chunked_output_drift",
        "entropy_select",
        "task_batched_linear",
    }
