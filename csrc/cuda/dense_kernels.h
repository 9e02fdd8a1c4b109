// The pass over the hypernetwork's dense output layer on the GPU; formulas in csrc/cpu/kernels_dense.h.
//
// A block takes tiles of the layer in turn. In shared memory it makes the factors g of the tile (a thread per row and
// chunk of tasks), adds to the hidden vectors' gradient (a thread per pack of columns and chunk of tasks, sums in
// registers from tile to tile), and makes the tile's gradient for Adam (a thread per pack of columns, kDensePacks
// rows), so that each value loaded from shared memory feeds 4 multiply-adds or more. Copies run ahead: while a tile is
// worked on, W of the next one is on its way, and each m and v follows as soon as its place is free. W, m and v are
// read and written once. Sums over rows are added in a fixed order: the same bits every time on the same device. The
// same in two launches, by factors that the forward pass has kept: kHidden, then kStep.
#pragma once

#include "../common/adam.h"
#include "dense_tile.h"

namespace hypermask {
namespace {

// factors[r][j] = scales[j] times the given factor, for one row and a chunk of tasks per thread.
template <int kChunk>
__device__ __forceinline__ void scaled_factors(const Dense& d, const Tile& tile, const Shared& s) {
  const DenseLayout& l = d.layout;
  for (int i = threadIdx.x; i < l.rows * (l.slots / kChunk); i += kThreads) {
    const int chunk = i / l.rows, r = i - chunk * l.rows, first = chunk * kChunk;
    const int count = r < tile.rows ? min(kChunk, d.tasks - first) : 0;
    float g[kChunk] = {};
#pragma unroll
    for (int j = 0; j < kChunk; ++j) {
      if (j < count) g[j] = d.scales[first + j] * d.factors[(first + j) * d.rows + tile.row + r];
    }
#pragma unroll
    for (int j = 0; j < kChunk; j += 4) {
      pack_at<4>(s.factors + r * l.slots + first + j) = Pack<4>{{g[j], g[j + 1], g[j + 2], g[j + 3]}};
    }
  }
}

// The current task's gradient at the row whose factor this thread makes: read a tile ahead, for behind the first task
// there is no dot product during which it could arrive.
struct CurrentRow {
  int r;  // of any tile; rows or more: none of this thread's
  float grad = 0, next = 0;

  // tile_factors deals rows of the chunk that holds the current task to kThreads threads in a row.
  __device__ __forceinline__ CurrentRow(const Dense& d, bool there)
      : r(static_cast<int>((threadIdx.x + kThreads - d.drift_tasks / d.layout.chunk * d.layout.rows % kThreads) %
                           kThreads)) {
    if (!there || d.tasks == d.drift_tasks) r = kThreads;
  }

