"""semi_binary_mask, entropy_select, weight_drift."""

import itertools

import pytest
import torch
from comparing import (
    DEVICE,
    DTYPES,
    FLOAT32_TOLERANCE,
    assert_close,
    assert_matches,
    exact_threshold,
    in_half,
    launches,
    output_and_gradients,
    randn,
)

from hypermask_fast.errors import InputError
from hypermask_fast.kernels import entropy_select, segments, semi_binary_mask, semi_binary_mask_with_slope, weight_drift
from hypermask_fast.ops import reference

MASKS = [  # logits, threshold
    ((), ()),
    ((3000,), ()),
    ((3, 700), (3, 1)),
    ((2, 3, 5), (3, 1)),
    ((4, 6), (6,)),
    ((2, 5), (2, 5)),
    ((0, 4), (1,)),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "threshold_shape"), MASKS)
def test_mask_and_slope_match_reference(shape, threshold_shape, dtype):
    logits, threshold = randn(*shape, dtype=dtype), randn(*threshold_shape, dtype=dtype).abs()
    assert_matches(
        lambda a: semi_binary_mask(a, threshold),
        lambda a: reference.semi_binary_mask(a, threshold.double()),
        (logits,),
        dtype,
    )
    mask, slope = semi_binary_mask_with_slope(logits, threshold)

    def with_slope(a):
        return output_and_gradients(lambda a: reference.semi_binary_mask(a, threshold), [a], torch.ones_like(a))

    peers = in_half(dtype, with_slope, logits)
    for name, ours, expected, peer in zip(
        ("mask", "slope"), (mask, slope), with_slope(logits.double()), peers, strict=False
    ):
        assert_close(name, ours, expected, peer)


def test_mask_keeps_what_equals_the_threshold_and_nan():
    logits = torch.tensor([0.5, -0.5, 0.25, float("nan"), 0.0, -3.0], device=DEVICE)
    mask = semi_binary_mask(logits, torch.tensor(0.5, device=DEVICE))
    assert (mask != 0).tolist() == [True, True, False, True, False, True] and mask[3].isnan()
    assert semi_binary_mask(logits, torch.tensor(float("nan"), device=DEVICE))[2] != 0
    strided = randn(6, 8, dtype=torch.float32).t()
    threshold = exact_threshold(strided)
    torch.testing.assert_close(semi_binary_mask(strided, threshold), reference.semi_binary_mask(strided, threshold))


def test_slope_near_one_does_not_cancel():
    """1 - tanh^2 of a large logit is tiny, not 0: the textbook formula loses it in float32."""
    logits = torch.tensor([8.0, -12.0], device=DEVICE)
    _, slope = semi_binary_mask_with_slope(logits, torch.zeros((), device=DEVICE))
    expected = logits.double().cosh() ** -2 * logits.sign()
    torch.testing.assert_close(slope.double(), expected, rtol=3e-6, atol=0)


def test_mask_bad_input():
    with pytest.raises(InputError, match="does not broadcast"):
        semi_binary_mask(torch.ones(3, 4, device=DEVICE), torch.ones(3, device=DEVICE))
    with pytest.raises(InputError, match="float64"):
        semi_binary_mask(torch.ones(3, device=DEVICE).double(), torch.ones((), device=DEVICE))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 70, 10), (2, 5, 3000), (4, 0, 3)])
def test_entropy_select_matches_reference(shape, dtype):
    logits = 3 * randn(*shape, dtype=dtype)
    chosen, expected = entropy_select(logits), reference.entropy_select(logits.double())
    assert chosen.dtype == torch.int64
    assert torch.equal(chosen, expected)
    assert torch.equal(entropy_select(logits.transpose(0, 2).contiguous().transpose(0, 2)), expected)


def test_entropy_select_ties_infinities_and_nan():
    rows = torch.randn(4, 1, 6, device=DEVICE).repeat(1, 6, 1)
    rows[2] = rows[1]  # equal tasks: the lower index
    rows[1:3, 0] *= 50
    rows[0, 1, 3] = -torch.inf  # a class ruled out: 0 log 0 = 0
    rows[0, 2] = torch.tensor([0.0] + [-torch.inf] * 5)  # entropy 0
    rows[0, 3] = torch.nan  # counts as infinite
    rows[:, 4] = torch.nan
    rows[0, 5] = torch.inf
    chosen = entropy_select(rows)
    assert torch.equal(chosen, reference.entropy_select(rows.double()))
    assert chosen[0] == 1 and chosen[2] == 0 and chosen[4] == 0


def test_entropy_select_bad_input():
    for shape in [(0, 3, 4), (3, 4), (2, 3, 0)]:
        with pytest.raises(InputError, match="logits must be"):
            entropy_select(torch.ones(shape, device=DEVICE))


