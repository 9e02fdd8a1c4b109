"""NaN and Inf in logits, weights and what comes from above, in every combination: the operators of csrc/cpu, and those
of csrc/cuda run by a CPU, have them where the reference has them, and exactly 0 for a dropped logit whatever comes from
above."""

from itertools import product

import pytest
import torch
from support.comparing import INF, NAN
from support.tolerances import assert_close

from hypermask_fast.ops import reference

WEIGHTS = (1.5, 0.0, NAN, INF, -INF)
PREVIOUS = (1.5, -0.5, NAN, INF)
LOGITS = (0.0, 0.1, -0.1, 0.7, -2.0, -88.0, NAN, INF, -INF)
OUTERS = 4 * (1.0, -0.3, 0.0, NAN, INF, -INF)  # 24: whole vectors of any width, and a part
THRESHOLDS = (0.3, 0.0, NAN, INF)


def every_case():
    """Each weight, previous weight and logit in a segment of its own, with every value from above.

    Returns:
        weights and outers as lists of tensors; flat previous weights and logits; offsets.
    """
    cases = torch.tensor([*product(WEIGHTS, PREVIOUS, LOGITS, OUTERS)])
    weights, previous, logits, outers = cases.t().contiguous()
    offsets = [*range(0, len(cases) + 1, len(OUTERS))]
    return list(weights.split(len(OUTERS))), list(outers.split(len(OUTERS))), previous, logits, offsets


def doubles(tensors):
    return [t.double().requires_grad_() for t in tensors]


def gradients(outputs, outers, leaves):
    return torch.autograd.grad(outputs, leaves, [o.double() for o in outers])


def assert_same(actual, expected, what):
    """NaN, Inf and -Inf in the same places, the other numbers to float32's rounding."""
    actual, expected = (torch.cat([x.detach().reshape(-1) for x in xs]).double() for xs in (actual, expected))
    kinds = [torch.where(x.isfinite(), 0.0, x).nan_to_num(nan=2.0, posinf=1.0, neginf=-1.0) for x in (actual, expected)]
    assert torch.equal(*kinds), what
    finite = expected.isfinite()
    assert_close(actual[finite], expected[finite], "sum", what)


def assert_dropped_are_zero(grad_logits, logits, threshold):
    dropped = logits.abs() < threshold
    assert (grad_logits[dropped] == 0).all() and (dropped.any() or not threshold > 0)


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_semi_binary_mask(operators, threshold):
    _, outers, _, logits, _ = every_case()
    outer, limit = torch.cat(outers), torch.tensor(threshold)
    (a64,) = doubles([logits])
    expected = reference.semi_binary_mask(a64, limit.double())
    assert_same([operators.semi_binary_mask(logits, limit)], [expected], "mask")
    grad_logits = operators.semi_binary_mask_backward(outer, logits, limit)
    assert_same([grad_logits], gradients([expected], [outer], [a64]), "gradient")
    assert_dropped_are_zero(grad_logits, logits, threshold)


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_masked_weights(operators, threshold):
    weights, outers, _, logits, offsets = every_case()
    thresholds = torch.full((len(weights),), threshold)
    *w64, a64 = doubles([*weights, logits])
    expected = reference.masked_weights(w64, a64, thresholds.double(), offsets)
    assert_same(operators.masked_weights(weights, logits, thresholds, offsets), expected, "weights")
    grad_weights, grad_logits = operators.masked_weights_backward(outers, weights, logits, thresholds, offsets)
    *w_expected, a_expected = gradients(expected, outers, [*w64, a64])
    assert_same(grad_weights, w_expected, "gradient of weights")
    assert_same([grad_logits], [a_expected], "gradient of logits")
    assert_dropped_are_zero(grad_logits, logits, threshold)


def norms_of(w64, previous, offsets, norm, a64=None, thresholds=None):
    """The reference's drift of every segment by itself."""
    return [
        reference.weight_drift([w], previous.double()[begin:end], [0, end - begin], norm,
                               *((None, None) if a64 is None else (a64[begin:end], thresholds[s : s + 1].double())))
        for s, (w, begin, end) in enumerate(zip(w64, offsets[:-1], offsets[1:], strict=True))
    ]  # fmt: skip


@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("threshold", [None, 0.3, NAN])
def test_weight_drift(operators, norm, threshold):
    weights, _, previous, logits, offsets = every_case()
    *w64, a64 = leaves = doubles([*weights, logits])
    masking, masking64 = (None, None), ()
    if threshold is not None:
        thresholds = torch.full((len(weights),), threshold)
        masking, masking64 = (logits, thresholds), (a64, thresholds)
    else:
        leaves = w64
    expected = norms_of(w64, previous, offsets, norm, *masking64)
    norms = operators.weight_drift(weights, previous, offsets, norm, *masking)
    assert_same([norms], expected, "norms")
    for from_above in (0.7, 0.0, NAN, INF):
        outer = torch.full_like(norms, from_above)
        grads = gradients_of_norms(expected, outer, leaves)
        arguments = outer, norms, weights, previous, offsets, norm, *masking
        grad_weights, grad_logits = operators.weight_drift_backward(*arguments)
        assert_same(grad_weights, grads[: len(weights)], f"gradient of weights, {from_above} from above")
        if threshold is not None:
            assert_same([grad_logits], grads[len(weights) :], f"gradient of logits, {from_above} from above")
            assert_dropped_are_zero(grad_logits, logits, threshold)


def gradients_of_norms(norms, outer, leaves):
    return torch.autograd.grad(norms, leaves, list(outer.double()), retain_graph=True)


@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("threshold", [0.3, 0.0])
def test_masked_weights_drift(operators, norm, threshold):
    weights, outers, previous, logits, offsets = every_case()
    thresholds = torch.full((len(weights),), threshold)
    *w64, a64 = leaves = doubles([*weights, logits])
    masked = reference.masked_weights(w64, a64, thresholds.double(), offsets)
    drifts = norms_of(w64, previous, offsets, norm, a64, thresholds)
    actual, norms = operators.masked_weights_drift(weights, logits, thresholds, offsets, previous, norm)
    assert_same(actual, masked, "weights")
    assert_same([norms], drifts, "norms")
    for from_above in (0.7, -INF):
        outer = torch.full_like(norms, from_above)
        both = [o.double() for o in (*outers, *outer)]
        *w_expected, a_expected = torch.autograd.grad([*masked, *drifts], leaves, both, retain_graph=True)
        common = norms, weights, logits, thresholds, offsets, previous, norm
        grad_weights, grad_logits = operators.masked_weights_drift_backward(outers, outer, *common)
        assert_same(grad_weights, w_expected, f"gradient of weights, {from_above} from above")
        assert_same([grad_logits], [a_expected], f"gradient of logits, {from_above} from above")
        assert_dropped_are_zero(grad_logits, logits, threshold)
