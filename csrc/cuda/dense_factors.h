// The factors g of a tile of the dense layer: what each row's gradient has of each task's hidden vector.
#pragma once

#include "dense_tile.h"

namespace hypermask {
namespace {

// factors of row r = scales[j] times the given ones, for one row and a chunk of tasks per thread.
template <class Products>
__device__ __forceinline__ void scaled_factors(const Dense& d, const Tile& tile, const Shared& s) {
  constexpr int kChunk = Products::kChunk;
  const DenseLayout& l = d.layout;
  for (int i = threadIdx.x; i < l.rows * (l.slots / kChunk); i += kThreads) {
    const int chunk = i / l.rows, r = i - chunk * l.rows, first = chunk * kChunk;
    const int count = r < tile.rows ? min(kChunk, d.tasks - first) : 0;
    float g[kChunk] = {};
#pragma unroll
    for (int j = 0; j < kChunk; ++j) {
      if (j < count) g[j] = d.scales[first + j] * d.factors[(first + j) * d.rows + tile.row + r];
    }
    Products::keep(l, s.factors, r, first, g);
  }
}

// The current task's gradient at the rows whose factors this thread makes: read a tile ahead, for behind the first task
// there is no dot product during which it could arrive.
template <class Products>
struct CurrentRows {
  int units, p;  // rows p, p + units, ... of any tile; units or more: none of this thread's
  float grad[Products::kRows] = {}, next[Products::kRows] = {};

  // tile_factors deals rows of the chunk that holds the current task to kThreads threads in a row.
  __device__ __forceinline__ CurrentRows(const Dense& d, bool there) : units(d.layout.rows / Products::kRows) {
    const int before = d.drift_tasks / d.layout.chunk * units % kThreads;
    p = static_cast<int>((threadIdx.x + kThreads - before) % kThreads);
    if (!there || d.tasks == d.drift_tasks) p = units;
  }

  __device__ __forceinline__ void read(const Dense& d, const Tile& tile) {
#pragma unroll
    for (int x = 0; x < Products::kRows; ++x) {
      if (p < units && p + x * units < tile.rows) next[x] = d.grad_logits[tile.row + p + x * units];
    }
  }

  __device__ __forceinline__ void step() {
#pragma unroll
    for (int x = 0; x < Products::kRows; ++x) grad[x] = next[x];
  }
};

// sum[x][j] = W[p + x units] . h[j]. A dot product is one chain of multiply-adds over the columns: its bits depend
// neither on the mode nor on the other tasks, nor on what makes the gradients.
template <class Products>
__device__ __forceinline__ void dot_products(const Dense& d, const float* w, const float* h, int units,
                                             float (&sum)[Products::kRows][Products::kChunk]) {
  constexpr int kPack = Products::kPack, kChunk = Products::kChunk, kRows = Products::kRows;
  const DenseLayout& l = d.layout;
#pragma unroll(kPack == 4 ? 8 / kChunk : 4)
  for (int k = 0; k < d.width; k += kPack) {
    Pack<kPack> wk[kRows];
#pragma unroll
    for (int x = 0; x < kRows; ++x) wk[x] = pack_at<kPack>(w + x * units * l.stride + k);
#pragma unroll
    for (int j = 0; j < kChunk; ++j) {
      const Pack<kPack> hk = pack_at<kPack>(h + j * l.hidden_stride + k);
#pragma unroll
      for (int x = 0; x < kRows; ++x) {
#pragma unroll
        for (int i = 0; i < kPack; ++i) sum[x][j] = fmaf(wk[x].x[i], hk.x[i], sum[x][j]);
      }
    }
  }
}

// The factors dLoss/da_jr for kRows rows and a chunk of tasks per thread. Returns this thread's squared residuals.
template <class Products, Mode kMode>
__device__ __forceinline__ double tile_factors(const Dense& d, const Tile& tile, const Shared& s, float coefficient,
                                               const CurrentRows<Products>& given) {
  constexpr int kChunk = Products::kChunk, kRows = Products::kRows;
  const DenseLayout& l = d.layout;
  const int units = l.rows / kRows;
  double squares = 0;
  for (int i = threadIdx.x; i < units * (l.slots / kChunk); i += kThreads) {
    const int chunk = i / units, p = i - chunk * units, first = chunk * kChunk;
    const int drift = p < tile.rows ? min(kChunk, d.drift_tasks - first) : 0;
    float g[kRows][kChunk] = {}, target[kRows][kChunk], sum[kRows][kChunk] = {};
    if (drift > 0) {
      float bias[kRows];
#pragma unroll
      for (int x = 0; x < kRows; ++x) {
        const int64_t at = tile.row + p + x * units;
        const bool there = p + x * units < tile.rows;
        bias[x] = there ? d.bias[at] : 0.0f;
#pragma unroll
        for (int j = 0; j < kChunk; ++j) {
          target[x][j] = there && j < drift && first + j < d.target_tasks ? d.targets[(first + j) * d.rows + at] : 0.0f;
        }
      }
      dot_products<Products>(d, s.weight + p * l.stride, s.hidden + first * l.hidden_stride, units, sum);
#pragma unroll
      for (int x = 0; x < kRows; ++x) {
#pragma unroll
        for (int j = 0; j < kChunk; ++j) {
          if (j < drift && p + x * units < tile.rows) {
            const float residual = (sum[x][j] + bias[x]) - target[x][j];
            if (first + j < d.target_tasks) squares += static_cast<double>(residual) * residual;
            g[x][j] = coefficient * residual;
            if (kMode == kValue && d.logits) d.logits[(first + j) * d.rows + tile.row + p + x * units] = residual;
          }
        }
      }
    }
    if constexpr (kMode != kValue) {
      const int current = d.tasks > d.drift_tasks ? d.drift_tasks - first : -1;
#pragma unroll
      for (int x = 0; x < kRows; ++x) {
#pragma unroll
        for (int j = 0; j < kChunk; ++j) {
          if (j == current && p + x * units < tile.rows) g[x][j] = given.grad[x];
        }
        Products::keep(l, s.factors, p + x * units, first, g[x]);
      }
    }
  }
  return squares;
}

}  // namespace
}  // namespace hypermask
