// Adam on a tile of the dense layer, by pieces that one thread has: the gradient made, given to Adam at once or
// written.
#pragma once

#include "../common/adam.h"
#include "dense_tile.h"

namespace hypermask {
namespace {

// Adam's numbers in a step: those of all entries, and those that moments in bfloat16 are rounded by.
struct Step {
  AdamStep adam;
  Draws draws;
};

// The moments of a piece of the tile: where they are, in shared memory and in the layer, and their step.
template <class Moment>
struct Moments;

template <>
struct Moments<float> {
  float *m, *v, *to_m, *to_v;

  __device__ Moments(const Dense& d, const Shared& s) : m(s.m), v(s.v), to_m(d.weight_m), to_v(d.weight_v) {}

  template <int kSize>
  __device__ __forceinline__ void step(const Piece<kSize>& piece, const Pack<kSize>& grad, Pack<kSize>& w,
                                       const Step& step) const {
    Pack<kSize> first = pack_at<kSize>(m + piece.shared), second = pack_at<kSize>(v + piece.shared);
#pragma unroll
    for (int x = 0; x < kSize; ++x) adam_update(grad.x[x], w.x[x], first.x[x], second.x[x], step.adam);
    pack_at<kSize>(to_m + piece.where) = first;
    pack_at<kSize>(to_v + piece.where) = second;
  }
};

template <>
struct Moments<Bfloat16> {
  Bfloat16 *m, *v, *to_m, *to_v;

  __device__ Moments(const Dense& d, const Shared& s)
      : m(reinterpret_cast<Bfloat16*>(s.m)),
        v(reinterpret_cast<Bfloat16*>(s.v)),
        to_m(d.rounded_m),
        to_v(d.rounded_v) {}

  template <int kSize>
  __device__ __forceinline__ void step(const Piece<kSize>& piece, const Pack<kSize>& grad, Pack<kSize>& w,
                                       const Step& step) const {
    Entries<Bfloat16, kSize> first = entries_at<kSize>(m + piece.shared), second = entries_at<kSize>(v + piece.shared);
    const uint32_t start = step.draws.start + step.draws.stride * static_cast<uint32_t>(piece.where);
#pragma unroll
    for (int x = 0; x < kSize; ++x) {
      float fm = widened(first.x[x]), fv = widened(second.x[x]);
      adam_update(grad.x[x], w.x[x], fm, fv, step.adam);
      const uint32_t draw = start + step.draws.stride * static_cast<uint32_t>(x);
      first.x[x] = upper_half(rounded_first(fm, first_bits<float>(draw)));
      second.x[x] = upper_half(rounded_second(fv, second_bits<float>(draw)));
    }
    entries_at<kSize>(to_m + piece.where) = first;
    entries_at<kSize>(to_v + piece.where) = second;
  }
};

// Adam on a piece of the tile with its gradient, or the gradient written.
template <Mode kMode, class Moment, int kSize>
__device__ __forceinline__ void update(const Dense& d, const Piece<kSize>& piece, const Shared& s,
                                       const Pack<kSize>& grad, const Step& step) {
  if (!piece.there) return;
  if constexpr (steps_weights(kMode)) {
    Pack<kSize> w = pack_at<kSize>(s.weight + piece.shared);
    Moments<Moment>(d, s).step(piece, grad, w, step);
    pack_at<kSize>(d.weight + piece.where) = w;
  } else {
    pack_at<kSize>(d.grad_weight + piece.where) = grad;
  }
}

// db[r] = sum_j of row r's factors, likewise: a thread per row, which reads its bias and moments ahead.
template <class Products, Mode kMode>
struct BiasRow {
  float bias = 0, m = 0, v = 0;

  __device__ __forceinline__ BiasRow(const Dense& d, const Tile& tile) {
    if constexpr (kMode == kAdam) {
      const int r = threadIdx.x;
      if (r >= tile.rows) return;
      bias = d.bias[tile.row + r];
      m = d.bias_m[tile.row + r];
      v = d.bias_v[tile.row + r];
    }
  }

  __device__ __forceinline__ void update(const Dense& d, const Tile& tile, const float* factors, const AdamStep& step) {
    const int r = threadIdx.x;
    if (r >= tile.rows) return;
    float grad = 0;
    for (int j = 0; j < d.tasks; ++j) grad += Products::factor(d.layout, factors, r, j);
    if constexpr (kMode == kAdam) {
      adam_update(grad, bias, m, v, step);
      d.bias[tile.row + r] = bias;
      d.bias_m[tile.row + r] = m;
      d.bias_v[tile.row + r] = v;
    } else {
      d.grad_bias[tile.row + r] = grad;
    }
  }
};

}  // namespace
}  // namespace hypermask
