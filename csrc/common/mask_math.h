// The semi-binary mask m = |tanh a| for |a| >= threshold, else 0, its derivative, and the key that thresholds are
// chosen by.
#pragma once

#include "portable.h"

namespace hypermask {

// Order-preserving key of |x|: |x| < |y| exactly when key(x) < key(y); every NaN ranks above Inf.
HM_INLINE uint32_t magnitude_key(float x) { return static_cast<uint32_t>(Lane<float>::bits(x) & kMagnitudeBits); }

HM_INLINE float magnitude_from_key(uint32_t key) { return Lane<float>::from_bits(static_cast<int32_t>(key)); }

// The key is selected digit by digit: 11 + 10 + 10 bits, the highest first.
constexpr int kRadixPasses = 3;
constexpr int kRadixBins = 2048;

HM_INLINE int radix_shift(int pass) { return 20 - 10 * pass; }
HM_INLINE uint32_t radix_digit(uint32_t key, int pass) {
  return (key >> radix_shift(pass)) & (pass == 0 ? 0x7ffu : 0x3ffu);
}
// All digits above the one of this pass; 0 in the first pass, where every entry takes part.
HM_INLINE uint32_t radix_prefix(uint32_t key, int pass) { return pass == 0 ? 0u : key >> (radix_shift(pass) + 10); }

// e^y for 0 <= y <= 87, relative error below 2 ulp (Cody and Waite's reduction, a polynomial of degree 7); for other y
// any number.
template <class F>
HM_INLINE F exp_positive(F y) {
  const F magic = Lane<F>::broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer
  const F shifted = y * 1.44269504088896341f + magic;
  const F n = shifted - magic;
  const F r = y - n * 0.693359375f + n * 2.12194440e-4f;
  F p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const F e = (p * r) * r + (r + 1.0f);
  const auto exponent = (Lane<F>::bits(shifted) - Lane<F>::bits(magic)) << 23;
  return Lane<F>::from_bits(Lane<F>::bits(e) + exponent);
}

// value = tanh x and slope = 1 - tanh(x)^2 for x >= 0 or NaN, each within 4 ulp; the slope keeps its relative accuracy
// where tanh is close to 1 (q (2 - q) with q = 1 - tanh x does not cancel), up to x = 43, where it is 2e-37, and is 0
// beyond, as at Inf.
template <class F>
HM_INLINE void tanh_and_slope(F x, F& value, F& slope) {
  const F z = x * x;
  F p = z * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const F small = p * z * x + x;
  const F q = Lane<F>::select(x > Lane<F>::broadcast(43.0f), Lane<F>::broadcast(0.0f),
                              2.0f / (exp_positive<F>(2.0f * x) + 1.0f));
  const auto is_large = x >= Lane<F>::broadcast(0.625f);  // false for NaN, which the polynomial passes on
  value = Lane<F>::select(is_large, 1.0f - q, small);
  slope = Lane<F>::select(is_large, q * (2.0f - q), 1.0f - small * small);
}

// An entry is dropped when |a| < threshold; so NaN logits are kept, and a NaN threshold keeps everything.
template <class F>
HM_INLINE F mask_value(F a, F threshold) {
  const F x = magnitude(a);
  F value, slope;
  tanh_and_slope(x, value, slope);
  return Lane<F>::select(x < threshold, Lane<F>::broadcast(0.0f), value);
}

// The mask, and the slope sign(a) (1 - tanh(a)^2) with its 0 at a = 0; for its use see logit_gradient.
template <class F>
HM_INLINE void mask_and_slope(F a, F threshold, F& mask, F& slope) {
  const F zero = Lane<F>::broadcast(0.0f);
  const F x = magnitude(a);
  F value, steep;
  tanh_and_slope(x, value, steep);
  mask = Lane<F>::select(x < threshold, zero, value);
  slope = Lane<F>::select(a < zero, -steep, Lane<F>::select(a == zero, zero, steep));
}

// dL/da of dL/dm = outer: exactly 0 on a dropped entry, also where outer is NaN or Inf and 0 * outer would be NaN.
template <class F>
HM_INLINE F logit_gradient(F a, F threshold, F slope, F outer) {
  return Lane<F>::select(magnitude(a) < threshold, Lane<F>::broadcast(0.0f), outer * slope);
}

}  // namespace hypermask
