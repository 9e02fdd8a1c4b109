// The products of the pass over the dense output layer for many tasks, where arithmetic decides.
//
// Blocks of kManyRows rows stay in the L2 cache with everything that is made of them. The block is packed twice: by
// columns for the dot products, by rows padded to whole vectors for the hidden vectors' gradient. Each product runs in
// tiles that keep two dozen sums in registers, so that every number loaded serves several multiply-adds.
#pragma once

#include "kernels_dense_step.h"

namespace hypermask {
namespace {

constexpr int kDotChains = kLanes / 4;
constexpr int kPanelTasks = 3, kPanels = 2;  // of a tile of dot products: tasks, and vectors of rows
constexpr int kTile = kLanes == 16 ? 8 : 4;  // of a tile of a gradient: tasks or rows,
constexpr int kTileColumns = 3;              // and vectors of columns
constexpr int kLeastTasks = kTile / 2 + 1;   // what many tasks are cut into
static_assert(kManyTasks >= 12 && kManyRows % (kPanels * kLanes) == 0);

// x[i][k] -> x[k][i]: every stage interleaves the lower half of the rows with the upper half.
HM_INLINE void transpose(Vec (&x)[kLanes]) {
  IntVec low{};
  HM_EACH(i, kLanes) low[i] = i / 2 + i % 2 * kLanes;
  const IntVec high = low + kLanes / 2;
#pragma GCC unroll 4
  for (int stage = 1; stage < kLanes; stage *= 2) {
    Vec y[kLanes];
    HM_EACH(i, kLanes / 2) {
      y[2 * i] = __builtin_shuffle(x[i], x[i + kLanes / 2], low);
      y[2 * i + 1] = __builtin_shuffle(x[i], x[i + kLanes / 2], high);
    }
    HM_EACH(i, kLanes) x[i] = y[i];
  }
}

// columns[panel][k][r] = W_r[k] for the rows of a block, in panels of one vector of rows; rows beyond the block are 0.
HM_INLINE void pack_columns(const float* w, int64_t width, int64_t padded, int rows, float* columns) {
  for (int first = 0; first < rows; first += kLanes) {
    for (int64_t k = 0; k < width; k += kLanes) {
      Vec x[kLanes];
      HM_EACH(r, kLanes) { x[r] = first + r < rows ? load_up_to(w + (first + r) * width + k, width - k) : Vec{}; }
      transpose(x);
      HM_EACH(r, kLanes) store(columns + first * padded + (k + r) * kLanes, x[r]);
    }
  }
}

// to[r] = W_r, padded by zeros to whole vectors.
HM_INLINE void pack_rows(const float* w, int64_t width, int64_t padded, int rows, float* to) {
  for (int r = 0; r < rows; ++r) {
    for (int64_t k = 0; k < width; k += kLanes) store(to + r * padded + k, load_up_to(w + r * width + k, width - k));
  }
}

// out[j][r] = W_r . h_j for kVectors panels' rows and kTasks tasks. Every sum is added up as row_dot's is: what a lane
// of a vector adds there is a chain of its own here, and the chains are added in the order of sum_lanes. So a logit is
// the same to the bit for one task, for few and for many.
template <int kTasks, int kVectors>
HM_INLINE void panel_dots(const float* panel, int64_t width, const float* h, int64_t padded, float* out) {
  const int64_t whole = width / kLanes * kLanes, next = padded * kLanes;
  Vec quads[4][kTasks][kVectors];
  for (int i = 0; i < 4; ++i) {
    Vec sum[kDotChains][kTasks][kVectors] = {};
    const auto step = [&](int chain, int64_t k) HM_LAMBDA {
      Vec w[kVectors];
      HM_EACH(v, kVectors) w[v] = in_register(load(panel + v * next + k * kLanes));
      HM_EACH(j, kTasks) {
        const Vec hk = broadcast(h[j * padded + k]);
        HM_EACH(v, kVectors) sum[chain][j][v] += w[v] * hk;
      }
    };
    for (int64_t k = i; k < whole; k += kLanes) {
      HM_EACH(chain, kDotChains) step(chain, k + 4 * chain);
    }
    HM_EACH(chain, kDotChains) {
      if (whole + i + 4 * chain < width) step(chain, whole + i + 4 * chain);
    }
    HM_EACH(j, kTasks) {
      HM_EACH(v, kVectors) {
        quads[i][j][v] = sum[0][j][v];
        if constexpr (kDotChains == 2) quads[i][j][v] = sum[0][j][v] + sum[1][j][v];
        if constexpr (kDotChains == 4) {
          quads[i][j][v] = (sum[0][j][v] + sum[1][j][v]) + (sum[2][j][v] + sum[3][j][v]);
        }
      }
    }
  }
  HM_EACH(j, kTasks) {
    HM_EACH(v, kVectors) {
      store(out + j * kManyRows + v * kLanes, (quads[0][j][v] + quads[2][j][v]) + (quads[1][j][v] + quads[3][j][v]));
    }
  }
}

// sums[a][c] = sum_b f[a][b] x[b][c] for kCount a and kColumns vectors of columns. f[a][b] is f[a * kStep + b *
// kOther].
template <int kCount, int kColumns, int kStep, int kOther>
HM_INLINE void product_tile(const float* f, int64_t count, const float* x, int64_t padded,
                            Vec (&sums)[kCount][kColumns]) {
  Vec sum[kCount][kColumns] = {};
  for (int64_t b = 0; b < count; ++b) {
    Vec row[kColumns];
    HM_EACH(c, kColumns) row[c] = load(x + b * padded + c * kLanes);
    HM_EACH(a, kCount) {
      const Vec factor = broadcast(f[a * kStep + b * kOther]);
      HM_EACH(c, kColumns) sum[a][c] += row[c] * factor;
    }
  }
  HM_EACH(a, kCount) { HM_EACH(c, kColumns) sums[a][c] = sum[a][c]; }
}

struct ManyTasks {
  static constexpr int kRows = kManyRows;
  static constexpr bool kBuffered = true;  // gradients are always written to memory before they are stepped
  int64_t vectors;                         // of a row
  Tiles<kPanelTasks> dot_tasks;
  Tiles<kTile> hidden_tasks;
  Tiles<kTileColumns> columns;
  float *by_rows, *by_columns;  // the block, packed

