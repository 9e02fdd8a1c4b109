// The dense layer's two gradients by tensor cores, for many tasks, in float32's accuracy: each float is the sum of two
// that TF32 holds (11 and 11 bits), and of their four products the smallest, 2^-22 of the largest, is left out.
//
// Numbering rows, tasks and columns of fragments freely makes each thread's share of them lie together: it reads
// fragments by 8 or 16 bytes and its gradient is four packs of four columns, for whose step it has copied the moments.
#pragma once

#include "dense_step.h"

namespace hypermask {
namespace {

// Fragments of kCount floats as `high` + `low`. The lower 13 bits of an operand are ignored, so `low` needs no
// rounding. Infinity becomes NaN.
template <int kCount>
struct Halves {
  uint32_t high[kCount], low[kCount];

  __device__ __forceinline__ void set(int i, float x) {
    high[i] = (__float_as_uint(x) + 0x1000u) & 0xffffe000u;  // to nearest
    low[i] = __float_as_uint(x - __uint_as_float(high[i]));
  }
};

// A sum of 16 x 8 products, 4 of a thread: what is small is added up apart, for the tensor cores cut off what does not
// fit behind the larger summand.
struct Sum {
  float large[4] = {}, small[4] = {};

  __device__ __forceinline__ void add(const Halves<4>& a, const Halves<2>& b) {
    mma_tf32(small, a.low, b.high);
    mma_tf32(small, a.high, b.low);
    mma_tf32(large, a.high, b.high);
  }

  __device__ __forceinline__ float value(int i) const { return large[i] + small[i]; }
};

// Where this thread is in a fragment: a row or column of 8, and of the four threads that share it.
struct Lane32 {
  int warp = threadIdx.x / 32, row = threadIdx.x % 32 / 4, column = threadIdx.x % 4;
};

// Column n of a fragment b of two is column 2 n + b of a group of kTensorSide: columns 4 t to 4 t + 3 of row `half` are
// thread t's.
__device__ __forceinline__ Pack<4> columns_of(const Sum (&sums)[2], int half) {
  return {{sums[0].value(2 * half), sums[1].value(2 * half), sums[0].value(2 * half + 1), sums[1].value(2 * half + 1)}};
}

// sum[task][column] += sum_r g[r][task] W[r][column]. A unit is a block of tasks by a group of columns, 16 x 16. A warp
// has as many in a row as all others; the sums of the first kUnits stay in registers from tile to tile, those of
// others wait in this block's part of `partial`.
template <int kUnits>
struct TensorHiddenGradient {
  static constexpr int kHeld = 16;
  Pack<4> sum[kUnits > 0 ? kUnits : 1][2] = {};  // [unit][half]
  int first, count;

  __device__ explicit TensorHiddenGradient(const DenseLayout& l) {
    const int units = l.groups * l.blocks, each = (units + kThreads / 32 - 1) / (kThreads / 32);
    first = Lane32().warp * each;
    count = max(min(each, units - first), 0);
  }

  // f(half, where in [tasks, width]) for what this thread has of a unit.
  template <class F>
  static __device__ __forceinline__ void each(const Dense& d, int unit, const F& f) {
    const Lane32 lane;
    const int group = unit / d.layout.blocks, column = group * kTensorSide + 4 * lane.column;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int task = (unit - group * d.layout.blocks) * kTensorSide + lane.row + 8 * half;
      if (task < d.tasks && column < d.width) f(half, task * d.width + column);
    }
  }

  // W's fragments: kHeld rows of a group's columns. Rows 2 t and 2 t + 1 are thread t's: their factors lie
  // together.
  struct Weights {
    Halves<2> at[kHeld / 8][2];

    __device__ __forceinline__ void read(const DenseLayout& l, const Shared& s, int row, int group) {
      const Lane32 lane;
      const float* w = s.weight + (row + 2 * lane.column) * l.stride + group * kTensorSide + 2 * lane.row;
#pragma unroll
      for (int k = 0; k < kHeld / 8; ++k) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const Pack<2> columns = pack_at<2>(w + (8 * k + i) * l.stride);
          at[k][0].set(i, columns.x[0]);
          at[k][1].set(i, columns.x[1]);
        }
      }
    }
  };

  static __device__ __forceinline__ void add_unit(const DenseLayout& l, const Shared& s, const Weights& weights,
                                                  int row, int block, Pack<4> (&to)[2]) {
    const Lane32 lane;
    const float* g = s.factors + (block * kTensorSide + lane.row) * l.factor_stride + row + 2 * lane.column;
    Sum sums[2];
#pragma unroll
    for (int k = 0; k < kHeld / 8; ++k) {
      const Pack<2> upper = pack_at<2>(g + 8 * k), lower = pack_at<2>(g + 8 * l.factor_stride + 8 * k);
      Halves<4> a;
      a.set(0, upper.x[0]);
      a.set(1, lower.x[0]);
      a.set(2, upper.x[1]);
      a.set(3, lower.x[1]);
#pragma unroll
      for (int b = 0; b < 2; ++b) sums[b].add(a, weights.at[k][b]);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) multiply_add(to[half], 1.0f, columns_of(sums, half));
  }

  __device__ __forceinline__ void add_tile(const Dense& d, const Shared& s, bool first_tile, float* partial) {
    const DenseLayout& l = d.layout;
    for (int row = 0; row < l.rows; row += kHeld) {
      Weights weights;
      int held = -1;
      const auto add = [&](int unit, Pack<4>(&to)[2]) {
        const int group = unit / l.blocks;
        if (group != held) weights.read(l, s, row, group);
        held = group;
        add_unit(l, s, weights, row, unit - group * l.blocks, to);
      };
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        if (u < count) add(first + u, sum[u]);
      }
      for (int u = kUnits; u < count; ++u) {
        Pack<4> to[2] = {};
        if (!first_tile || row > 0) each(d, first + u, [&](int half, int at) { to[half] = pack_at<4>(partial + at); });
        add(first + u, to);
        each(d, first + u, [&](int half, int at) { pack_at<4>(partial + at) = to[half]; });
      }
    }
  }

  __device__ __forceinline__ void finish(const Dense& d, float*, float* partial) {
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      if (u < count) each(d, first + u, [&](int half, int at) { pack_at<4>(partial + at) = sum[u][half]; });
    }
  }
};

