// The products of the pass over the dense output layer for few tasks, where the memory decides: blocks of rows that
// stay in the L1 cache.
#pragma once

#include "kernels_dense_step.h"

namespace hypermask {
namespace {

// Tiles are sized so that accumulators and operands fit the registers (32 with AVX-512, else 16), with eight sums or
// more side by side, which is what hides a multiply-add's latency.
constexpr int kDotTasks = kLanes == 16 ? 5 : 3;  // of 4 rows each
constexpr int kHiddenTasks = kLanes == 16 ? 5 : 6;
constexpr int hidden_columns(int tasks) {  // vectors
  return kLanes == 16 ? (tasks <= 2 ? 7 : 4) : tasks == 1 ? 7 : 12 / tasks;
}
constexpr int kOuterColumns = kLanes == 16 ? 7 : 4;  // vectors, of 2 rows each

// W_r . h, still in the lanes of a vector.
HM_INLINE Vec row_dot(const float* w, int64_t width, const float* h) {
  const int64_t whole = width / kLanes * kLanes;
  const int rest = static_cast<int>(width - whole);
  Vec sum{};
  for (int64_t k = 0; k < whole; k += kLanes) sum += load(w + k) * load(h + k);
  if (rest) sum += load_part(w + whole, rest) * load(h + whole);
  return sum;
}

// out[j][r] = W_r . h_j for 4 rows and kTasks tasks, added up in row_dot's order.
template <int kTasks>
HM_INLINE void dots(const float* w, int64_t width, const float* h, int64_t padded, float* out) {
  Vec sum[kTasks][4] = {};
  const auto step = [&](int64_t k, auto load_w) HM_LAMBDA {
    Vec row[4];
    HM_EACH(r, 4) row[r] = load_w(w + r * width + k);
    HM_EACH(j, kTasks) {
      const Vec hj = load(h + j * padded + k);
      HM_EACH(r, 4) sum[j][r] += row[r] * hj;
    }
  };
  const int64_t whole = width / kLanes * kLanes;
  const int rest = static_cast<int>(width - whole);
  for (int64_t k = 0; k < whole; k += kLanes) step(k, [](const float* p) { return load(p); });
  if (rest) step(whole, [rest](const float* p) { return load_part(p, rest); });
  Quad sums[kTasks];
  sum_lanes(sum, sums);
  HM_EACH(j, kTasks) std::memcpy(out + j * kBlockRows, &sums[j], sizeof sums[j]);
}

// grad_hidden[j] += sum_r g[j][r] W_r for kTasks tasks and kColumns vectors; the last one has `rest` lanes if kPart.
// Held in registers beside the sums: whichever is less, a row's vectors or its factors; the others pass one by one.
template <int kTasks, int kColumns, bool kPart>
HM_INLINE void hidden_tile(const float* w, int64_t width, int rows, const float* factors, float* grad_hidden,
                           int64_t padded, int rest) {
  Vec sum[kTasks][kColumns] = {};
  for (int r = 0; r < rows; ++r) {
    const auto column = [&](int c) HM_LAMBDA {
      const float* p = w + r * width + c * kLanes;
      return kPart && c == kColumns - 1 ? load_part(p, rest) : load(p);
    };
    if constexpr (kTasks < kColumns) {
      Vec g[kTasks];
      HM_EACH(j, kTasks) g[j] = broadcast(factors[j * kBlockRows + r]);
      HM_EACH(c, kColumns) {
        const Vec row = column(c);
        HM_EACH(j, kTasks) sum[j][c] += row * g[j];
      }
    } else {
      Vec row[kColumns];
      HM_EACH(c, kColumns) row[c] = column(c);
      HM_EACH(j, kTasks) {
        const float g = factors[j * kBlockRows + r];
        HM_EACH(c, kColumns) sum[j][c] += row[c] * g;
      }
    }
  }
  HM_EACH(j, kTasks) {
    HM_EACH(c, kColumns) {
      float* out = grad_hidden + j * padded + c * kLanes;
      store(out, load(out) + sum[j][c]);
    }
  }
}

// grad[r] = sum_j g[j][r] h_j for kRows rows from entry `at` on and kColumns vectors, the last one with `last` floats.
template <int kRows, int kColumns, class To>
HM_INLINE void outer_tile(const float* factors, int64_t tasks, const float* h, int64_t padded, To to, int64_t at,
                          int64_t width, int64_t last) {
  Vec sum[kRows][kColumns] = {};
  for (int64_t j = 0; j < tasks; ++j) {
    Vec g[kRows];
    HM_EACH(r, kRows) g[r] = broadcast(factors[j * kBlockRows + r]);
    HM_EACH(c, kColumns) {
      const Vec hj = load(h + j * padded + c * kLanes);
      HM_EACH(r, kRows) sum[r][c] += g[r] * hj;
    }
  }
  HM_EACH(r, kRows) {
    HM_EACH(c, kColumns) To::take(to, sum[r][c], at + r * width + c * kLanes, c < kColumns - 1 ? kLanes : last);
  }
}

struct FewTasks {
  static constexpr int kRows = kBlockRows;
  static constexpr bool kBuffered = false;  // a wide layer's gradients go from the registers straight into its step
  int64_t vectors;                          // of a row
  Tiles<kDotTasks> dot_tasks;
  Tiles<kHiddenTasks> hidden_tasks;
  Tiles<kOuterColumns> outer_columns;

