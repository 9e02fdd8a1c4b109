"""semi_binary_mask, masked weights and weight drift on the cpu backend against the float64 reference."""

import pytest
import torch
from tolerances import assert_close

from hypermask_fast.ops import reference

pytestmark = pytest.mark.native

SIZES = (1, 63, 1000, 7919, 40961)
SPECIAL = [0.0, -0.0, 1e-45, -1e-45, 1e-40, 3e-39, 0.3, -0.3, 0.6249999, 0.625, 9.0, 20.0, -88.0, 3e38]


def double(x):
    """A float64 copy with gradient of its own."""
    return x.detach().double().requires_grad_(x.requires_grad)


def random_logits(size, grad=True):
    a = torch.randn(size) * torch.randn(size).exp()
    return a.requires_grad_(grad)


@pytest.mark.parametrize("size", SIZES)
def test_mask_and_gradient(cpu, isa, size):
    a = random_logits(size)
    threshold = torch.tensor(0.4)
    outer = torch.randn(size)
    mask = cpu.semi_binary_mask(a, threshold)
    mask.backward(outer)
    a64 = double(a)
    expected = reference.semi_binary_mask(a64, threshold.double())
    expected.backward(outer.double())
    assert_close(mask, expected, "elementwise", "mask")
    assert_close(a.grad, a64.grad, "slope", "gradient")


def test_mask_is_accurate_everywhere(cpu, isa):
    a = torch.cat([torch.tensor(SPECIAL), torch.logspace(-8, 1.2, 200_000), -torch.linspace(0.5, 1.0, 100_000)])
    a.requires_grad_()
    mask = cpu.semi_binary_mask(a, torch.tensor(0.0))
    mask.sum().backward()
    x = a.detach().double()
    assert_close(mask, x.tanh().abs(), "elementwise", "mask")
    slope = x.sign() / x.cosh().square()  # 1 - tanh^2 cancels, this does not
    kept = x.abs() < 40
    assert_close(a.grad[kept], slope[kept], "elementwise", "slope")


def test_mask_of_nan_and_inf(cpu, isa):
    nan, inf = float("nan"), float("inf")
    a = torch.tensor([nan, -nan, inf, -inf, 1.0, 0.1] * 5, requires_grad=True)
    mask = cpu.semi_binary_mask(a, torch.tensor(0.5))
    assert_close(mask, reference.semi_binary_mask(a.double(), torch.tensor(0.5).double()), "elementwise")
    mask.sum().backward()
    assert torch.equal(a.grad.isnan(), a.detach().isnan())
    assert (a.grad[5::6] == 0).all()
    everything = cpu.semi_binary_mask(a.detach(), torch.tensor(nan))
    assert torch.equal(everything == 0, torch.zeros(30, dtype=torch.bool))


def test_mask_threshold_per_row_and_strides(cpu, isa):
    a = torch.randn(70, 3, 5).transpose(0, 1)  # not contiguous
    threshold = torch.tensor([0.1, 0.5, 2.0]).view(3, 1, 1)
    assert_close(cpu.semi_binary_mask(a, threshold), reference.semi_binary_mask(a.double(), threshold), "elementwise")
    assert cpu.semi_binary_mask(torch.empty(0), torch.tensor(0.5)).shape == (0,)


def layers(grad=True):
    """Weights of odd shapes, one of them strided and one of a single entry, with logits that go on behind them."""
    weights = [torch.randn(30, 7), torch.randn(5, 300).t(), torch.randn(1), torch.randn(17, 3, 3, 3)]
    weights = [w.requires_grad_(grad) for w in (*weights, torch.randn(20000))]
    offsets = [0]
    for w in weights:
        offsets.append(offsets[-1] + w.numel())
    offsets.append(offsets[-1] + 11)
    logits = random_logits(offsets[-1], grad)
    return weights, logits, torch.tensor([0.2, 0.0, 0.1, 3.0, 0.7, 0.0]), offsets