// As `Products`: a thread makes 8 factors of two rows each, on sm_100 of one, where two spill; they lie together by
// task, [tasks, factor_stride].
struct TensorCores {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  static constexpr int kRows = 1;
#else
  static constexpr int kRows = 2;
#endif
  static constexpr int kPack = 4, kChunk = 8;
  // What else a mode does takes registers, on some architectures more than on others: nothing may spill.
  template <Mode kMode>
  static constexpr int held_units() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ / 100 != 9
    constexpr int beside_adam = 0;
#else
    constexpr int beside_adam = 2;
#endif
    return kMode == kHidden ? 7 : kMode == kAdam ? beside_adam : 1;
  }
  template <Mode kMode>
  using HiddenGradient = TensorHiddenGradient<held_units<kMode>()>;

  static __device__ __forceinline__ void keep(const DenseLayout& l, float* factors, int r, int first,
                                              const float (&g)[kChunk]) {
#pragma unroll
    for (int j = 0; j < kChunk; ++j) factors[(first + j) * l.factor_stride + r] = g[j];
  }

  static __device__ __forceinline__ float factor(const DenseLayout& l, const float* factors, int r, int task) {
    return factors[task * l.factor_stride + r];
  }

  // f(first row, group) for this warp's units of a tile, kTensorRows x kTensorSide.
  template <class F>
  static __device__ __forceinline__ void for_units(const DenseLayout& l, const F& f) {
    const int units = l.rows / kTensorRows * l.groups;
    for (int unit = Lane32().warp; unit < units; unit += kThreads / 32) {
      const int block = unit / l.groups;
      f(block * kTensorRows, unit - block * l.groups);
    }
  }

  // This thread's packs of columns in any tile: f(row, step, column) for kDensePacks rows, `step` apart.
  template <class F>
  static __device__ __forceinline__ void for_packs(const DenseLayout& l, const F& f) {
    const Lane32 lane;
    for_units(l, [&](int row, int group) {
      const int column = group * kTensorSide + 4 * lane.column;
      if (column < 4 * l.packs) f(row + 4 * lane.row, 1, column);
    });
  }

  // dW = g^T h for the tile, written or given to Adam at once.
  template <Mode kMode, class Moment>
  static __device__ __forceinline__ void tile_weight(const Dense& d, const Tile& tile, const Shared& s,
                                                     const Step& step) {
    const DenseLayout& l = d.layout;
    const Lane32 lane;
    for_units(l, [&](int row, int group) {
#pragma unroll 1
      for (int half = 0; half < 2; ++half) {  // rows 4 n and 4 n + 1 of the unit, then 4 n + 2 and 4 n + 3
        Sum sums[2];                          // of every other column
        const float* g = s.factors + lane.column * l.factor_stride + row + 4 * lane.row + 2 * half;
        const float* h = s.hidden + lane.column * l.hidden_stride + group * kTensorSide + 2 * lane.row;
#pragma unroll 1
        for (int j = 0; j < l.slots; j += 8) {
          Halves<4> a;
          Halves<2> b[2];
#pragma unroll
          for (int i = 0; i < 2; ++i) {  // task j + lane.column, then the fourth behind it
            const Pack<2> rows = pack_at<2>(g + (j + 4 * i) * l.factor_stride);
            const Pack<2> columns = pack_at<2>(h + (j + 4 * i) * l.hidden_stride);
#pragma unroll
            for (int x = 0; x < 2; ++x) {
              a.set(2 * i + x, rows.x[x]);
              b[x].set(i, columns.x[x]);
            }
          }
#pragma unroll
          for (int x = 0; x < 2; ++x) sums[x].add(a, b[x]);
        }
        const int column = group * kTensorSide + 4 * lane.column;
        if (column >= d.width) continue;
        if constexpr (steps_weights(kMode))
          cp_async_wait<1>();  // m and v are here; W of the next tile may be on its way
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const auto piece = piece_of_row(d, tile, row + 4 * lane.row + 2 * half + n, column);
          update<kMode, Moment>(d, piece, s, columns_of(sums, n), step);
        }
      }
    });
  }
};

}  // namespace
}  // namespace hypermask
