"""masked_weights by Triton: half precision, any strides, one launch for many segments, gradients one by one."""

import pytest
import torch
from support.comparing import DEVICE, DTYPES, INF, NAN, assert_matches, launches, output_and_gradients
from support.segments import Segments, of_shapes
from support.tolerances import assert_close

import hypermask_fast as hmf
from hypermask_fast import InputError, ops
from hypermask_fast.ops import reference


def run(module, segments: Segments):
    """The op as a function of the weights and the logits."""

    def call(*leaves):
        thresholds = segments.thresholds.to(leaves[-1].dtype)
        return module.masked_weights(leaves[:-1], leaves[-1], thresholds, segments.offsets)

    return call


def assert_as_defined(triton, segments: Segments, dtype: torch.dtype) -> None:
    results = assert_matches(run(triton, segments), run(reference, segments), segments.leaves, dtype)
    assert all(masked.is_contiguous() for masked in results)


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_weights_by_triton_in_every_dtype(triton, dtype):
    """Odd sizes, empty and single entries, blocks that are full; the gradient of logits is 0 where no weight is."""
    segments = of_shapes(dtype)
    assert_as_defined(triton, segments, dtype)
    ones = [torch.ones_like(w) for w in segments.weights]
    *_, grad_logits = output_and_gradients(run(triton, segments), segments.leaves, ones)
    assert not grad_logits[: segments.offsets[0]].any() and not grad_logits[segments.offsets[-2] :].any()
    assert_as_defined(triton, segments._replace(weights=segments.weights[:2]), dtype)  # fewer weights than segments


@pytest.mark.parametrize("count", ["9", "a launch", "three launches"])
def test_masked_weights_by_triton_of_many_segments_share_launches(triton, count):
    from hypermask_fast.kernels import segments as limits

    number = {"9": 9, "a launch": limits.MOST, "three launches": 2 * limits.MOST + 1}[count]
    segments = of_shapes(shapes=[(1 + s % 3, 2) for s in range(number)], first=0)
    with launches() as launched:
        assert_as_defined(triton, segments, torch.float32)
    assert len(launched) == 2 * -(-number // limits.MOST)


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_weights_by_triton_take_any_strides(triton, dtype):
    segments = of_shapes(dtype)
    weights = segments.weights
    weights[0] = weights[0].t().contiguous().t()
    weights[5] = weights[5].to(memory_format=torch.channels_last)
    weights[6] = weights[6].repeat_interleave(2)[::2]
    logits = segments.logits.repeat_interleave(2)[::2]
    thresholds = segments.thresholds.repeat_interleave(3)[::3]
    assert_as_defined(triton, segments._replace(logits=logits, thresholds=thresholds), dtype)


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU's exponential is approximate")
def test_masked_weights_by_triton_in_half_precision_are_rounded_once(triton):
    segments = of_shapes(torch.float16)
    grads = [torch.randn_like(w) for w in segments.weights]
    found = output_and_gradients(run(triton, segments), segments.leaves, grads)
    expected = output_and_gradients(run(reference, segments), [t.double() for t in segments.leaves], grads)
    for ours, theirs in zip(found, expected, strict=True):
        allowed = 0.502 * torch.finfo(torch.float16).eps * theirs.abs() + 2**-24
        assert ((ours.double() - theirs).abs() <= allowed).all()


@pytest.mark.parametrize("wanted", ["logits", 0, 3])
def test_masked_weights_by_triton_each_gradient_alone(triton, wanted):
    segments = of_shapes()
    grads = [torch.randn_like(w) for w in segments.weights]
    expected = output_and_gradients(run(triton, segments), segments.leaves, grads)
    leaf = segments.logits if wanted == "logits" else segments.weights[wanted]
    leaf.requires_grad_()
    torch.autograd.backward(run(triton, segments)(*segments.leaves), grads)
    assert torch.equal(leaf.grad, expected[-1 if wanted == "logits" else len(grads) + wanted])
    assert all(t.grad is None for t in segments.leaves if t is not leaf)


def test_masked_weights_by_triton_that_nobody_used_have_no_gradient(triton):
    """Their gradient is 0; one that is an expanded number is taken as well."""
    segments = of_shapes()
    leaves = [t.requires_grad_() for t in segments.leaves]
    masked = run(triton, segments)(*leaves)
    *dws, da = torch.autograd.grad(masked[0].sum(), leaves)
    assert all(not dw.any() for dw in dws[1:]) and not da[segments.offsets[1] :].any()
    first = slice(*segments.offsets[:2])
    mask = reference.semi_binary_mask(segments.logits[first].double(), segments.thresholds[0].double())
    assert_close(dws[0].flatten(), mask, "triton", "dW")


def test_masked_weights_by_triton_of_what_is_not_finite_to_a_few_roundings(triton):
    """|a| = threshold is kept, NaN too, and gives NaN; Inf is a mask of 1."""
    logits = torch.tensor([0.5, -0.5, 0.25, NAN, INF, -INF, 0.25], device=DEVICE)
    weight = torch.ones(7, device=DEVICE)
    for value in (0.5, NAN):
        segments = Segments([weight], logits, torch.tensor([value], device=DEVICE), [0, 7], logits)
        ours = output_and_gradients(run(triton, segments), segments.leaves, [weight])
        theirs = output_and_gradients(run(reference, segments), [t.double() for t in segments.leaves], [weight])
        for found, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=1e-12, equal_nan=True)


def test_masked_weights_by_triton_of_weights_and_logits_of_two_dtypes(triton):
    """As PyTorch promotes them; each gradient in its tensor's own dtype."""
    segments = of_shapes(torch.float16)
    wide = [w.float() for w in segments.weights]
    for weights, logits in ((segments.weights, segments.logits.float()), (wide, segments.logits)):
        mixed = segments._replace(weights=weights, logits=logits)
        found = output_and_gradients(run(triton, mixed), mixed.leaves, wide)
        assert [t.dtype for t in found] == [torch.float32] * len(weights) + [t.dtype for t in mixed.leaves]
        expected = output_and_gradients(run(reference, mixed), [t.double() for t in mixed.leaves], wide)
        for m, e in zip(found[: len(weights)], expected, strict=False):
            assert_close(m, e, "triton", "W * m")


def test_masked_weights_by_triton_of_no_weights(triton):
    logits, thresholds = torch.ones(3, device=DEVICE), torch.ones(1, device=DEVICE)
    assert triton.masked_weights([], logits, thresholds, [0, 0]) == []


def test_masked_weights_by_triton_serves_weights_of_one_dtype(triton):
    weights, logits, thresholds, offsets, _ = of_shapes(torch.float16)
    with launches() as launched:
        ops.masked_weights(weights, logits, thresholds, offsets, backend="triton")
    assert launched == ["_masked_weights"]
    weights[1] = weights[1].float()
    with pytest.raises(InputError, match="the weights differ in dtype"):
        ops.masked_weights(weights, logits, thresholds, offsets, backend="triton")
    assert "triton" in hmf.explain("masked_weights", weights[:1], logits, thresholds, offsets, backend="triton")