  __device__ __forceinline__ void read(const Dense& d, const Tile& tile) {
    if (r < tile.rows) next = d.grad_logits[tile.row + r];
  }
};

// factors[r][j] = dLoss/da_jr for one row and a chunk of tasks per thread. Returns this thread's squared residuals. A
// dot product is one chain of multiply-adds over the columns: its bits depend neither on the mode nor on the other
// tasks.
template <int kPack, int kChunk, Mode kMode>
__device__ __forceinline__ double tile_factors(const Dense& d, const Tile& tile, const Shared& s, float coefficient,
                                               const CurrentRow& given) {
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
      for (int j = 0; j < kChunk; ++j) {
        target[j] = j < drift && first + j < d.target_tasks ? d.targets[(first + j) * d.rows + at] : 0.0f;
      }
      const float *w = s.weight + r * l.stride, *h = s.hidden + first * l.stride;
#pragma unroll(kPack == 4 ? 8 / kChunk : 4)
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
          if (first + j < d.target_tasks) squares += static_cast<double>(residual) * residual;
          g[j] = coefficient * residual;
          if (kMode == kValue && d.logits) d.logits[(first + j) * d.rows + at] = residual;
        }
      }
    }
    if constexpr (kMode != kValue) {
      const int current = d.tasks > d.drift_tasks && r < tile.rows ? d.drift_tasks - first : -1;
#pragma unroll
      for (int j = 0; j < kChunk; ++j) {
        if (j == current) g[j] = given.grad;
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
#pragma unroll(8 / kChunk)
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

// grad[n] = sum_j g[r][j] h[j] for row r = lane + n lanes and the pack at column.
template <int kPack>
__device__ __forceinline__ void gradient_of_rows(const DenseLayout& l, const Shared& s, int lane, int column,
                                                 Pack<kPack> (&grad)[kDensePacks]) {
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
}

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

// dW = g^T h for the tile, written or given to Adam at once.
template <int kPack, Mode kMode, class Moment>
__device__ __forceinline__ void tile_weight(const Dense& d, const Tile& tile, const Shared& s, const Step& step) {
  const DenseLayout& l = d.layout;
  for_columns<kPack>(l, [&](int lane, int column) {
    Pack<kPack> grad[kDensePacks] = {};
    gradient_of_rows(l, s, lane, column, grad);
    if constexpr (kPack == 4) {
      if constexpr (steps_weights(kMode)) cp_async_wait<1>();  // m and v are here; W of the next tile may be under way
#pragma unroll
      for (int n = 0; n < kDensePacks; ++n) {
        update<kMode, Moment>(d, piece_of_row(d, tile, lane + n * l.lanes, column), s, grad[n], step);
      }
    } else {
#pragma unroll
      for (int n = 0; n < kDensePacks; ++n) s.grad[(lane + n * l.lanes) * l.stride + column] = grad[n].x[0];
    }
  });
  if constexpr (kPack == 1) {
    __syncthreads();
    if constexpr (steps_weights(kMode)) cp_async_wait<1>();
    for_pieces(d, tile, [&](const auto& piece) {
      update<kMode, Moment>(d, piece, s, pack_at<piece.size>(s.grad + piece.shared), step);
    });
  }
}

// db[r] = sum_j g[r][j], likewise: a thread per row, which reads its bias and moments ahead.
template <Mode kMode>
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
    for (int j = 0; j < d.tasks; ++j) grad += factors[r * d.layout.slots + j];
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

// Blocks on a multiprocessor, which decide how many registers a thread may have: 80 or 128. What needs more than 80 on
// an architecture gets 128, for nothing may spill.
template <int kPack, int kChunk, Mode kMode>
constexpr int dense_blocks() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  constexpr bool small = kPack * kChunk <= (steps_weights(kMode) ? 8 : 16);
#else
  constexpr bool small = kPack * kChunk <= 16;
#endif
  return small && kMode != kGradient ? 3 : 2;
}

template <int kPack, class Moment>
__device__ __forceinline__ void copy_moments(const Dense& d, const Tile& tile, const Shared& s) {
  const Moments<Moment> moments(d, s);
  copy_tile<kPack>(d, tile, moments.m, moments.to_m);
  copy_tile<kPack>(d, tile, moments.v, moments.to_v);
}

template <int kPack, int kChunk, Mode kMode, class Moment>
__global__ void __launch_bounds__(kThreads, (dense_blocks<kPack, kChunk, kMode>())) dense_kernel(Dense d) {
  __shared__ Step step;
  const DenseLayout& l = d.layout;
  Shared s(l, kMode);
  for (int i = threadIdx.x; i < l.slots * l.stride; i += kThreads) {
    const int task = i / l.stride, k = i - task * l.stride;
    s.hidden[i] = d.hidden && task < d.tasks && k < d.width ? d.hidden[task * d.width + k] : 0.0f;
  }
  if (steps_weights(kMode) && threadIdx.x == 0) {
    step.adam = adam_step(*d.step, *d.lr, d.beta1, d.beta2, d.eps, d.weight_decay, d.decoupled, d.maximize);
    step.draws = draws_of(*d.step, d.first_row, d.width);
  }
  const float coefficient = kMode == kValue || given_factors(kMode) ? 0.0f : 2.0f * *d.outer;
  float* partial = d.partial + static_cast<int64_t>(blockIdx.x) * d.tasks * d.width;
  HiddenGradient<kPack, kChunk> hidden_gradient(l);
  CurrentRow given(d, kMode == kAdam);
  double squares = 0;
  const int64_t start = static_cast<int64_t>(blockIdx.x) * l.rows, stride = static_cast<int64_t>(gridDim.x) * l.rows;
  Tile tile(d, start);
  // Each thread closes two groups of copies per tile, W of the next one and m and v of the next one, in this order; so
  // "all but the last group" is W before the barrier below, and m and v in tile_weight.
  copy_tile<kPack>(d, tile, s.weight, d.weight);
  cp_async_commit();
  if constexpr (steps_weights(kMode)) copy_moments<kPack, Moment>(d, tile, s);
  cp_async_commit();
  given.read(d, tile);
  while (tile.row < d.rows) {
    const Tile next(d, tile.row + stride);
    given.grad = given.next;
    given.read(d, next);
    cp_async_wait<1>();
    __syncthreads();  // W is here, and all threads are done with the tile before
    if (next.rows > 0) copy_tile<kPack>(d, next, s.next_weight, d.weight);
    cp_async_commit();
    if constexpr (given_factors(kMode)) {
      scaled_factors<kChunk>(d, tile, s);
    } else {
      squares += tile_factors<kPack, kChunk, kMode>(d, tile, s, coefficient, given);
    }
    if constexpr (kMode != kValue) {
      BiasRow<kMode> bias(d, tile);
      __syncthreads();
      if constexpr (sums_hidden(kMode)) hidden_gradient.add_tile(d, s, tile.row == start, partial);
      if constexpr (makes_weights(kMode)) tile_weight<kPack, kMode, Moment>(d, tile, s, step);
      if constexpr (kMode != kStep) bias.update(d, tile, s.factors, step.adam);
    }
    if constexpr (steps_weights(kMode)) {  // where each thread has just used its own pieces
      if (next.rows > 0) copy_moments<kPack, Moment>(d, next, s);
    }
    cp_async_commit();
    float* free = s.weight;
    s.weight = s.next_weight;
    s.next_weight = free;
    tile = next;
  }
  squares = block_sum(squares);
  if (threadIdx.x == 0) d.partial_drift[blockIdx.x] = squares;
  if constexpr (sums_hidden(kMode)) hidden_gradient.finish(d, s.hidden, partial);
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
