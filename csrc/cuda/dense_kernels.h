// The pass over the hypernetwork's dense output layer on the GPU; formulas in csrc/cpu/kernels_dense.h.
//
// A block takes tiles of the layer in turn. In shared memory it makes the factors g of the tile (a thread per row and
// chunk of tasks), adds to the hidden vectors' gradient (a thread per pack of columns and chunk of tasks, sums in
// registers from tile to tile), and makes the tile's gradient for Adam (a thread per pack of columns, kDensePacks rows),
// so that each value loaded from shared memory feeds 4 multiply-adds or more. Copies run ahead: while a tile is
// worked on, W of the next one is on its way, and each m and v follows as soon as its place is free. W, m and v are read
// and written once. Sums over rows are added in a fixed order: the same bits every time on the same device.
#pragma once

#include "../common/adam.h"
#include "device.h"

namespace hypermask {
namespace {

enum Mode { kValue, kGradient, kAdam };

struct Dense {
  DenseLayout layout;
  int64_t rows;
  int width, drift_tasks, tasks;  // tasks: drift_tasks, plus one for the current task
  float* weight;                  // written in Adam mode only
  float* bias;
  const float* hidden;       // [tasks, width]
  const float* targets;      // [drift_tasks, rows]
  const float* grad_logits;  // [rows] or null
  const float* outer;        // one entry: dLoss/dR; null in value mode
  float *grad_weight, *grad_bias;
  float *weight_m, *weight_v, *bias_m, *bias_v;
  const float *step, *lr;  // read on the device, so that a captured step sees them change
  double beta1, beta2, eps;
  float* partial;          // [blocks, tasks, width]
  double* partial_drift;   // [blocks]
};

template <int kPack>
struct alignas(4 * kPack) Pack {
  float x[kPack];
};

template <int kPack>
__device__ __forceinline__ Pack<kPack>& pack_at(float* p) {
  return *reinterpret_cast<Pack<kPack>*>(p);
}
template <int kPack>
__device__ __forceinline__ const Pack<kPack>& pack_at(const float* p) {
  return *reinterpret_cast<const Pack<kPack>*>(p);
}

// sum += a x
template <int kPack>
__device__ __forceinline__ void multiply_add(Pack<kPack>& sum, float a, const Pack<kPack>& x) {
#pragma unroll
  for (int i = 0; i < kPack; ++i) sum.x[i] = fmaf(a, x.x[i], sum.x[i]);
}

struct Shared {
  float *weight, *next_weight;  // [rows, stride]: the tile being worked on and the next one
  float *m, *v;                 // [rows, stride]
  float* hidden;                // [slots, stride], 0 beyond the tasks
  float* factors;               // [rows, slots]

  __device__ explicit Shared(const DenseLayout& l) {
    const int tile = l.rows * l.stride;
    weight = dynamic_shared<float>();
    next_weight = weight + tile;
    m = next_weight + tile;
    v = m + tile;
    hidden = v + tile;
    factors = hidden + l.slots * l.stride;
  }
};

// A tile and the packs in it that this thread copies and updates: f(row of the tile, first column).
template <int kPack>
struct Tile {
  int64_t row;  // of the layer
  int rows;     // that there are: fewer in the last tile

  __device__ Tile(const Dense& d, int64_t row)
      : row(row), rows(static_cast<int>(min(static_cast<int64_t>(d.layout.rows), d.rows - row))) {}

  template <class F>
  static __device__ __forceinline__ void columns(const DenseLayout& l, const F& f) {
    const int side = min(l.packs, kThreads), lane = threadIdx.x / side;
    if (lane >= l.lanes) return;
    for (int q = threadIdx.x - lane * side; q < l.packs; q += side) f(lane, q * kPack);
  }

