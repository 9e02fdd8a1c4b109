"""masked_weights: W_s * m_s of all segments at once, and the gradients of weights and logits."""

import pytest
import torch
from support.arguments import valid
from support.backends import NATIVE, on
from support.comparing import NAN, check
from support.refusals import assert_kernel_refuses, assert_refused, changed, each_change, whoever_is_asked
from support.segments import PROBLEMS, each_problem, odd_shapes
from torch.autograd import gradcheck

from hypermask_fast import InputError, ops
from hypermask_fast.ops import reference

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # in Triton's interpreter

ANY_BACKEND = ("cpu-baseline", "emulated", "triton", "cuda")


# The definition


def logits_of(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_masked_weights_definition_by_hand():
    kernel, logits = logits_of(6, 2, 3, 3, seed=5), logits_of(6, 2, 3, 3, seed=7)
    mask = torch.where(logits.abs() >= 0.4, logits.tanh().abs(), 0.0)
    (masked,) = reference.masked_weights([kernel], logits.flatten(), torch.tensor([0.4]), [0, kernel.numel()])
    assert torch.equal(masked, kernel * mask)


def test_masked_weights_definition_gradient():
    weights = [logits_of(3, 4, seed=1).requires_grad_(), logits_of(5, seed=2).requires_grad_()]
    logits = logits_of(17, seed=3).requires_grad_()
    thresholds = torch.tensor([0.5, 0.2], dtype=torch.float64)
    assert gradcheck(lambda a, *w: tuple(reference.masked_weights(w, a, thresholds, [0, 12, 17])), (logits, *weights))


# Every backend


def build(thresholds, offsets):
    return lambda module, *leaves: module.masked_weights(leaves[:-1], leaves[-1], thresholds.to(leaves[-1]), offsets)


@each_problem(*NATIVE, "cuda", triton=["odd shapes", "a few", "1 segments", "6 segments"])
def test_masked_weights_match_the_definition(backend, problem):
    segments = PROBLEMS[problem]()
    run = build(segments.thresholds, segments.offsets)
    check(backend, run, segments.leaves, "elementwise", "slope")
    leaves = [t.detach().to(backend.device).requires_grad_() for t in segments.leaves]
    (grad_logits,) = torch.autograd.grad(run(backend, *leaves), leaves[-1:], leaves[:-1])
    assert not grad_logits[: segments.offsets[0]].any()  # no weight is there
    assert not grad_logits[segments.offsets[-2] :].any()


def test_masked_weights_of_fewer_weights_than_segments(backend):
    segments = odd_shapes()
    leaves = [*segments.weights[:2], segments.logits]
    check(backend, build(segments.thresholds, segments.offsets), leaves, "elementwise", "slope")


@on(*ANY_BACKEND)
def test_masked_weights_that_nobody_used_have_no_gradient(backend):
    """Their gradient is 0."""
    segments = odd_shapes()
    leaves = [t.to(backend.device).requires_grad_() for t in segments.leaves]
    masked = build(segments.thresholds, segments.offsets)(backend, *leaves)
    *grad_weights, grad_logits = torch.autograd.grad(masked[0].sum(), leaves)
    assert (grad_logits[segments.offsets[1] :] == 0).all()
    assert grad_logits[: segments.offsets[1]].abs().sum() > 0
    assert all(not g.any() for g in grad_weights[1:]) and grad_weights[0].any()


@on(*ANY_BACKEND)
def test_masked_weights_of_nothing(backend):
    empty, logits = torch.empty(0, 2, requires_grad=True), torch.ones(3, requires_grad=True)
    check(backend, build(torch.ones(1), [0, 0]), [empty, logits], "exact", "exact")
    check(backend, build(torch.zeros(1), [0, 0]), [torch.empty(0), torch.empty(0)], "exact", "exact")


def test_masked_weights_keep_what_equals_the_threshold_and_show_nan(backend):
    """|a| = threshold is kept, NaN too, and gives NaN; Inf is a mask of 1; 0 times an infinite weight is NaN."""
    logits = torch.tensor([0.5, -0.5, 0.25, NAN, float("inf"), -float("inf"), 0.25])
    weight, threshold = torch.ones(7), torch.tensor([0.5])
    weight[6] = float("inf")
    put = [t.to(backend.device) for t in (weight, logits, threshold)]
    (masked,) = backend.masked_weights([put[0]], put[1], put[2], [0, 7])
    assert masked.isnan().nonzero().flatten().tolist() == [3, 6]
    weight[6] = 1
    for t in (threshold, torch.tensor([NAN])):
        check(backend, build(t, [0, 7]), [weight, logits], "elementwise", "slope")


# Bad input

does_not_fit = each_change(
    ({"thresholds": torch.ones(4)}, "thresholds must be one per segment, (3,), not (4,)"),
    ({"thresholds": torch.ones(1)}, "thresholds must be one per segment, (3,), not (1,)"),
    ({"offsets": [0, 12, 16, 18]}, "weights 1 has 5 entries, its segment 4"),
    ({"offsets": [0, 11, 16, 18]}, "weights 0 has 12 entries, its segment 11"),
    ({"offsets": [0, 12], "thresholds": torch.ones(1)}, "2 weights need 3 offsets, not 2"),
    ({"offsets": [-12, 0, 5, 6]}, "offsets must ascend from 0 or more to at most 18 entries, not [-12, 0, 5, 6]"),
    ({"logits": torch.ones(2, 9)}, "logits and previous weights must be flat, not of shape (2, 9)"),
    ({"logits": torch.ones(17)}, "offsets must ascend from 0 or more to at most 17 entries, not [0, 12, 17, 18]"),
)


@whoever_is_asked
@does_not_fit
def test_masked_weights_refuse_what_does_not_fit(asked, change, message):
    assert_refused("masked_weights", asked, change, message)


@does_not_fit
def test_masked_weights_by_triton_called_directly_refuse_in_the_same_words(triton, change, message):
    assert_kernel_refuses(triton, "masked_weights", change, message)


@each_change(
    ({"thresholds": torch.ones(3).double()}, "float64"),
    ({"weights": [torch.ones(12), torch.ones(5).half()]}, "the weights differ in dtype"),
)
def test_masked_weights_by_triton_refuse_other_dtypes(triton, change, message):
    given = changed("masked_weights", change)
    with pytest.raises(InputError, match=message):
        ops.masked_weights(**given, backend="triton")
    with pytest.raises(InputError, match=message):
        triton.masked_weights(**given)


@pytest.mark.native
@pytest.mark.parametrize(
    ("op", "name"),
    [
        ("masked_weights", "thresholds"),
        ("weight_drift", "thresholds"),
        ("weight_drift", "logits"),
        ("masked_weights_drift", "thresholds"),
        ("masked_weights_drift", "previous"),
        ("masked_linear", "threshold"),
        ("masked_conv2d", "threshold"),
    ],
)
def test_a_tensor_of_another_dtype_goes_to_the_definition(op, name):
    """The extension computes in float32 alone."""
    args = valid(op)
    args[name] = args[name].detach().double()
    found, expected = getattr(ops, op)(**args), getattr(reference, op)(**args)
    torch.testing.assert_close(found, expected)