def network(dtype):
    """Weights of every kind (empty, channels_last, unmoved), their borders and the previous flat weights."""
    weights = [randn(*shape, dtype=dtype) for shape in ((50, 60), (7,), (0, 3), (3, 2, 3, 3))]
    weights[3] = weights[3].to(memory_format=torch.channels_last)
    offsets = [2, *itertools.accumulate((w.numel() for w in weights), initial=2)][1:]
    previous = randn(offsets[-1] + 5, dtype=dtype)
    previous[offsets[1] : offsets[2]] = weights[1]
    return weights, previous, offsets


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("norm", [1, 2])
def test_weight_drift_matches_reference(norm, masked, dtype):
    weights, previous, offsets = network(dtype)
    logits, thresholds = randn(len(previous), dtype=dtype), randn(4, dtype=dtype).abs()

    def drift(op, previous, thresholds):
        def with_tensors(*tensors):
            masking = (tensors[-1], thresholds) if masked else ()
            return op(tensors[:4], previous, offsets, norm, *masking)

        return with_tensors

    ours = [t.clone().requires_grad_() for t in (*weights, logits)[: 4 + masked]]
    theirs = [t.detach().double() for t in ours]
    total = drift(weight_drift, previous, thresholds)(*ours)
    expected = drift(reference.weight_drift, previous.double(), thresholds.double())(*theirs)
    assert abs(total.item() / expected.item() - 1) <= FLOAT32_TOLERANCE  # sums are always in float32

    def gradients(*tensors):
        function = drift(reference.weight_drift, previous.to(tensors[0]), thresholds.to(tensors[0]))
        return output_and_gradients(function, tensors, torch.tensor(3.0, device=DEVICE))[1:]

    found, peers = torch.autograd.grad(3 * total, ours), in_half(dtype, gradients, *ours)
    for got, wanted, peer in zip(found, gradients(*theirs), peers, strict=False):
        assert_close("gradient", got, wanted, peer)


def test_weight_drift_of_nothing():
    assert weight_drift([], torch.ones(3, device=DEVICE), [0]).item() == 0


def test_weight_drift_of_the_first_tensors():
    """More segments than weights, as `masked_weights` takes them."""
    weights, previous, offsets = network(torch.float32)
    logits, thresholds = randn(len(previous), dtype=torch.float32), torch.full((4,), 0.4, device=DEVICE)
    arguments = previous, offsets, 1, logits, thresholds
    leaves = [t.requires_grad_() for t in (*weights[:2], logits)]
    expected = reference.weight_drift(weights[:2], *arguments)
    drift = weight_drift(weights[:2], *arguments)
    assert_close("drift", drift.detach(), expected.detach().double())
    gradients = zip(torch.autograd.grad(drift, leaves), torch.autograd.grad(expected, leaves), strict=True)
    for ours, theirs in gradients:
        assert_close("gradient", ours, theirs.double())


@pytest.mark.parametrize("norm", [1, 2])
def test_weight_drift_of_many_tensors(norm):
    """More than a launch takes."""
    count = 2 * segments.MOST + 1
    weights = [randn(1 + s % 3, 2, dtype=torch.float32) for s in range(count)]
    offsets = [0, *itertools.accumulate(w.numel() for w in weights)]
    previous, thresholds = randn(offsets[-1], dtype=torch.float32), randn(count, dtype=torch.float32).abs() / 4
    leaves = [t.requires_grad_() for t in (*weights, randn(offsets[-1] + 3, dtype=torch.float32))]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    drift = weight_drift(leaves[:-1], previous, offsets, norm, leaves[-1], thresholds)
    expected = reference.weight_drift(wide[:-1], previous.double(), offsets, norm, wide[-1], thresholds.double())
    assert_close("drift", drift.detach(), expected.detach())
    gradients = zip(torch.autograd.grad(drift, leaves), torch.autograd.grad(expected, wide), strict=True)
    for ours, theirs in gradients:
        assert_close("gradient", ours, theirs)


def test_launches():
    """Each a launch, forward and backward; the drift's sums over blocks take another one."""
    logits, threshold = randn(3, 70, dtype=torch.float32).requires_grad_(), torch.full((3, 1), 0.4, device=DEVICE)
    weights, previous, offsets = network(torch.float32)
    leaves = [t.requires_grad_() for t in (*weights, randn(len(previous), dtype=torch.float32))]
    with launches() as forward:
        mask = semi_binary_mask(logits, threshold)
        semi_binary_mask_with_slope(logits.detach(), threshold)
        entropy_select(randn(3, 40, 5, dtype=torch.float32))
        drift = weight_drift(leaves[:4], previous, offsets, 1, leaves[4], randn(4, dtype=torch.float32).abs())
    assert forward == ["_mask", "_mask", "_entropy_select", "_partial_sums", "_norms"]
    with launches() as backward:
        mask.sum().backward()
        drift.backward()
    assert backward == ["_mask", "_gradients"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": 3}, "norm must be 1 or 2"),
        ({"offsets": [0, 6]}, "2 weights need 3 offsets, not 2"),
        ({"offsets": [0, 5, 8]}, "weights 0 has 6 entries, its segment 5"),
        ({"previous": torch.ones(7)}, "at most 7 entries"),
        ({"logits": torch.ones(8)}, "logits and thresholds go together, one is missing"),
        ({"logits": torch.ones(7), "thresholds": torch.ones(2)}, "at most 7 entries"),
        ({"weights": [torch.ones(6), torch.ones(2).half()]}, "the weights differ in dtype"),
    ],
)
def test_weight_drift_bad_input(change, message):
    good = {"weights": [torch.ones(2, 3), torch.ones(2)], "previous": torch.ones(8), "offsets": [0, 6, 8], "norm": 1}
    given = good | change
    given["weights"] = [w.to(DEVICE) for w in given["weights"]]
    with pytest.raises(InputError, match=message):
        weight_drift(**{n: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for n, v in given.items()})