  // Brings the tile from global to shared memory; zeros where the layer has ended.
  __device__ __forceinline__ void copy(const Dense& d, float* shared, const float* global) const {
    columns(d.layout, [&](int lane, int column) {
#pragma unroll
      for (int n = 0; n < kDensePacks; ++n) copy(d, shared, global, lane + n * d.layout.lanes, column);
    });
  }
  __device__ __forceinline__ void copy(const Dense& d, float* shared, const float* global, int r, int column) const {
    float* to = shared + r * d.layout.stride + column;
    if (r < rows) {
      cp_async<4 * kPack>(to, global + (row + r) * d.width + column);
    } else {
      pack_at<kPack>(to) = Pack<kPack>{};
    }
  }
};

// factors[r][j] = dLoss/da_jr for one row and a chunk of tasks per thread. Returns this thread's squared residuals. A dot
// product is one chain of multiply-adds over the columns: its bits depend neither on the mode nor on the other tasks.
template <int kPack, int kChunk, Mode kMode>
__device__ __forceinline__ double tile_factors(const Dense& d, const Tile<kPack>& tile, const Shared& s,
                                               float coefficient) {
  const DenseLayout& l = d.layout;
  double squares = 0;
  for (int i = threadIdx.x; i < l.rows * (l.slots / kChunk); i += kThreads) {
    const int chunk = i / l.rows, r = i - chunk * l.rows, first = chunk * kChunk;
    const int drift = r < tile.rows ? min(kChunk, d.drift_tasks - first) : 0;
    const int64_t at = tile.row + r;
    float g[kChunk] = {}, target[kChunk], sum[kChunk] = {};
    if (drift > 0) {
      const float bias = d.bias[at];
#pragma unroll
      for (int j = 0; j < kChunk; ++j) target[j] = j < drift ? d.targets[(first + j) * d.rows + at] : 0.0f;
      const float *w = s.weight + r * l.stride, *h = s.hidden + first * l.stride;
#pragma unroll (16 / kChunk)
      for (int k = 0; k < d.width; k += kPack) {
        const Pack<kPack> wk = pack_at<kPack>(w + k);
#pragma unroll
        for (int j = 0; j < kChunk; ++j) {
          const Pack<kPack> hk = pack_at<kPack>(h + j * l.stride + k);
#pragma unroll
          for (int x = 0; x < kPack; ++x) sum[j] = fmaf(wk.x[x], hk.x[x], sum[j]);
        }
      }
#pragma unroll
      for (int j = 0; j < kChunk; ++j) {
        if (j < drift) {
          const float residual = (sum[j] + bias) - target[j];
          squares += static_cast<double>(residual) * residual;
          g[j] = coefficient * residual;
        }
      }
    }
    if constexpr (kMode != kValue) {
      const int current = d.tasks > d.drift_tasks && r < tile.rows ? d.drift_tasks - first : -1;
#pragma unroll
      for (int j = 0; j < kChunk; ++j) {
        if (j == current) g[j] = d.grad_logits[at];
      }
#pragma unroll
      for (int j = 0; j < kChunk; j += 4) {
        pack_at<4>(s.factors + r * l.slots + first + j) = Pack<4>{{g[j], g[j + 1], g[j + 2], g[j + 3]}};
      }
    }
  }
  return squares;
}

// The gradient of the hidden vectors: a thread sums over rows for one pack of columns and one chunk of tasks, a strip.
// Where the strips are no more than the threads, several lanes of threads share the rows of a tile and the sums stay in
// registers from tile to tile; otherwise a thread has several strips in turn, and their sums wait in this block's part
// of `partial`.
template <int kPack, int kChunk>
struct HiddenGradient {
  Pack<kPack> sum[kChunk];
  int strips, lanes, strip, lane;

  __device__ explicit HiddenGradient(const DenseLayout& l) {
    strips = l.packs * (l.slots / kChunk);
    lanes = strips <= kThreads ? min(kThreads / strips, 16) : 1;
    lane = strips <= kThreads ? static_cast<int>(threadIdx.x) / strips : 0;
    strip = threadIdx.x - lane * strips;
    clear();
  }

  __device__ __forceinline__ bool stays() const { return strips <= kThreads; }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int j = 0; j < kChunk; ++j) sum[j] = Pack<kPack>{};
  }

  // sum[j] += sum_r g[r][j] W[r]; the tile's rows are added up apart, for the error of a sum grows with its length.
  __device__ __forceinline__ void add_rows(const DenseLayout& l, const Shared& s, int strip) {
    Pack<kPack> tile_sum[kChunk] = {};
    const int chunk = strip / l.packs, column = (strip - chunk * l.packs) * kPack;
#pragma unroll 2
    for (int r = lane; r < l.rows; r += lanes) {
      const Pack<kPack> w = pack_at<kPack>(s.weight + r * l.stride + column);
#pragma unroll
      for (int j = 0; j < kChunk; j += 4) {
        const Pack<4> g = pack_at<4>(s.factors + r * l.slots + chunk * kChunk + j);
#pragma unroll
        for (int x = 0; x < 4; ++x) multiply_add(tile_sum[j + x], g.x[x], w);
      }
    }
#pragma unroll
    for (int j = 0; j < kChunk; ++j) multiply_add(sum[j], 1.0f, tile_sum[j]);
  }