  HM_INLINE FewTasks of(const DenseLayer& d, float*) {
    const int64_t vectors = (d.width + kLanes - 1) / kLanes;
    return {vectors, Tiles<kDotTasks>::of(d.drift_tasks), Tiles<kHiddenTasks>::of(d.tasks),
            Tiles<kOuterColumns>::of(vectors)};
  }

  // factors[j][r] = W_r . h_j for the drift tasks and the rows of a block.
  HM_INLINE void dot_products(const FewTasks& p, const DenseLayer& d, int64_t row, int rows, float* factors,
                              AheadOfProducts& ahead) {
    const float* w = d.weight + row * d.width;
    int r = 0;
    for (; r + 4 <= rows; r += 4) {
      for_tiles(p.dot_tasks, [&](auto tasks, int64_t j) HM_LAMBDA {
        dots<tasks.value>(w + r * d.width, d.width, d.hidden + j * d.padded, d.padded, factors + j * kBlockRows + r);
      });
      AheadOfProducts::advance(ahead, 4 * d.width * d.drift_tasks);
    }
    for (; r < rows; ++r) {
      for (int64_t j = 0; j < d.drift_tasks; ++j) {
        factors[j * kBlockRows + r] = sum_lanes(row_dot(w + r * d.width, d.width, d.hidden + j * d.padded));
      }
    }
  }

  // grad_hidden[j] += sum_r g[j][r] W_r.
  HM_INLINE void hidden_gradient(const FewTasks& p, const DenseLayer& d, int64_t row, int rows, const float* factors,
                                 float* grad_hidden, AheadOfProducts& ahead) {
    const float* w = d.weight + row * d.width;
    const int rest = static_cast<int>(d.width % kLanes);
    for_tiles(p.hidden_tasks, [&](auto tasks, int64_t j) HM_LAMBDA {
      for_tiles(Tiles<hidden_columns(tasks.value)>::of(p.vectors), [&](auto columns, int64_t c) HM_LAMBDA {
        float* out = grad_hidden + j * d.padded + c * kLanes;
        const float* g = factors + j * kBlockRows;
        if (rest && c + columns.value == p.vectors) {
          hidden_tile<tasks.value, columns.value, true>(w + c * kLanes, d.width, rows, g, out, d.padded, rest);
        } else {
          hidden_tile<tasks.value, columns.value, false>(w + c * kLanes, d.width, rows, g, out, d.padded, rest);
        }
        AheadOfProducts::advance(ahead, rows * tasks.value * columns.value * kLanes);
      });
    });
  }

  // The gradients sum_j g[j][r] h_j of rows whose first entry is `at`, given `to`.
  template <class To>
  HM_INLINE void weight_gradient(const FewTasks& p, const DenseLayer& d, int rows, const float* factors, To to,
                                 int64_t at) {
    const auto tiles = [&](auto many, int r) HM_LAMBDA {
      for_tiles(p.outer_columns, [&](auto columns, int64_t c) HM_LAMBDA {
        outer_tile<many.value, columns.value>(factors + r, d.tasks, d.hidden + c * kLanes, d.padded, to,
                                              at + r * d.width + c * kLanes, d.width,
                                              d.width - (c + columns.value - 1) * kLanes);
      });
    };
    int r = 0;
    for (; r + 2 <= rows; r += 2) tiles(Size<2>{}, r);
    if (r < rows) tiles(Size<1>{}, r);
  }
};

}  // namespace
}  // namespace hypermask
