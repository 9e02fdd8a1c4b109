"""semi_binary_mask: m = |tanh a| where |a| >= thr, else 0, and its slope."""

import pytest
import torch
from support.backends import CPU, NATIVE, on
from support.comparing import (
    DEVICE,
    DTYPES,
    INF,
    NAN,
    assert_matches,
    check,
    exact_threshold,
    in_half,
    launches,
    output_and_gradients,
    randn,
)
from support.refusals import assert_kernel_refuses, assert_refused, changed, each_change, whoever_is_asked
from support.segments import SPECIAL, special_logits
from support.tolerances import assert_close
from torch.autograd import gradcheck

from hypermask_fast import InputError, ops
from hypermask_fast.ops import reference


def masked(threshold):
    return lambda module, a: module.semi_binary_mask(a, threshold.to(a))


# The definition


def logits_of(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_semi_binary_mask_definition_keeps_all_ties():
    logits = torch.tensor([1.0, -1.0, 1.0, 0.5])
    threshold = reference.mask_thresholds(logits, [0, 4], torch.tensor([2]))[0]
    assert (reference.semi_binary_mask(logits, threshold) > 0).tolist() == [True, True, True, False]


def test_semi_binary_mask_definition_gradient():
    logits = logits_of(5, 7).requires_grad_()
    threshold = logits.detach().abs().median() + 1e-3
    assert gradcheck(lambda a: reference.semi_binary_mask(a, threshold), logits)
    mask = reference.semi_binary_mask(logits, threshold)
    (gradient,) = torch.autograd.grad(mask.sum(), logits)
    assert torch.equal(gradient == 0, mask == 0)


# Every backend


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # in Triton's interpreter
@pytest.mark.parametrize("size", [0, 1, 63, 255, 1000, 1023, 3000, 4096, 7919, 40_961, 70_003])
@pytest.mark.parametrize("threshold", [0.4, 0.0, NAN, INF])
def test_semi_binary_mask_matches_the_definition(backend, size, threshold):
    check(backend, masked(torch.tensor(threshold)), [special_logits(size)], "elementwise", "slope")


@pytest.mark.parametrize(
    ("shape", "threshold_shape"),
    [
        ((), ()),
        ((3, 700), (3, 1)),
        ((2, 5), (2, 5)),
        ((3, 7, 1), (3, 1, 1)),
        ((3, 7, 5), (3, 1, 1)),
        ((60, 7, 8), (60, 1, 1)),  # more rows than the emulated GPU's blocks that run at a time
        ((3, 7, 300), (3, 1, 1)),
    ],
)
def test_semi_binary_mask_takes_a_threshold_per_row(backend, shape, threshold_shape):
    threshold = torch.rand(threshold_shape)
    check(backend, masked(threshold), [torch.randn(shape)], "elementwise", "slope")


def test_semi_binary_mask_takes_strided_logits(backend):
    a = torch.randn(70, 3, 5).transpose(0, 1)
    check(backend, masked(torch.tensor([0.1, 0.5, 2.0]).view(3, 1, 1)), [a], "elementwise", "slope")
    strided = torch.randn(6, 8).t()
    check(backend, masked(exact_threshold(strided)), [strided], "elementwise", "slope")


def test_semi_binary_mask_keeps_and_shows_nan(backend):
    """NaN is kept, shows, and has the only gradients that are NaN; a NaN threshold drops nothing."""
    a = torch.tensor([NAN, -NAN, INF, -INF, 1.0, 0.1] * 5, device=backend.device, requires_grad=True)
    mask = backend.semi_binary_mask(a, torch.tensor(0.5, device=backend.device))
    expected = reference.semi_binary_mask(a.double(), torch.tensor(0.5, device=backend.device).double())
    assert_close(mask, expected, backend.kind("elementwise"))
    mask.sum().backward()
    assert torch.equal(a.grad.isnan(), a.detach().isnan())
    assert (a.grad[5::6] == 0).all()
    everything = backend.semi_binary_mask(a.detach(), torch.tensor(NAN, device=backend.device))
    assert torch.equal((everything == 0).cpu(), torch.zeros(30, dtype=torch.bool))


def test_semi_binary_mask_keeps_what_equals_the_threshold(backend):
    logits = torch.tensor([0.5, -0.5, 0.25, NAN, 0.0, -3.0], device=backend.device)
    mask = backend.semi_binary_mask(logits, torch.tensor(0.5, device=backend.device))
    assert (mask != 0).tolist() == [True, True, False, True, False, True] and mask[3].isnan()
    assert backend.semi_binary_mask(logits, torch.tensor(NAN, device=backend.device))[2] != 0


@on(*CPU)
def test_semi_binary_mask_on_the_cpu_is_accurate_everywhere(backend):
    """Also where 1 - tanh^2 cancels."""
    finite = [value for value in SPECIAL if abs(value) < INF]
    a = torch.cat([torch.tensor(finite), torch.logspace(-8, 1.2, 200_000), -torch.linspace(0.5, 1.0, 100_000)])
    a.requires_grad_()
    mask = backend.semi_binary_mask(a, torch.tensor(0.0))
    mask.sum().backward()
    x = a.detach().double()
    assert_close(mask, x.tanh().abs(), "elementwise", "mask")
    slope = x.sign() / x.cosh().square()  # 1 - tanh^2 cancels, this does not
    kept = x.abs() < 40
    assert_close(a.grad[kept], slope[kept], "elementwise", "slope")


@on("triton", *NATIVE)
def test_semi_binary_mask_slope_near_a_mask_of_one_does_not_cancel(backend):
    """1 - tanh^2 of a large logit is tiny, not 0: the textbook formula loses it in float32."""
    logits = torch.tensor([8.0, -12.0], device=backend.device, requires_grad=True)
    backend.semi_binary_mask(logits, torch.zeros((), device=backend.device)).sum().backward()
    expected = logits.detach().double().cosh() ** -2 * logits.detach().sign()
    torch.testing.assert_close(logits.grad.double(), expected, rtol=3e-6, atol=0)


# Triton alone: half precision, thresholds of any shape that broadcasts, mask and slope in one launch

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
def test_semi_binary_mask_by_triton_and_its_slope_in_every_dtype(triton, shape, threshold_shape, dtype):
    logits, threshold = randn(*shape, dtype=dtype), randn(*threshold_shape, dtype=dtype).abs()
    assert_matches(
        lambda a: triton.semi_binary_mask(a, threshold),
        lambda a: reference.semi_binary_mask(a, threshold.double()),
        (logits,),
        dtype,
    )
    mask, slope = triton.semi_binary_mask_with_slope(logits, threshold)

    def with_slope(a):
        return output_and_gradients(lambda a: reference.semi_binary_mask(a, threshold), [a], torch.ones_like(a))

    peers = in_half(dtype, with_slope, logits)
    for name, ours, expected, peer in zip(
        ("mask", "slope"), (mask, slope), with_slope(logits.double()), peers, strict=False
    ):
        assert_close(ours, expected, "triton", name, peer=peer)


def test_semi_binary_mask_by_triton_slope_beside_the_mask_does_not_cancel(triton):
    logits = torch.tensor([8.0, -12.0], device=DEVICE)
    _, slope = triton.semi_binary_mask_with_slope(logits, torch.zeros((), device=DEVICE))
    expected = logits.double().cosh() ** -2 * logits.sign()
    torch.testing.assert_close(slope.double(), expected, rtol=3e-6, atol=0)


def test_semi_binary_mask_by_triton_launches_one_kernel_each_way(triton):
    logits, threshold = randn(3, 70).requires_grad_(), torch.full((3, 1), 0.4, device=DEVICE)
    with launches() as forward:
        mask = triton.semi_binary_mask(logits, threshold)
        triton.semi_binary_mask_with_slope(logits.detach(), threshold)
    assert forward == ["_mask", "_mask"]
    with launches() as backward:
        mask.sum().backward()
    assert backward == ["_mask"]


# Bad input

does_not_fit = each_change(
    (
        {"logits": torch.ones(3, 4), "threshold": torch.ones(3)},
        "threshold of (3,) does not broadcast to logits of (3, 4)",
    ),
    (
        {"logits": torch.ones(4), "threshold": torch.ones(3, 4)},
        "threshold of (3, 4) does not broadcast to logits of (4,)",
    ),
)


@whoever_is_asked
@does_not_fit
def test_semi_binary_mask_refuses_what_does_not_fit(asked, change, message):
    assert_refused("semi_binary_mask", asked, change, message)


@does_not_fit
def test_semi_binary_mask_by_triton_called_directly_refuses_in_the_same_words(triton, change, message):
    assert_kernel_refuses(triton, "semi_binary_mask", change, message)


def test_semi_binary_mask_by_triton_refuses_float64(triton):
    wide = changed("semi_binary_mask", {"logits": torch.ones(18).double()})
    with pytest.raises(InputError, match="float64"):
        ops.semi_binary_mask(**wide, backend="triton")
    with pytest.raises(InputError, match="float64"):
        triton.semi_binary_mask(**wide)