  HM_INLINE ManyTasks of(const DenseLayer& d, float* packed) {
    const int64_t vectors = (d.width + kLanes - 1) / kLanes;
    return {vectors,
            Tiles<kPanelTasks>::of(d.drift_tasks),
            Tiles<kTile>::of(d.tasks),
            Tiles<kTileColumns>::of(vectors),
            packed,
            packed + kRows * d.padded};
  }

  // As FewTasks::dot_products. Not inlined into each of its callers, as its tiles take long to compile.
  static __attribute__((noinline)) void dot_products(const ManyTasks& p, const DenseLayer& d, int64_t row, int rows,
                                                     float* factors, AheadOfProducts& ahead) {
    pack_columns(d.weight + row * d.width, d.width, d.padded, rows, p.by_columns);
    for_tiles(Tiles<kPanels>::of((rows + kLanes - 1) / kLanes), [&](auto panels, int64_t first) HM_LAMBDA {
      const float* panel = p.by_columns + first * kLanes * d.padded;
      for_tiles<kPanelTasks / 2 + 1>(p.dot_tasks, [&](auto tasks, int64_t j) HM_LAMBDA {
        panel_dots<tasks.value, panels.value>(panel, d.width, d.hidden + j * d.padded, d.padded,
                                              factors + j * kRows + first * kLanes);
        AheadOfProducts::advance(ahead, panels.value * kLanes * tasks.value * d.width);
      });
    });
  }

  HM_INLINE void hidden_gradient(const ManyTasks& p, const DenseLayer& d, int64_t row, int rows, const float* factors,
                                 float* grad_hidden, AheadOfProducts& ahead) {
    pack_rows(d.weight + row * d.width, d.width, d.padded, rows, p.by_rows);
    for_tiles(p.columns, [&](auto columns, int64_t c) HM_LAMBDA {
      for_tiles<kLeastTasks>(p.hidden_tasks, [&](auto tasks, int64_t j) HM_LAMBDA {
        Vec sum[tasks.value][columns.value];
        product_tile<tasks.value, columns.value, kRows, 1>(factors + j * kRows, rows, p.by_rows + c * kLanes, d.padded,
                                                           sum);
        HM_EACH(a, tasks.value) {
          HM_EACH(b, columns.value) {
            float* out = grad_hidden + (j + a) * d.padded + (c + b) * kLanes;
            store(out, load(out) + sum[a][b]);
          }
        }
        AheadOfProducts::advance(ahead, rows * tasks.value * columns.value * kLanes);
      });
    });
  }

  HM_INLINE void weight_gradient(const ManyTasks& p, const DenseLayer& d, int rows, const float* factors,
                                 WriteGradient to, int64_t at) {
    for_tiles(p.columns, [&](auto columns, int64_t c) HM_LAMBDA {
      for_tiles(Tiles<kTile>::of(rows), [&](auto many, int64_t r) HM_LAMBDA {
        Vec sum[many.value][columns.value];
        product_tile<many.value, columns.value, 1, kRows>(factors + r, d.tasks, d.hidden + c * kLanes, d.padded, sum);
        HM_EACH(a, many.value) {
          HM_EACH(b, columns.value) {
            const int64_t column = (c + b) * kLanes;
            WriteGradient::take(to, sum[a][b], at + (r + a) * d.width + column, d.width - column);
          }
        }
      });
    });
  }
};

}  // namespace
}  // namespace hypermask