  // f(sum, where in [tasks, width]) for the chunk's tasks that there are.
  template <class F>
  __device__ __forceinline__ void each(const Dense& d, int strip, const F& f) {
    const int chunk = strip / d.layout.packs, column = (strip - chunk * d.layout.packs) * kPack;
#pragma unroll
    for (int j = 0; j < kChunk; ++j) {
      const int task = chunk * kChunk + j;
      if (task < d.tasks) f(sum[j], task * d.width + column);
    }
  }

  __device__ __forceinline__ void add_tile(const Dense& d, const Shared& s, bool first_tile, float* partial) {
    if (stays()) {
      if (lane < lanes) add_rows(d.layout, s, strip);
      return;
    }
    for (int at = threadIdx.x; at < strips; at += kThreads) {
      clear();
      if (!first_tile) each(d, at, [&](Pack<kPack>& x, int where) { x = pack_at<kPack>(partial + where); });
      add_rows(d.layout, s, at);
      each(d, at, [&](const Pack<kPack>& x, int where) { pack_at<kPack>(partial + where) = x; });
    }
  }

  // Adds the lanes up in order and leaves the block's sum in `partial`; `scratch` holds [tasks, width].
  __device__ __forceinline__ void finish(const Dense& d, float* scratch, float* partial) {
    if (!stays()) return;
    for (int l = 0; l < lanes; ++l) {
      __syncthreads();
      if (l != lane) continue;
      each(d, strip, [&](const Pack<kPack>& x, int where) {
        Pack<kPack> total = x;
        if (l > 0) multiply_add(total, 1.0f, pack_at<kPack>(scratch + where));
        pack_at<kPack>(l + 1 == lanes ? partial + where : scratch + where) = total;
      });
    }
  }
};

// dW[r] = sum_j g[r][j] h[j] for this thread's packs, written or given to Adam at once.
template <int kPack, Mode kMode>
__device__ __forceinline__ void tile_weight(const Dense& d, const Tile<kPack>& tile, const Tile<kPack>& next,
                                            const Shared& s, const AdamStep& step) {
  const DenseLayout& l = d.layout;
  Tile<kPack>::columns(l, [&](int lane, int column) {
    Pack<kPack> grad[kDensePacks] = {};
#pragma unroll 1
    for (int j = 0; j < l.slots; j += 4) {
      Pack<kPack> h[4];
#pragma unroll
      for (int x = 0; x < 4; ++x) h[x] = pack_at<kPack>(s.hidden + (j + x) * l.stride + column);
#pragma unroll
      for (int n = 0; n < kDensePacks; ++n) {
        const Pack<4> g = pack_at<4>(s.factors + (lane + n * l.lanes) * l.slots + j);
#pragma unroll
        for (int x = 0; x < 4; ++x) multiply_add(grad[n], g.x[x], h[x]);
      }
    }
    if constexpr (kMode == kAdam) cp_async_wait<1>();  // m and v are here; W of the next tile may be under way
#pragma unroll
    for (int n = 0; n < kDensePacks; ++n) {
      const int r = lane + n * l.lanes, at = r * l.stride + column;
      const int64_t where = (tile.row + r) * d.width + column;
      if (r >= tile.rows) continue;
      if constexpr (kMode == kAdam) {
        Pack<kPack> w = pack_at<kPack>(s.weight + at), m = pack_at<kPack>(s.m + at), v = pack_at<kPack>(s.v + at);
#pragma unroll
        for (int x = 0; x < kPack; ++x) adam_update(grad[n].x[x], w.x[x], m.x[x], v.x[x], step);
        pack_at<kPack>(d.weight + where) = w;
        pack_at<kPack>(d.weight_m + where) = m;
        pack_at<kPack>(d.weight_v + where) = v;
        if (r < next.rows) {
          next.copy(d, s.m, d.weight_m, r, column);
          next.copy(d, s.v, d.weight_v, r, column);
        }
      } else {
        pack_at<kPack>(d.grad_weight + where) = grad[n];
      }
    }
  });
}

