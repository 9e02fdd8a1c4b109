// What the dense kernel works on: its arguments, the tiles of the layer and their places in shared memory.
#pragma once

#include "../common/rounding.h"
#include "device.h"

namespace hypermask {
namespace {

// kHidden and kStep are the two halves of kAdam, with factors that were kept.
enum Mode { kValue, kGradient, kAdam, kHidden, kStep };

constexpr bool given_factors(Mode mode) { return mode == kHidden || mode == kStep; }
constexpr bool sums_hidden(Mode mode) { return mode == kGradient || mode == kAdam || mode == kHidden; }
constexpr bool makes_weights(Mode mode) { return mode == kGradient || mode == kAdam || mode == kStep; }
constexpr bool steps_weights(Mode mode) { return mode == kAdam || mode == kStep; }

struct Dense {
  DenseLayout layout;
  int64_t rows;
  int width, drift_tasks, tasks;  // tasks: drift_tasks, plus one for the current task
  int target_tasks;               // the first drift tasks, which have targets
  float* weight;                  // written where it is stepped only
  float* bias;
  const float* hidden;       // [tasks, width], or null where only its gradient is asked for
  const float* targets;      // [target_tasks, rows]
  const float* factors;      // [tasks, rows]: times scales the factors, where they are given
  const float* scales;       // [tasks]
  float* logits;             // [drift_tasks, rows]: in value mode where the residuals go, or null
  const float* grad_logits;  // [rows] or null
  const float* outer;        // one entry: dLoss/dR; null where residuals are not factors
  float *grad_weight, *grad_bias;
  float *weight_m, *weight_v, *bias_m, *bias_v;
  Bfloat16 *rounded_m, *rounded_v;  // in place of weight_m and weight_v: moments in bfloat16, or null
  int64_t first_row;                // of the layer among those of all processes, for the draws that these need
  const float *step, *lr;           // read on the device, so that a captured step sees them change
  double beta1, beta2, eps, weight_decay;
  bool decoupled, maximize;
  float* partial;         // [blocks, tasks, width]
  double* partial_drift;  // [blocks]
};

// sum += a x
template <int kPack>
__device__ __forceinline__ void multiply_add(Pack<kPack>& sum, float a, const Pack<kPack>& x) {
#pragma unroll
  for (int i = 0; i < kPack; ++i) sum.x[i] = fmaf(a, x.x[i], sum.x[i]);
}

struct Shared {
  float *weight, *next_weight;  // [rows, stride]: the tile being worked on and the next one
  float* hidden;                // [slots, hidden_stride], 0 beyond the tasks
  float* factors;               // as the products have them
  float *m, *v;                 // [rows, stride], in modes that step weights; bfloat16 ones take half of the place
  float* grad;                  // [rows, stride], with packs of single floats in modes that make weights

  __device__ Shared(const DenseLayout& l, Mode mode) {
    const int tile = l.rows * l.stride;
    weight = dynamic_shared<float>();
    next_weight = weight + tile;
    hidden = next_weight + tile;
    factors = hidden + l.slots * l.hidden_stride;
    m = factors + l.factor_floats;
    v = m + tile;
    grad = steps_weights(mode) ? v + tile : m;
  }
};

struct Tile {
  int64_t row;  // of the layer
  int rows;     // that there are: fewer in the last tile, none or a negative number behind it

  __device__ Tile(const Dense& d, int64_t row)
      : row(row), rows(static_cast<int>(max(min(static_cast<int64_t>(d.layout.rows), d.rows - row), int64_t{-1}))) {}
};

// Entries of weights or moments that are read and written together.
template <class T, int kSize>
struct alignas(sizeof(T) * kSize) Entries {
  T x[kSize];
};

template <int kSize, class T>
__device__ __forceinline__ Entries<T, kSize>& entries_at(T* p) {
  return *reinterpret_cast<Entries<T, kSize>*>(p);
}

// A piece of a tile that one thread copies and updates; each tile's pieces are dealt to threads in the same way.
template <int kSize>
struct Piece {
  static constexpr int size = kSize;  // floats
  int shared;                         // offset in the tile in shared memory
  int64_t where;                      // in the layer
  bool there;

  // From global to shared memory; zeros where the layer has ended. A single bfloat16 is too small for a copy in the
  // background.
  template <class T>
  __device__ __forceinline__ void copy(T* to, const T* from) const {
    constexpr int bytes = kSize * static_cast<int>(sizeof(T));
    if (!there) {
      entries_at<kSize>(to + shared) = Entries<T, kSize>{};
    } else if constexpr (bytes >= 4) {
      cp_async<bytes>(to + shared, from + where);
    } else {
      to[shared] = from[where];
    }
  }
};

// Piece of 4 floats at a row and column.
__device__ __forceinline__ Piece<4> piece_of_row(const Dense& d, const Tile& tile, int r, int column) {
  return {r * d.layout.stride + column, (tile.row + r) * d.width + column, r < tile.rows};
}

// f(offset, size) for this thread's pieces of a tile without gaps; the piece in which the layer ends goes by floats.
template <class F>
__device__ __forceinline__ void for_pieces(const Dense& d, const Tile& tile, const F& f) {
  const int count = max(tile.rows, 0) * d.width, all = d.layout.rows * d.width, size = d.layout.copied;
  for (int i = threadIdx.x * size; i < all; i += kThreads * size) {
    if (size == 4 && (i + 4 <= count || i >= count)) {
      f(Piece<4>{i, tile.row * d.width + i, i < count});
    } else {
      for (int x = i; x < i + size; ++x) f(Piece<1>{x, tile.row * d.width + x, x < count});
    }
  }
}

// `Products` has a tile's packs dealt to threads, where rows begin on 16 bytes.
template <class Products, class T>
__device__ __forceinline__ void copy_tile(const Dense& d, const Tile& tile, T* to, const T* from) {
  if constexpr (Products::kPack == 4) {
    Products::for_packs(d.layout, [&](int row, int step, int column) {
#pragma unroll
      for (int n = 0; n < kDensePacks; ++n) piece_of_row(d, tile, row + n * step, column).copy(to, from);
    });
  } else {
    for_pieces(d, tile, [&](const auto& piece) { piece.copy(to, from); });
  }
}

}  // namespace
}  // namespace hypermask
