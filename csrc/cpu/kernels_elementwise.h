// Kernels over flat arrays: masks, masked weights, weight drift, radix counts.
#pragma once

#include "../common/mask_math.h"
#include "simd.h"

namespace hypermask {
namespace {

void mask_forward(const float* logits, float threshold, float* mask, int64_t n) {
  const Vec limit = broadcast(threshold);
  for (int64_t i = 0; i < n; i += kLanes) {
    store_up_to(mask + i, mask_value(load_up_to(logits + i, n - i), limit), n - i);
  }
}

void mask_backward(const float* logits, float threshold, const float* grad, float* grad_logits, int64_t n) {
  const Vec limit = broadcast(threshold);
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec a = load_up_to(logits + i, n - i);
    Vec mask, slope;
    mask_and_slope(a, limit, mask, slope);
    store_up_to(grad_logits + i, logit_gradient(a, limit, slope, load_up_to(grad + i, n - i)), n - i);
  }
}

void weights_forward(const float* weight, const float* logits, float threshold, float* out, int64_t n) {
  const Vec limit = broadcast(threshold);
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec mask = mask_value(load_up_to(logits + i, n - i), limit);
    store_up_to(out + i, load_up_to(weight + i, n - i) * mask, n - i);
  }
}

void weights_backward(const float* weight, const float* logits, float threshold, const float* grad, float* grad_weight,
                      float* grad_logits, int64_t n) {
  const Vec limit = broadcast(threshold);
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec a = load_up_to(logits + i, n - i), g = load_up_to(grad + i, n - i);
    Vec mask, slope;
    mask_and_slope(a, limit, mask, slope);
    store_up_to(grad_weight + i, g * mask, n - i);
    store_up_to(grad_logits + i, logit_gradient(a, limit, slope, g * load_up_to(weight + i, n - i)), n - i);
  }
}

// Vectors are added in float over a short run only, runs in double. masked null: only the sum.
template <bool kMasked, int kNorm>
double drift_sum(const float* weight, const float* previous, const float* logits, float threshold, float* masked,
                 int64_t n) {
  constexpr int64_t kRun = 64 * kLanes;
  const Vec limit = broadcast(threshold);
  double total = 0;
  for (int64_t start = 0; start < n; start += kRun) {
    const int64_t end = start + kRun < n ? start + kRun : n;
    Vec sum{};
    for (int64_t i = start; i < end; i += kLanes) {
      const Vec w = load_up_to(weight + i, end - i);
      Vec x = w - load_up_to(previous + i, end - i);
      if (kMasked) {
        const Vec mask = mask_value(load_up_to(logits + i, end - i), limit);
        x = x * mask;
        if (masked) store_up_to(masked + i, w * mask, end - i);
      }
      sum = sum + (kNorm == 1 ? magnitude(x) : x * x);
    }
    total += sum_lanes(sum);
  }
  return total;
}

double drift_forward(const float* weight, const float* previous, const float* logits, float threshold, int norm,
                     float* masked, int64_t n) {
  const auto run = logits ? (norm == 1 ? drift_sum<true, 1> : drift_sum<true, 2>)
                          : (norm == 1 ? drift_sum<false, 1> : drift_sum<false, 2>);
  return run(weight, previous, logits, threshold, masked, n);
}

// sign(x), 0 for NaN, as PyTorch has it.
HM_INLINE Vec sign(Vec x) {
  const Vec zero{}, one = broadcast(1.0f);
  return Lane<Vec>::select(x > zero, one, Lane<Vec>::select(x < zero, -one, zero));
}

// grad null: of the drift alone.
template <bool kMasked, int kNorm>
void drift_gradient(const float* weight, const float* previous, const float* logits, float threshold, float scale,
                    const float* grad, float* grad_weight, float* grad_logits, int64_t n) {
  const Vec limit = broadcast(threshold);
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec w = load_up_to(weight + i, n - i), change = w - load_up_to(previous + i, n - i);
    Vec a{}, mask = broadcast(1.0f), slope{};
    if (kMasked) {
      a = load_up_to(logits + i, n - i);
      mask_and_slope(a, limit, mask, slope);
    }
    const Vec x = change * mask;
    const Vec outer = scale * (kNorm == 1 ? sign(x) : x);
    const Vec g = grad ? load_up_to(grad + i, n - i) : Vec{};
    store_up_to(grad_weight + i, (outer + g) * mask, n - i);
    if (!kMasked) continue;
    const Vec of_mask = grad ? outer * change + g * w : outer * change;  // 0 * w would be NaN where w is Inf
    store_up_to(grad_logits + i, logit_gradient(a, limit, slope, of_mask), n - i);
  }
}

void drift_backward(const float* weight, const float* previous, const float* logits, float threshold, int norm,
                    float scale, const float* grad, float* grad_weight, float* grad_logits, int64_t n) {
  const auto run = logits ? (norm == 1 ? drift_gradient<true, 1> : drift_gradient<true, 2>)
                          : (norm == 1 ? drift_gradient<false, 1> : drift_gradient<false, 2>);
  run(weight, previous, logits, threshold, scale, grad, grad_weight, grad_logits, n);
}

// Four tables in turn, so that equal digits in a row do not wait for each other's increment; 16 bits keep them in L1.
template <int kPass>
void radix_count_pass(const float* logits, int64_t n, uint32_t prefix, uint32_t* counts) {
  constexpr int kBins = kPass == 0 ? 2048 : 1024;
  alignas(64) uint16_t tables[4][kBins];
  std::memset(tables, 0, sizeof tables);
  int64_t i = 0;
  if constexpr (kPass == 0) {  // every entry counts: nothing for vectors to sort out
    for (; i + 8 <= n; i += 8) {
#pragma GCC unroll 8
      for (int k = 0; k < 8; ++k) ++tables[k % 4][magnitude_key(logits[i + k]) >> radix_shift(0)];
    }
  }
  for (; kPass > 0 && i + kLanes <= n; i += kLanes) {
    const IntVec keys = Lane<Vec>::bits(load(logits + i)) & kMagnitudeBits;
    const IntVec match = (keys >> (radix_shift(kPass) + 10)) == static_cast<int32_t>(prefix);
#if HM_LANES == 16
    uint32_t bits = _mm512_movepi32_mask((__m512i)match);
#elif HM_LANES == 8
    uint32_t bits = static_cast<uint32_t>(_mm256_movemask_ps((__m256)match));
#else
    uint32_t bits = 0;
    for (int k = 0; k < kLanes; ++k) bits |= (match[k] & 1u) << k;
#endif
    for (; bits; bits &= bits - 1) {
      const int k = __builtin_ctz(bits);
      ++tables[k % 4][radix_digit(magnitude_key(logits[i + k]), kPass)];
    }
  }
  for (; i < n; ++i) {
    const uint32_t key = magnitude_key(logits[i]);
    if (radix_prefix(key, kPass) == prefix) ++tables[0][radix_digit(key, kPass)];
  }
  for (int b = 0; b < kBins; ++b) counts[b] = tables[0][b] + tables[1][b] + tables[2][b] + tables[3][b];
}

void radix_count(const float* logits, int64_t n, int pass, uint32_t prefix, uint32_t* counts) {
  if (pass == 0) return radix_count_pass<0>(logits, n, prefix, counts);
  if (pass == 1) return radix_count_pass<1>(logits, n, prefix, counts);
  radix_count_pass<2>(logits, n, prefix, counts);
}

}  // namespace
}  // namespace hypermask
