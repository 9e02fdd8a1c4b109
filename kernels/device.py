"""Arithmetic of the mask inside Triton kernels: |tanh a|, the threshold, the derivative."""

import triton
import triton.language as tl


@triton.jit
def times8(value, KNOWN: tl.constexpr):
    """value, which the host knows to be a multiple of 8 if KNOWN; see `multiple`."""
    return multiple(value, 8 if KNOWN else 1)


@triton.jit
def multiple(value, OF: tl.constexpr):
    """value, which the host knows to be a multiple of OF, in a form that the compiler sees it too.

    Triton itself only tells multiples of 16 apart; a layer 1000 wide would else be loaded entry by entry."""
    if OF > 1:
        value = value // OF * OF
    return value


@triton.jit
def abs_tanh(a, APPROXIMATE: tl.constexpr):
    """|tanh a| in float32, to 6e-7 of itself; APPROXIMATE takes the hardware's tanh (2^-11, for bfloat16 weights)."""
    if APPROXIMATE:
        tanh = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [tl.abs(a)], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        t = tl.abs(a)
        # (1 - e) / (1 + e) cancels near 0, where the Taylor series is exact to float32.
        s = t * t
        series = t * (1.0 + s * (-0.33333334 + s * (0.13333334 + s * (-0.053968254 + s * 0.021869488))))
        e = tl.exp(-2.0 * t)
        tanh = tl.where(t < 0.25, series, (1.0 - e) / (1.0 + e))
    return tanh


@triton.jit
def mask_of(a, threshold, APPROXIMATE: tl.constexpr):
    """The semi-binary mask of float32 logits: |tanh a|, and 0 where |a| < threshold. NaN is kept."""
    return tl.where(tl.abs(a) < threshold, 0.0, abs_tanh(a, APPROXIMATE))


@triton.jit
def slope_of(a, threshold):
    """dm/da = sign(a) (1 - tanh(a)^2) on kept entries, written as 4e / (1 + e)^2, which does not cancel."""
    e = tl.exp(-2.0 * tl.abs(a))
    slope = 4.0 * e / ((1.0 + e) * (1.0 + e))
    signed = tl.where(a < 0, -slope, tl.where(a == 0, 0.0, slope))
    return tl.where(tl.abs(a) < threshold, 0.0, signed)


@triton.jit
def masked_tile(weight, logits, threshold, APPROXIMATE: tl.constexpr):
    """W * m of two loaded tiles, in float32."""
    return weight.to(tl.float32) * mask_of(logits.to(tl.float32), threshold, APPROXIMATE)


@triton.jit
def gradient_of_logits(gradient, weight, logits, threshold):
    """da = G W dm/da, exactly 0 on dropped entries whatever G is."""
    slope = slope_of(logits, threshold)
    return tl.where(slope == 0, 0.0, gradient * weight * slope)