def test_masked_weights(cpu, isa):
    weights, logits, thresholds, offsets = layers()
    masked = cpu.masked_weights(weights, logits, thresholds, offsets)
    w64, a64 = [double(w.contiguous()) for w in weights], double(logits)
    expected = reference.masked_weights(w64, a64, thresholds.double(), offsets)
    outers = [torch.randn(w.shape) for w in weights]
    torch.autograd.backward(masked, outers)
    w64 = [w.retain_grad() or w for w in w64]
    torch.autograd.backward(expected, [o.double() for o in outers])
    for s, (m, e, w, w2) in enumerate(zip(masked, expected, weights, w64, strict=True)):
        assert_close(m, e, "elementwise", f"weight {s}")
        assert_close(w.grad, w2.grad, "slope", f"gradient {s}")
    assert_close(logits.grad, a64.grad, "slope", "gradient of logits")
    assert (logits.grad[offsets[-2] :] == 0).all()


def test_masked_weights_some_outputs_unused(cpu):
    weights, logits, thresholds, offsets = layers()
    cpu.masked_weights(weights, logits, thresholds, offsets)[0].sum().backward()
    assert (logits.grad[offsets[1] :] == 0).all() and logits.grad[: offsets[1]].abs().sum() > 0


@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("masked", [True, False])
def test_weight_drift(cpu, isa, norm, masked):
    weights, logits, thresholds, offsets = layers()
    previous = torch.randn(offsets[-1])
    previous[offsets[2] : offsets[3]] = weights[2].detach()  # a segment that did not move: the 2-norm's corner
    extra = (logits, thresholds) if masked else (None, None)
    drift = cpu.weight_drift(weights, previous, offsets, norm, *extra)
    (drift * 0.7).backward()
    w64, a64 = [double(w) for w in weights], double(logits)
    extra64 = (a64, thresholds.double()) if masked else (None, None)
    expected = reference.weight_drift([w.contiguous() for w in w64], previous.double(), offsets, norm, *extra64)
    (expected * 0.7).backward()
    assert_close(drift, expected, "sum", "drift")
    for s, (w, w2) in enumerate(zip(weights, w64, strict=True)):
        assert_close(w.grad, w2.grad, "sum", f"gradient {s}")
    if masked:
        assert_close(logits.grad, a64.grad, "sum", "gradient of logits")


def masked_weights_drift(module, dtype, norm, loss):
    """Results and gradients of `loss(masked, drift)` from the same values, in one backend and dtype."""
    torch.manual_seed(1)
    weights, logits, thresholds, offsets = layers()
    previous = torch.randn(offsets[-1])
    previous[offsets[2] : offsets[3]] = weights[2].detach().flatten()  # the 2-norm's corner
    outers = [torch.randn(w.shape).to(dtype) for w in weights]
    leaves = [t.detach().to(dtype).requires_grad_() for t in (*weights, logits)]
    arguments = leaves[:-1], leaves[-1], thresholds.to(dtype), offsets, previous.to(dtype), norm
    masked, drift = module.masked_weights_drift(*arguments)
    loss(masked, drift, outers).backward()
    return [*masked, drift, *(leaf.grad for leaf in leaves)]


LOSSES = {
    "both": lambda masked, drift, outers: sum((m * o).sum() for m, o in zip(masked, outers, strict=True)) + 0.7 * drift,
    "some weights": lambda masked, drift, outers: (masked[0] * outers[0]).sum() + 0.7 * drift,
    "no drift": lambda masked, drift, outers: sum((m * o).sum() for m, o in zip(masked, outers, strict=True)),
    "drift alone": lambda masked, drift, outers: 0.7 * drift,
}


@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("loss", LOSSES)
def test_masked_weights_drift(cpu, isa, norm, loss):
    actual = masked_weights_drift(cpu, torch.float32, norm, LOSSES[loss])
    expected = masked_weights_drift(reference, torch.float64, norm, LOSSES[loss])
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert_close(a, torch.zeros_like(a).double() if e is None else e, "sum", f"result {i}")
