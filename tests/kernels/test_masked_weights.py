"""masked_weights: W_s * m_s of all layers in one launch, and its gradients in another."""

import itertools

import pytest
import torch
from comparing import DEVICE, DTYPES, assert_close, in_half, launches, randn

import hypermask_fast as hmf
from hypermask_fast import InputError, ops
from hypermask_fast.kernels import masked_weights, segments
from hypermask_fast.ops import reference

SHAPES = ((50, 61), (7,), (0, 3), (1,), (), (3, 2, 3, 3), (2048,), (2049,))  # a block holds 2048 entries
NAN, INF = float("nan"), float("inf")


def network(dtype, shapes=SHAPES, first=3, rest=70):
    """Weights, flat logits with entries before and behind them, thresholds (some equal to a logit), all borders."""
    weights = [randn(*shape, dtype=dtype) for shape in shapes]
    offsets = [first, *itertools.accumulate((w.numel() for w in weights), initial=first)][1:]
    logits, offsets = randn(offsets[-1] + rest, dtype=dtype), [*offsets, offsets[-1] + rest]
    thresholds = torch.stack(
        [logits[at].abs() if end > at else logits.new_zeros(()) for at, end in itertools.pairwise(offsets)]
    )
    return weights, logits, thresholds, offsets


def results(function, weights, logits, thresholds, offsets, grads):
    """Every W * m, then every gradient, for grads of the results."""
    leaves = [t.detach().requires_grad_() for t in (*weights, logits)]
    masked = function(leaves[:-1], leaves[-1], thresholds.to(logits.dtype), offsets)
    gradients = torch.autograd.grad(masked, leaves, [g.to(y.dtype) for g, y in zip(grads, masked, strict=True)])
    return [*(m.detach() for m in masked), *gradients]


def assert_matches(weights, logits, thresholds, offsets, dtype):
    grads = [randn(*w.shape, dtype=dtype) for w in weights]
    found = results(masked_weights, weights, logits, thresholds, offsets, grads)
    wide = [w.double() for w in weights], logits.double(), thresholds.double()
    expected = results(reference.masked_weights, *wide, offsets, grads)

    def halves(*tensors):
        return results(reference.masked_weights, tensors[:-1], tensors[-1], thresholds, offsets, grads)

    names = [f"{what} {s}" for what in ("W * m", "dW") for s in range(len(weights))] + ["da"]
    everything = zip(names, found, expected, in_half(dtype, halves, *weights, logits), strict=False)
    for name, ours, theirs, peer in everything:
        assert ours.dtype == dtype and ours.is_contiguous()
        assert_close(name, ours, theirs, peer)
    return found


@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_reference(dtype):
    """Odd sizes, empty and single entries, blocks that are full; da is 0 where no weight is."""
    weights, logits, thresholds, offsets = network(dtype)
    *_, da = assert_matches(weights, logits, thresholds, offsets, dtype)
    assert not da[: offsets[0]].any() and not da[offsets[-2] :].any()
    assert_matches(weights[:2], logits, thresholds, offsets, dtype)  # fewer weights than segments


