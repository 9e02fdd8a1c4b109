// Adam on a run of a layer's entries whose gradient is at hand.
#pragma once

#include "tiles.h"

namespace hypermask {
namespace {

constexpr int kStepVectors = 2;

// What becomes of a gradient where it is made: written, or Adam on the entry at once. `at` counts from the layer's
// first entry, or the buffer's.
struct WriteGradient {
  float* grad;
  HM_INLINE void take(WriteGradient to, Vec grad, int64_t at, int64_t count) { store_up_to(to.grad + at, grad, count); }
};

// By value, so that the compiler need not fear that a store changes a pointer or a constant.
template <class Moment>
struct StepAdam {
  float* w;
  Moment *m, *v;
  AdamStep step;
  Draws draws;  // that moments in bfloat16 are rounded by
  AheadOfStep ahead;

  HM_INLINE void take(StepAdam to, Vec grad, int64_t at, int64_t count) {
    take_several<false>(to, Several<Vec, 1>{{grad}}, at, count);
  }

  // kCount vectors from entry `at` on, of the last one `last` entries. Side by side: one vector's root and quotient
  // take so long that the processor's queues would be full of what waits for them.
  template <bool kL1, int kCount>
  HM_INLINE void take_several(StepAdam to, Several<Vec, kCount> g, int64_t at, int64_t last) {
    using Vecs = Several<Vec, kCount>;
    float* w = to.w + at;
    Moment *m = to.m + at, *v = to.v + at;
    constexpr int kMomentLine = 64 / sizeof(Moment);
    HM_EACH(i, kCount) ask<kL1>(w + to.ahead.weight + i * kLanes);
    for (int i = 0; i < kCount * kLanes; i += kMomentLine) {
      ask<kL1>(m + to.ahead.moments + i);
      ask<kL1>(v + to.ahead.moments + i);
    }
    const auto in = [&](int i) HM_LAMBDA { return i < kCount - 1 ? int64_t{kLanes} : last; };
    Vecs wi, mi, vi;
    HM_EACH(i, kCount) mi.part[i] = load_up_to(m + i * kLanes, in(i));
    HM_EACH(i, kCount) vi.part[i] = load_up_to(v + i * kLanes, in(i));
    HM_EACH(i, kCount) wi.part[i] = load_up_to(w + i * kLanes, in(i));
    adam_update(g, wi, mi, vi, to.step);
    HM_EACH(i, kCount) store_up_to(w + i * kLanes, wi.part[i], in(i));
    if constexpr (sizeof(Moment) == 4) {
      HM_EACH(i, kCount) store_up_to(m + i * kLanes, mi.part[i], in(i));
      HM_EACH(i, kCount) store_up_to(v + i * kLanes, vi.part[i], in(i));
    } else {
      const Draws& d = to.draws;
      UnsignedVec x = kLaneNumbers * d.stride + (d.start + d.stride * static_cast<uint32_t>(at));
      HM_EACH(i, kCount) {
        store_up_to(m + i * kLanes, v + i * kLanes, rounded_first(mi.part[i], first_bits<Vec>(x)),
                    rounded_second(vi.part[i], second_bits<Vec>(x)), in(i));
        x += d.stride * static_cast<uint32_t>(kLanes);
      }
    }
  }

  template <bool kL1>
  static __attribute__((noinline)) void all(StepAdam to, const float* grad, int64_t at, int64_t count) {
    constexpr int kCount = kStepVectors, kEntries = kCount * kLanes;
    int64_t i = 0;
    for (; i + kEntries <= count; i += kEntries) {
      Several<Vec, kCount> g;
      HM_EACH(k, kCount) g.part[k] = load(grad + i + k * kLanes);
      take_several<kL1>(to, g, at + i, kLanes);
    }
    for (; i < count; i += kLanes) {
      take_several<kL1>(to, Several<Vec, 1>{{load_up_to(grad + i, count - i)}}, at + i, count - i);
    }
  }
};

template <class Moment>
HM_INLINE void step_all(const StepAdam<Moment>& to, const float* grad, int64_t at, int64_t count, bool near) {
  near ? StepAdam<Moment>::template all<true>(to, grad, at, count)
       : StepAdam<Moment>::template all<false>(to, grad, at, count);
}

// Steps `count` entries of the layer's weight from entry `at` on.
HM_INLINE void step_weight(const DenseLayer& d, const float* grad, int64_t at, int64_t count, AheadOfStep ahead,
                           bool near) {
  if (d.rounded_m) {
    const StepAdam<Bfloat16> step{d.weight_out, d.rounded_m, d.rounded_v, d.adam, d.draws, ahead};
    step_all(step, grad, at, count, near);
  } else {
    step_all(StepAdam<float>{d.weight_out, d.weight_m, d.weight_v, d.adam, {}, ahead}, grad, at, count, near);
  }
}

HM_INLINE void step_bias(const DenseLayer& d, const float* grad, int64_t row, int rows) {
  const StepAdam<float> step{d.bias_out, d.bias_m, d.bias_v, d.adam, {}, {}};
  for (int r = 0; r < rows; r += kLanes) {
    StepAdam<float>::take(step, load_up_to(grad + r, rows - r), row + r, rows - r);
  }
}

}  // namespace
}  // namespace hypermask
