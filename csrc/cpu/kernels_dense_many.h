// The products of the pass over the dense output layer for many tasks, where arithmetic decides; and which of both ways
// a layer takes.
//
// Blocks of kManyRows rows stay in the L2 cache with everything that is made of them. The block is packed twice: by
// columns for the dot products, by rows padded to whole vectors for the hidden vectors' gradient. Each product runs in
// tiles that keep two dozen sums in registers, so that every number loaded serves several multiply-adds.
#pragma once

#include "kernels_dense.h"

namespace hypermask {
namespace {

constexpr int kDotChains = kLanes / 4;
constexpr int kPanelTasks = 6;                      // of a tile of dot products, with one vector of rows
constexpr int kTile = kLanes == 16 ? 6 : 4;         // tasks of the hidden vectors' gradient
constexpr int kTileColumns = kLanes == 16 ? 4 : 3;  // and vectors
constexpr int kLeastTasks = kTile / 2 + 1;          // of a tile, and kPanelTasks / 2 + 1 of one of dot products
static_assert(kManyTasks >= 12 && kManyRows % kLanes == 0);

// x[i][k] -> x[k][i]: every stage interleaves the lower half of the rows with the upper half.
HM_INLINE void transpose(Vec (&x)[kLanes]) {
  IntVec low{};
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) low[i] = i / 2 + i % 2 * kLanes;
  const IntVec high = low + kLanes / 2;
#pragma GCC unroll 4
  for (int stage = 1; stage < kLanes; stage *= 2) {
    Vec y[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      y[2 * i] = __builtin_shuffle(x[i], x[i + kLanes / 2], low);
      y[2 * i + 1] = __builtin_shuffle(x[i], x[i + kLanes / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) x[i] = y[i];
  }
}

// to[panel][k][r] = W_r[k] for the rows of a block, in panels of one vector of rows; rows beyond the block are 0.
HM_INLINE void pack_columns(const float* w, int64_t width, int64_t padded, int rows, float* to) {
  for (int first = 0; first < rows; first += kLanes) {
    for (int64_t k = 0; k < width; k += kLanes) {
      Vec x[kLanes];
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) {
        x[r] = first + r < rows ? load_up_to(w + (first + r) * width + k, width - k) : Vec{};
      }
      transpose(x);
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) store(to + first * padded + (k + r) * kLanes, x[r]);
    }
  }
}

// to[r] = W_r, padded by zeros to whole vectors.
HM_INLINE void pack_rows(const float* w, int64_t width, int64_t padded, int rows, float* to) {
  for (int r = 0; r < rows; ++r) {
    for (int64_t k = 0; k < width; k += kLanes) store(to + r * padded + k, load_up_to(w + r * width + k, width - k));
  }
}

// out[j][r] = W_r . h_j for a panel's rows and kTasks tasks. Every sum is added up as row_dot's is: what a lane of a
// vector adds there is a chain of its own here, and the chains are added in the order of sum_lanes. So a logit is the
// same to the bit for one task, for few and for many.
template <int kTasks>
HM_INLINE void panel_dots(const float* panel, int64_t width, const float* h, int64_t padded, float* out, int stride) {
  const int64_t whole = width / kLanes * kLanes;
  Vec quads[4][kTasks];
  for (int i = 0; i < 4; ++i) {
    Vec sum[kDotChains][kTasks] = {};
    const auto step = [&](int chain, int64_t k) HM_LAMBDA {
      const Vec w = load(panel + k * kLanes);
#pragma GCC unroll 8
      for (int j = 0; j < kTasks; ++j) sum[chain][j] += w * h[j * padded + k];
    };
    for (int64_t k = i; k < whole; k += kLanes) {
#pragma GCC unroll 4
      for (int chain = 0; chain < kDotChains; ++chain) step(chain, k + 4 * chain);
    }
#pragma GCC unroll 4
    for (int chain = 0; chain < kDotChains; ++chain) {
      if (whole + i + 4 * chain < width) step(chain, whole + i + 4 * chain);
    }
#pragma GCC unroll 8
    for (int j = 0; j < kTasks; ++j) {
      quads[i][j] = sum[0][j];
      if constexpr (kDotChains == 2) quads[i][j] = sum[0][j] + sum[1][j];
      if constexpr (kDotChains == 4) quads[i][j] = (sum[0][j] + sum[1][j]) + (sum[2][j] + sum[3][j]);
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < kTasks; ++j) {
    store(out + j * stride, (quads[0][j] + quads[2][j]) + (quads[1][j] + quads[3][j]));
  }
}

struct ManyTasks {
  static constexpr int kRows = kManyRows;
  Cut cut;
  Tiles<kPanelTasks> dot_tasks;
  Tiles<kTile> hidden_tasks;
  Tiles<kTileColumns> columns;
  float *by_rows, *by_columns;  // the block, packed

  HM_INLINE ManyTasks of(const DenseLayer& d, float* scratch) {
    const Cut cut = Cut::of(d);
    float* packed = scratch + d.tasks * kRows;
    return {cut,
            Tiles<kPanelTasks>::of(d.drift_tasks),
            Tiles<kTile>::of(d.tasks),
            Tiles<kTileColumns>::of(cut.vectors),
            packed,
            packed + kRows * d.padded};
  }

  // Not inlined into each of its callers, as its tiles take long to compile.
  static __attribute__((noinline)) void dots(const ManyTasks& p, const DenseLayer& d, int64_t row, int rows,
                                             float* factors, Ahead& ahead) {
    pack_columns(d.weight + row * d.width, d.width, d.padded, rows, p.by_columns);
    for (int r = 0; r < rows; r += kLanes) {
      const float* panel = p.by_columns + r * d.padded;
      for_tiles<kPanelTasks / 2 + 1>(p.dot_tasks, [&](auto tasks, int64_t j) HM_LAMBDA {
        panel_dots<tasks.value>(panel, d.width, d.hidden + j * d.padded, d.padded, factors + j * kRows + r, kRows);
        Ahead::advance(ahead, kLanes * tasks.value);
      });
    }
  }

  HM_INLINE void hidden(const ManyTasks& p, const DenseLayer& d, int64_t row, int rows, const float* factors,
                        float* grad_hidden, Ahead& ahead) {
    pack_rows(d.weight + row * d.width, d.width, d.padded, rows, p.by_rows);
    for_tiles(p.columns, [&](auto columns, int64_t c) HM_LAMBDA {
      for_tiles<kLeastTasks>(p.hidden_tasks, [&](auto tasks, int64_t j) HM_LAMBDA {
        hidden_tile<tasks.value, columns.value, false>(p.by_rows + c * kLanes, d.padded, rows, factors + j * kRows,
                                                       kRows, grad_hidden + j * d.padded + c * kLanes, d.padded, 0);
        Ahead::advance(ahead, kRows * tasks.value * columns.value / p.cut.vectors);
      });
    });
  }

  template <class To>
  HM_INLINE void weights(const ManyTasks& p, const DenseLayer& d, int64_t row, int rows, const float* factors, To to,
                         Ahead& ahead) {
    weight_gradient(d, p.cut, row, rows, factors, kRows, to, ahead);
  }
};

double dense_value(const DenseLayer& d, int64_t begin, int64_t end, float* scratch) {
  return many_tasks(d) ? value_by<ManyTasks>(d, begin, end, scratch) : value_by<FewTasks>(d, begin, end, scratch);
}

double dense_residuals(const DenseLayer& d, int64_t begin, int64_t end, float* scratch, float* out) {
  return many_tasks(d) ? residuals_by<ManyTasks>(d, begin, end, scratch, out)
                       : residuals_by<FewTasks>(d, begin, end, scratch, out);
}

double dense_pass(const DenseLayer& d, int64_t begin, int64_t end, float* scratch, float* grad_hidden) {
  return many_tasks(d) ? pass_by<ManyTasks>(d, begin, end, scratch, grad_hidden)
                       : pass_by<FewTasks>(d, begin, end, scratch, grad_hidden);
}

}  // namespace
}  // namespace hypermask