// db[r] = sum_j g[r][j], likewise; a thread per row.
template <Mode kMode>
__device__ __forceinline__ void tile_bias(const Dense& d, int64_t row, int rows, const float* factors,
                                          const AdamStep& step) {
  for (int r = threadIdx.x; r < rows; r += kThreads) {
    float grad = 0;
    for (int j = 0; j < d.tasks; ++j) grad += factors[r * d.layout.slots + j];
    if constexpr (kMode == kAdam) {
      adam_update(grad, d.bias[row + r], d.bias_m[row + r], d.bias_v[row + r], step);
    } else {
      d.grad_bias[row + r] = grad;
    }
  }
}

template <int kPack, int kChunk, Mode kMode>
__global__ void __launch_bounds__(kThreads, kChunk == 4 ? 3 : 2) dense_kernel(Dense d) {
  __shared__ AdamStep step;
  const DenseLayout& l = d.layout;
  Shared s(l);
  for (int i = threadIdx.x; i < l.slots * l.stride; i += kThreads) {
    const int task = i / l.stride, k = i - task * l.stride;
    s.hidden[i] = task < d.tasks && k < d.width ? d.hidden[task * d.width + k] : 0.0f;
  }
  if (kMode == kAdam && threadIdx.x == 0) step = adam_step(*d.step, *d.lr, d.beta1, d.beta2, d.eps);
  const float coefficient = kMode == kValue ? 0.0f : 2.0f * *d.outer;
  float* partial = d.partial + static_cast<int64_t>(blockIdx.x) * d.tasks * d.width;
  HiddenGradient<kPack, kChunk> hidden_gradient(l);
  double squares = 0;
  const int64_t start = static_cast<int64_t>(blockIdx.x) * l.rows, stride = static_cast<int64_t>(gridDim.x) * l.rows;
  Tile<kPack> tile(d, start);
  // Each thread closes two groups of copies per tile, W of the next one and m and v of the next one, in this order; so
  // "all but the last group" is W before the barrier below, and m and v in tile_weight.
  tile.copy(d, s.weight, d.weight);
  cp_async_commit();
  if constexpr (kMode == kAdam) {
    tile.copy(d, s.m, d.weight_m);
    tile.copy(d, s.v, d.weight_v);
  }
  cp_async_commit();
  while (tile.row < d.rows) {
    const Tile<kPack> next(d, tile.row + stride);
    cp_async_wait<1>();
    __syncthreads();  // W is here, and all threads are done with the tile before
    if (next.rows > 0) next.copy(d, s.next_weight, d.weight);
    cp_async_commit();
    squares += tile_factors<kPack, kChunk, kMode>(d, tile, s, coefficient);
    if constexpr (kMode != kValue) {
      __syncthreads();
      hidden_gradient.add_tile(d, s, tile.row == start, partial);
      tile_weight<kPack, kMode>(d, tile, next, s, step);
      tile_bias<kMode>(d, tile.row, tile.rows, s.factors, step);
    }
    cp_async_commit();
    float* free = s.weight;
    s.weight = s.next_weight;
    s.next_weight = free;
    tile = next;
  }
  squares = block_sum(squares);
  if (threadIdx.x == 0) d.partial_drift[blockIdx.x] = squares;
  if constexpr (kMode != kValue) hidden_gradient.finish(d, s.hidden, partial);
}

// Adds the blocks' sums: 32 outputs a block, 8 groups of partial sums side by side, then the groups in order.
__global__ void finish_kernel(const float* partial, const double* partial_drift, int blocks, int outputs,
                              float* grad_hidden, float* drift) {
  __shared__ double sums[kThreads];
  const int lane = threadIdx.x % 32, group = threadIdx.x / 32, output = blockIdx.x * 32 + lane;
  double sum = 0;
  if (output < outputs) {
#pragma unroll 8
    for (int b = group; b < blocks; b += kThreads / 32) sum += partial[static_cast<int64_t>(b) * outputs + output];
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (group == 0 && output < outputs) {
    for (int g = 1; g < kThreads / 32; ++g) sum += sums[g * 32 + lane];
    grad_hidden[output] = static_cast<float>(sum);
  }
  if (blockIdx.x > 0) return;
  double total = 0;
  for (int b = threadIdx.x; b < blocks; b += kThreads) total += partial_drift[b];
  total = block_sum(total);
  if (threadIdx.x == 0 && drift) *drift = static_cast<float>(total);
}

}  // namespace
}  // namespace hypermask
