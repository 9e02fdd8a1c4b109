"""weight_drift: D = sum over segments of |(W - W_previous) * m| in the 1- or 2-norm, masked or not."""

import itertools
from itertools import pairwise

import pytest
import torch
from support.backends import CPU, NATIVE, on
from support.comparing import DEVICE, DTYPES, check, double, in_half, launches, output_and_gradients, randn
from support.refusals import assert_kernel_refuses, assert_refused, changed, each_change, whoever_is_asked
from support.segments import PROBLEMS, each_problem
from support.tolerances import TOLERANCES, assert_all_close, assert_close
from torch.autograd import gradcheck

from hypermask_fast import InputError, ops
from hypermask_fast.ops import reference

each_norm = pytest.mark.parametrize("norm", [1, 2])
each_kind = pytest.mark.parametrize("masked", [True, False], ids=["masked", "unmasked"])


# The definition


def logits_of(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@each_norm
@each_kind
def test_weight_drift_definition_by_hand(norm, masked):
    weights = [logits_of(3, 4, seed=1).requires_grad_(), logits_of(5, seed=2).requires_grad_()]
    previous, offsets = logits_of(17, seed=3), [0, 12, 17]
    logits = logits_of(17, seed=4).requires_grad_() if masked else None
    thresholds = torch.tensor([0.5, 0.0], dtype=torch.float64) if masked else None

    def drift(first, second, logits=logits):
        return reference.weight_drift([first, second], previous, offsets, norm, logits, thresholds)

    change = torch.cat([w.detach().flatten() for w in weights]) - previous
    if masked:
        mask = logits.detach().tanh().abs()
        mask[:12] *= logits[:12].abs() >= 0.5
        change = change * mask
    parts = [change[:12], change[12:]]
    expected = sum(p.abs().sum() if norm == 1 else p.square().sum().sqrt() for p in parts)
    torch.testing.assert_close(drift(*weights).detach(), expected)
    assert gradcheck(drift, (*weights, logits) if masked else tuple(weights))


def test_weight_drift_definition_has_no_gradient_at_the_start_of_a_task():
    weight = logits_of(4).requires_grad_()
    for norm in (1, 2):
        reference.weight_drift([weight], weight.detach().clone(), [0, 4], norm).backward()
        assert torch.equal(weight.grad, torch.zeros(4, dtype=torch.float64))


# Every backend


def build(segments, norm, masked):
    def call(module, *leaves):
        mask = (leaves[-1], segments.thresholds.to(leaves[-1])) if masked else (None, None)
        weights = leaves[: len(segments.weights)]
        return module.weight_drift(weights, segments.previous.to(leaves[0]), segments.offsets, norm, *mask)

    return call


@each_norm
@each_kind
@each_problem(*NATIVE, "cuda", triton=["odd shapes", "a few"])
def test_weight_drift_matches_the_definition(backend, problem, norm, masked):
    segments = PROBLEMS[problem]()
    leaves = segments.leaves if masked else segments.weights
    check(backend, build(segments, norm, masked), leaves, "sum", "sum")


@each_norm
@each_kind
@pytest.mark.parametrize("problem", PROBLEMS)
def test_weight_drift_norm_of_every_segment(operators, problem, norm, masked):
    """The operators return them one by one, and take a gradient for each."""
    weights, logits, thresholds, offsets, previous = segments = PROBLEMS[problem]()
    weights = [w.contiguous() for w in weights]
    count, extra = len(weights), ((logits, thresholds) if masked else (None, None))
    w64, a64 = [double(w) for w in weights], double(logits)
    extra64 = (a64, thresholds.double()) if masked else (None, None)
    parts = [
        reference.weight_drift(
            w64[s : s + 1], previous.double()[a:b], [0, b - a], norm,
            *((a64[a:b], thresholds[s : s + 1].double()) if masked else (None, None)),
        )
        for s, (a, b) in enumerate(pairwise(offsets[: count + 1]))
    ]  # fmt: skip
    norms = operators.weight_drift(weights, previous, offsets, norm, *extra)
    assert_all_close(norms, parts, "sum", "norm")
    total = reference.weight_drift(w64, previous.double(), offsets, norm, *extra64)
    leaves = [*w64, a64] if masked else w64
    expected = torch.autograd.grad(total * 0.7, leaves)
    outer = torch.full((count,), 0.7)
    grads, grad_logits = operators.weight_drift_backward(outer, norms, weights, previous, offsets, norm, *extra)
    assert_all_close(grads, expected[:count], "sum", "gradient")
    if masked:
        assert_close(grad_logits, expected[count], "sum", "gradient of logits")
    assert len(segments.weights) == count


@on(*CPU, "triton", "cuda")
def test_weight_drift_of_nothing(backend):
    empty = torch.empty(0, device=backend.device)
    assert backend.weight_drift([empty], empty, [0, 0]).item() == 0
    assert backend.weight_drift([], empty, [0]).item() == 0
    assert backend.weight_drift([], torch.ones(3, device=backend.device), [0]).item() == 0


# Triton alone


def network(dtype=torch.float32):
    """Weights of every kind (empty, channels_last, unmoved), their borders and the previous flat weights."""
    weights = [randn(*shape, dtype=dtype) for shape in ((50, 60), (7,), (0, 3), (3, 2, 3, 3))]
    weights[3] = weights[3].to(memory_format=torch.channels_last)
    offsets = [2, *itertools.accumulate((w.numel() for w in weights), initial=2)][1:]
    previous = randn(offsets[-1] + 5, dtype=dtype)
    previous[offsets[1] : offsets[2]] = weights[1]
    return weights, previous, offsets


@pytest.mark.parametrize("dtype", DTYPES)
@each_kind
@each_norm
def test_weight_drift_by_triton_in_every_dtype(triton, norm, masked, dtype):
    """The sums are in float32 always."""
    weights, previous, offsets = network(dtype)
    logits, thresholds = randn(len(previous), dtype=dtype), randn(4, dtype=dtype).abs()

    def drift(op, previous, thresholds):
        def with_tensors(*tensors):
            masking = (tensors[-1], thresholds) if masked else ()
            return op(tensors[:4], previous, offsets, norm, *masking)

        return with_tensors

    ours = [t.clone().requires_grad_() for t in (*weights, logits)[: 4 + masked]]
    theirs = [t.detach().double() for t in ours]
    total = drift(triton.weight_drift, previous, thresholds)(*ours)
    expected = drift(reference.weight_drift, previous.double(), thresholds.double())(*theirs)
    assert abs(total.item() / expected.item() - 1) <= TOLERANCES["triton"].relative

    def gradients(*tensors):
        function = drift(reference.weight_drift, previous.to(tensors[0]), thresholds.to(tensors[0]))
        return output_and_gradients(function, tensors, torch.tensor(3.0, device=DEVICE))[1:]

    found, peers = torch.autograd.grad(3 * total, ours), in_half(dtype, gradients, *ours)
    for got, wanted, peer in zip(found, gradients(*theirs), peers, strict=False):
        assert_close(got, wanted, "triton", "gradient", peer=peer)


@each_norm
def test_weight_drift_by_triton_of_more_segments_than_a_launch_takes(triton, norm):
    from hypermask_fast.kernels import segments

    count = 2 * segments.MOST + 1
    weights = [randn(1 + s % 3, 2) for s in range(count)]
    offsets = [0, *itertools.accumulate(w.numel() for w in weights)]
    previous, thresholds = randn(offsets[-1]), randn(count).abs() / 4
    leaves = [t.requires_grad_() for t in (*weights, randn(offsets[-1] + 3))]
    wide = [double(t) for t in leaves]
    drift = triton.weight_drift(leaves[:-1], previous, offsets, norm, leaves[-1], thresholds)
    expected = reference.weight_drift(wide[:-1], previous.double(), offsets, norm, wide[-1], thresholds.double())
    assert_close(drift, expected, "triton", "drift")
    assert_all_close(
        torch.autograd.grad(drift, leaves), torch.autograd.grad(expected, wide), "triton", "gradient"
    )  # fmt: skip


def test_weight_drift_by_triton_launches_two_kernels_and_one_back(triton):
    """One forward, one for the sums over blocks, one backward."""
    weights, previous, offsets = network()
    leaves = [t.requires_grad_() for t in (*weights, randn(len(previous)))]
    with launches() as forward:
        drift = triton.weight_drift(leaves[:4], previous, offsets, 1, leaves[4], randn(4).abs())
    assert forward == ["_partial_sums", "_norms"]
    with launches() as backward:
        drift.backward()
    assert backward == ["_gradients"]


# Bad input

does_not_fit = each_change(
    ({"norm": 3}, "norm must be 1 or 2, not 3"),
    ({"thresholds": None}, "logits and thresholds go together, one is missing"),
    ({"logits": None}, "logits and thresholds go together, one is missing"),
    ({"logits": torch.ones(10)}, "offsets must ascend from 0 or more to at most 10 entries, not [0, 12, 17, 18]"),
    ({"logits": torch.ones(2, 9)}, "logits and previous weights must be flat, not of shape (2, 9)"),
    ({"previous": torch.ones(17)}, "offsets must ascend from 0 or more to at most 17 entries, not [0, 12, 17, 18]"),
    ({"previous": torch.ones(2, 9)}, "logits and previous weights must be flat, not of shape (2, 9)"),
    ({"offsets": [0, 12]}, "2 weights need 3 offsets, not 2"),
    ({"offsets": [0, 11, 16, 18]}, "weights 0 has 12 entries, its segment 11"),
    ({"thresholds": torch.ones(2)}, "thresholds must be one per segment, (3,), not (2,)"),
)


@whoever_is_asked
@does_not_fit
def test_weight_drift_refuses_what_does_not_fit(asked, change, message):
    assert_refused("weight_drift", asked, change, message)


@does_not_fit
def test_weight_drift_by_triton_called_directly_refuses_in_the_same_words(triton, change, message):
    assert_kernel_refuses(triton, "weight_drift", change, message)


def test_weight_drift_by_triton_refuses_weights_of_two_dtypes(triton):
    given = changed("weight_drift", {"weights": [torch.ones(12), torch.ones(5).half()]})
    with pytest.raises(InputError, match="the weights differ in dtype"):
        ops.weight_drift(**given, backend="triton")
    with pytest.raises(InputError, match="the weights differ in dtype"):
        triton.weight_drift(**given)
