// The dense layer's two gradients by multiply-adds in float32: what a block does for few tasks, and where rows do not
// begin on 16 bytes.
#pragma once

#include "dense_step.h"

namespace hypermask {
namespace {

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
    for (int x = 0; x < 4; ++x) h[x] = pack_at<kPack>(s.hidden + (j + x) * l.hidden_stride + column);
#pragma unroll
    for (int n = 0; n < kDensePacks; ++n) {
      const Pack<4> g = pack_at<4>(s.factors + (lane + n * l.lanes) * l.slots + j);
#pragma unroll
      for (int x = 0; x < 4; ++x) multiply_add(grad[n], g.x[x], h[x]);
    }
  }
}

// As `Products`: a thread makes kChunk factors of a row; they lie together by row, [rows, slots].
template <int kPackFloats, int kTasks>
struct MultiplyAdds {
  static constexpr int kPack = kPackFloats, kChunk = kTasks, kRows = 1;
  template <Mode>
  using HiddenGradient = hypermask::HiddenGradient<kPack, kChunk>;

  static __device__ __forceinline__ void keep(const DenseLayout& l, float* factors, int r, int first,
                                              const float (&g)[kChunk]) {
#pragma unroll
    for (int j = 0; j < kChunk; j += 4) {
      pack_at<4>(factors + r * l.slots + first + j) = Pack<4>{{g[j], g[j + 1], g[j + 2], g[j + 3]}};
    }
  }

  static __device__ __forceinline__ float factor(const DenseLayout& l, const float* factors, int r, int task) {
    return factors[r * l.slots + task];
  }

  // This thread's packs of columns in any tile: f(row, step, column) for kDensePacks rows, `step` apart.
  template <class F>
  static __device__ __forceinline__ void for_packs(const DenseLayout& l, const F& f) {
    const int side = min(l.packs, kThreads), lane = threadIdx.x / side;
    if (lane >= l.lanes) return;
    for (int q = threadIdx.x - lane * side; q < l.packs; q += side) f(lane, l.lanes, q * kPack);
  }

  // dW = g^T h for the tile, written or given to Adam at once.
  template <Mode kMode, class Moment>
  static __device__ __forceinline__ void tile_weight(const Dense& d, const Tile& tile, const Shared& s,
                                                     const Step& step) {
    const DenseLayout& l = d.layout;
    for_packs(l, [&](int lane, int step_rows, int column) {
      Pack<kPack> grad[kDensePacks] = {};
      gradient_of_rows(l, s, lane, column, grad);
      if constexpr (kPack == 4) {
        if constexpr (steps_weights(kMode))
          cp_async_wait<1>();  // m and v are here; W of the next tile may be under way
#pragma unroll
        for (int n = 0; n < kDensePacks; ++n) {
          update<kMode, Moment>(d, piece_of_row(d, tile, lane + n * step_rows, column), s, grad[n], step);
        }
      } else {
#pragma unroll
        for (int n = 0; n < kDensePacks; ++n) s.grad[(lane + n * step_rows) * l.stride + column] = grad[n].x[0];
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
};

}  // namespace
}  // namespace hypermask
