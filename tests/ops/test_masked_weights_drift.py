"""masked_weights_drift: masked_weights and weight_drift in one pass over the weights."""

import pytest
import torch
from support.backends import NATIVE, on
from support.comparing import check, double
from support.refusals import assert_refused, each_change, whoever_is_asked
from support.segments import PROBLEMS, each_problem
from support.tolerances import assert_all_close, assert_close

from hypermask_fast.ops import reference

# What a loss takes of the results [*masked, drift]; the other ones get no gradient.
LOSSES = {
    "both": lambda masked, drift: [*masked, drift],
    "some weights": lambda masked, drift: [masked[0], drift],
    "no drift": lambda masked, drift: masked,
    "drift alone": lambda masked, drift: drift,
}


def logits_of(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_masked_weights_drift_definition_is_the_two_ops():
    weights = [logits_of(3, 4, seed=1), logits_of(5, seed=2)]
    rest = logits_of(17, seed=4), torch.tensor([0.5, 0.0], dtype=torch.float64), [0, 12, 17]
    masked, drift = reference.masked_weights_drift(weights, *rest, logits_of(17, seed=3), 2)
    for one, other in zip(masked, reference.masked_weights(weights, *rest), strict=True):
        assert torch.equal(one, other)
    assert drift == reference.weight_drift(weights, logits_of(17, seed=3), rest[2], 2, *rest[:2])


def assert_as_defined(backend, segments, loss, norm):
    def build(module, *leaves):
        logits, previous = leaves[-1], segments.previous.to(leaves[-1])
        thresholds = segments.thresholds.to(logits)
        results = module.masked_weights_drift(leaves[:-1], logits, thresholds, segments.offsets, previous, norm)
        return LOSSES[loss](*results)

    check(backend, build, segments.leaves, "elementwise" if loss == "no drift" else "sum", "sum")


@each_problem(*NATIVE, "cuda")
@pytest.mark.parametrize("norm", [1, 2])
def test_masked_weights_drift_matches_the_definition(backend, problem, norm):
    assert_as_defined(backend, PROBLEMS[problem](), "both", norm)


@on(*NATIVE, "cuda")
@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("problem", ["odd shapes", "a few"])
def test_masked_weights_drift_in_a_loss_of_some_results(backend, problem, loss, norm):
    assert_as_defined(backend, PROBLEMS[problem](), loss, norm)


@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_masked_weights_drift_operators_keep_the_weights_to_a_few_roundings(operators, problem, norm):
    """The weights to a few roundings, though sums are beside them; the drift as a norm for every segment."""
    weights, logits, thresholds, offsets, previous = PROBLEMS[problem]()
    weights = [w.contiguous() for w in weights]
    w64, a64 = [double(w) for w in weights], double(logits)
    *masked, drift = outputs = [
        *reference.masked_weights(w64, a64, thresholds.double(), offsets),
        reference.weight_drift(w64, previous.double(), offsets, norm, a64, thresholds.double()),
    ]
    outers = [torch.randn(w.shape) for w in weights]
    gradients = [o.double() for o in (*outers, torch.tensor(0.7))]
    *grad_weights, grad_logits = torch.autograd.grad(outputs, [*w64, a64], gradients)
    actual, norms = operators.masked_weights_drift(weights, logits, thresholds, offsets, previous, norm)
    assert_all_close(actual, masked, "elementwise", "weight")
    assert_close(norms.double().sum(), drift, "sum", "drift")
    common = norms, weights, logits, thresholds, offsets, previous, norm
    actual = operators.masked_weights_drift_backward(outers, torch.full((len(weights),), 0.7), *common)
    assert_all_close(actual[0], grad_weights, "sum", "gradient")
    assert_close(actual[1], grad_logits, "sum", "gradient of logits")


# Bad input

does_not_fit = each_change(
    ({"norm": 0}, "norm must be 1 or 2, not 0"),
    ({"previous": torch.ones(17)}, "offsets must ascend from 0 or more to at most 17 entries, not [0, 12, 17, 18]"),
    ({"logits": torch.ones(2, 9)}, "logits and previous weights must be flat, not of shape (2, 9)"),
    ({"thresholds": torch.ones(2)}, "thresholds must be one per segment, (3,), not (2,)"),
    ({"offsets": [0, 12, 16, 18]}, "weights 1 has 5 entries, its segment 4"),
)


@whoever_is_asked
@does_not_fit
def test_masked_weights_drift_refuses_what_does_not_fit(asked, change, message):
    assert_refused("masked_weights_drift", asked, change, message)