@pytest.mark.parametrize("count", [9, segments.MOST, 2 * segments.MOST + 1])
def test_many_tensors(count):
    weights, logits, thresholds, offsets = network(torch.float32, [(1 + s % 3, 2) for s in range(count)], first=0)
    with launches() as launched:
        assert_matches(weights, logits, thresholds, offsets, torch.float32)
    assert len(launched) == 2 * -(-count // segments.MOST)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(dtype):
    weights, logits, thresholds, offsets = network(dtype)
    weights[0] = weights[0].t().contiguous().t()
    weights[5] = weights[5].to(memory_format=torch.channels_last)
    weights[6] = weights[6].repeat_interleave(2)[::2]
    logits, thresholds = logits.repeat_interleave(2)[::2], thresholds.repeat_interleave(3)[::3]
    assert_matches(weights, logits, thresholds, offsets, dtype)


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU's exponential is approximate")
def test_half_precision_is_rounded_once():
    weights, logits, thresholds, offsets = network(torch.float16)
    grads = [torch.randn_like(w) for w in weights]
    found = results(masked_weights, weights, logits, thresholds, offsets, grads)
    wide = [w.double() for w in weights], logits.double(), thresholds.double()
    expected = results(reference.masked_weights, *wide, offsets, grads)
    for ours, theirs in zip(found, expected, strict=True):
        allowed = 0.502 * torch.finfo(torch.float16).eps * theirs.abs() + 2**-24
        assert ((ours.double() - theirs).abs() <= allowed).all()


@pytest.mark.parametrize("wanted", ["logits", 0, 3])
def test_each_gradient_alone(wanted):
    weights, logits, thresholds, offsets = network(torch.float32)
    grads = [torch.randn_like(w) for w in weights]
    expected = results(masked_weights, weights, logits, thresholds, offsets, grads)
    leaf = logits if wanted == "logits" else weights[wanted]
    leaf.requires_grad_()
    torch.autograd.backward(masked_weights(weights, logits, thresholds, offsets), grads)
    assert torch.equal(leaf.grad, expected[-1 if wanted == "logits" else len(weights) + wanted])
    assert all(t.grad is None for t in (*weights, logits) if t is not leaf)


def test_results_that_nobody_used():
    """Their gradient is 0; one that is an expanded number is taken as well."""
    weights, logits, thresholds, offsets = network(torch.float32)
    leaves = [t.requires_grad_() for t in (*weights, logits)]
    masked = masked_weights(weights, logits, thresholds, offsets)
    *dws, da = torch.autograd.grad(masked[0].sum(), leaves)
    assert all(not dw.any() for dw in dws[1:]) and not da[offsets[1] :].any()
    mask = reference.semi_binary_mask(logits[offsets[0] : offsets[1]].double(), thresholds[0].double())
    assert_close("dW", dws[0].flatten(), mask)


def test_what_equals_the_threshold_and_what_is_not_finite():
    """|a| = threshold is kept, NaN too, and gives NaN; Inf is a mask of 1; 0 times an infinite weight is NaN."""
    logits = torch.tensor([0.5, -0.5, 0.25, NAN, INF, -INF, 0.25], device=DEVICE)
    weight, threshold = torch.ones(7, device=DEVICE), torch.tensor([0.5], device=DEVICE)
    weight[6] = INF
    (masked,) = masked_weights([weight], logits, threshold, [0, 7])
    assert masked.isnan().nonzero().flatten().tolist() == [3, 6]
    weight[6] = 1
    for t in (threshold, torch.tensor([NAN], device=DEVICE)):
        ours = results(masked_weights, [weight], logits, t, [0, 7], [weight])
        wide = [weight.double()], logits.double(), t.double()
        theirs = results(reference.masked_weights, *wide, [0, 7], [weight])
        for found, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=1e-12, equal_nan=True)


def test_weights_and_logits_of_two_dtypes():
    """As PyTorch promotes them; each gradient in its tensor's own dtype."""
    weights, logits, thresholds, offsets = network(torch.float16)
    wide = [w.float() for w in weights]
    for w, a in ((weights, logits.float()), (wide, logits)):
        found = results(masked_weights, w, a, thresholds, offsets, wide)
        assert [t.dtype for t in found] == [torch.float32] * len(w) + [t.dtype for t in (*w, a)]
        expected = results(reference.masked_weights, [t.double() for t in w], a.double(), thresholds, offsets, wide)
        for m, e in zip(found[: len(w)], expected, strict=False):
            assert_close("W * m", m, e)


def test_nothing():
    logits, thresholds, offsets = torch.ones(3, device=DEVICE), torch.ones(1, device=DEVICE), [0, 0]
    assert masked_weights([], logits, thresholds, offsets) == []
    empty = torch.ones(0, 2, device=DEVICE, requires_grad=True)
    logits.requires_grad_()
    (masked,) = masked_weights([empty], logits, thresholds, offsets)
    dw, da = torch.autograd.grad(masked.sum(), (empty, logits))
    assert masked.shape == dw.shape == (0, 2) and not da.any()


def test_the_backend_serves_weights_of_one_dtype():
    weights, logits, thresholds, offsets = network(torch.float16)
    with launches() as launched:
        ops.masked_weights(weights, logits, thresholds, offsets, backend="triton")
    assert launched == ["_masked_weights"]
    weights[1] = weights[1].float()
    with pytest.raises(InputError, match="the weights differ in dtype"):
        ops.masked_weights(weights, logits, thresholds, offsets, backend="triton")
    assert "triton" in hmf.explain("masked_weights", weights[:1], logits, thresholds, offsets, backend="triton")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offsets": [0, 6]}, "2 weights need 3 offsets, not 2"),
        ({"offsets": [0, 5, 8]}, "weights 0 has 6 entries, its segment 5"),
        ({"offsets": [-6, 0, 2]}, "offsets must ascend from 0 or more"),
        ({"logits": torch.ones(7)}, "at most 7 entries"),
        ({"logits": torch.ones(2, 4)}, "must be flat"),
        ({"thresholds": torch.ones(1)}, r"thresholds must be one per segment, \(2,\), not \(1,\)"),
        ({"thresholds": torch.ones(2).double()}, "float64"),
        ({"weights": [torch.ones(6), torch.ones(2).half()]}, "the weights differ in dtype"),
    ],
)
def test_bad_input(change, message):
    good = {
        "weights": [torch.ones(2, 3), torch.ones(2)], "logits": torch.ones(8), "thresholds": torch.ones(2),
        "offsets": [0, 6, 8],
    }  # fmt: skip
    given = good | change
    given["weights"] = [w.to(DEVICE) for w in given["weights"]]
    with pytest.raises(InputError, match=message):
        masked_weights(**{n: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for n, v in given.items()})
