// Stochastic rounding to bfloat16, by random bits that are a function of entry and step alone: the same on every
// backend, from any number of threads and processes. Defined in hypermask_fast/ops/rounding.py.
#pragma once

#include "portable.h"

namespace hypermask {

// The upper half of a float. Only its bits are ever worked on, so no device needs bfloat16 arithmetic.
struct Bfloat16 {
  uint16_t bits;
};

HM_INLINE float widened(Bfloat16 x) { return Lane<float>::from_bits(static_cast<int32_t>(uint32_t{x.bits} << 16)); }

HM_INLINE Bfloat16 upper_half(uint32_t bits) { return {static_cast<uint16_t>(bits >> 16)}; }

// The random numbers of one step over a layer: x = start + stride * entry modulo 2^32, the entry being a row times the
// width plus a column. Start and stride are mixed from the step, so that an entry's numbers are independent from step
// to step, and those of two entries in the same step are uncorrelated.
struct Draws {
  uint32_t start, stride;
};

#if defined(__CUDACC__)
#define HM_BOTH __host__ __device__ inline
#else
#define HM_BOTH static inline
#endif

// A permutation of the 32-bit integers in which every bit of x reaches every bit (lowbias32 by C. Wellons).
HM_BOTH uint32_t mixed(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ x >> 16;
}

// first_row: the layer's first row among those of all processes.
HM_BOTH Draws draws_of(double step, int64_t first_row, int64_t width) {
  const uint32_t number = 2 * static_cast<uint32_t>(static_cast<int64_t>(step)) + 0x9e3779b9u;
  const uint32_t stride = mixed(number + 1) | 1;
  return {mixed(number) + stride * static_cast<uint32_t>(first_row * width), stride};
}

#undef HM_BOTH

// Of a number x: 16 bits for the first moment, and 16 others for the second.
template <class F>
HM_INLINE typename Lane<F>::Unsigned first_bits(typename Lane<F>::Unsigned x) {
  return Lane<F>::both_halves(x);
}
template <class F>
HM_INLINE typename Lane<F>::Unsigned second_bits(typename Lane<F>::Unsigned x) {
  return x >> 16;
}

// From the largest bfloat16 on nothing is added: it would become Inf, Inf would become NaN, and NaN is to stay one
// (arithmetic makes only quiet ones, which the cut leaves as they are).
constexpr int32_t kCutFrom = 0x7f7f0000;

// x + random in its last 16 bits: the upper half of this is x rounded up or down, with a mean of x.
template <class F>
HM_INLINE typename Lane<F>::Unsigned rounded_first(F x, typename Lane<F>::Unsigned random) {
  using U = typename Lane<F>::Unsigned;
  const U bits = (U)Lane<F>::bits(x);
  return Lane<F>::add_below(bits, random, bits & 0x7fffffffu, kCutFrom);
}

// The same of what is never negative. What is not 0 does not become 0, because it is divided by.
template <class F>
HM_INLINE typename Lane<F>::Unsigned rounded_second(F x, typename Lane<F>::Unsigned random) {
  using U = typename Lane<F>::Unsigned;
  const U bits = (U)Lane<F>::bits(x);
  return Lane<F>::at_least(rounded_first(x, random), 0x10000u, bits);
}

}  // namespace hypermask
