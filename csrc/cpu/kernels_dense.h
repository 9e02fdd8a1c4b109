// The pass over the hypernetwork's dense output layer, a block of rows at a time.
//
// For the rows p of a block: residuals r_jp = W_p.h_j + b_p - target_jp of the earlier tasks, g_jp = 2 dLoss/dR r_jp
// (for the current task g_p is given), dh_j += g_jp W_p, dW_p = sum_j g_jp h_j, db_p = sum_j g_jp, then Adam on the
// block while it is in the cache. W, m and v are read and written once; the gradient never leaves the cache.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace hypermask {
namespace {

// Tiles are sized so that accumulators and operands fit the registers (32 with AVX-512, else 16).
constexpr int kTileTasks = kLanes == 16 ? 5 : 2;
constexpr int kTileColumns = kLanes == 16 ? 4 : 3;   // vectors, for dh
constexpr int kTileOuter = kLanes == 16 ? 7 : 4;     // vectors, for dW

// Calls f(integral_constant<int, n>) for 1 <= n <= kMax.
template <int kN>
struct Size {
  static constexpr int value = kN;
};

template <int kMax, class F>
HM_INLINE void with_size(int n, const F& f) {
  if constexpr (kMax == 1) {
    f(Size<1>{});
  } else {
    if (n == kMax) {
      f(Size<kMax>{});
    } else {
      with_size<kMax - 1>(n, f);
    }
  }
}

// Splits total into the fewest tiles of at most kMax, of nearly equal size: f(Size, start).
template <int kMax, class F>
HM_INLINE void for_tiles(int64_t total, const F& f) {
  const int64_t tiles = (total + kMax - 1) / kMax;
  for (int64_t k = 0; k < tiles; ++k) {
    const int64_t begin = total * k / tiles, end = total * (k + 1) / tiles;
    with_size<kMax>(static_cast<int>(end - begin), [&](auto size) { f(size, begin); });
  }
}

// out[j][r] = W_r . h_j for kRows (4 or 1) rows and kTasks tasks.
template <int kRows, int kTasks>
HM_INLINE void dots(const float* w, int64_t width, const float* h, int64_t padded, float* out) {
  Vec sum[kTasks][kRows] = {};
  const auto step = [&](int64_t k, auto load_w) __attribute__((always_inline)) {
    Vec row[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) row[r] = load_w(w + r * width + k);
#pragma GCC unroll 8
    for (int j = 0; j < kTasks; ++j) {
      const Vec hj = load(h + j * padded + k);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sum[j][r] += row[r] * hj;
    }
  };
  const int64_t whole = width / kLanes * kLanes;
  const int rest = static_cast<int>(width - whole);
  for (int64_t k = 0; k < whole; k += kLanes) step(k, [](const float* p) { return load(p); });
  if (rest) step(whole, [rest](const float* p) { return load_part(p, rest); });
#pragma GCC unroll 8
  for (int j = 0; j < kTasks; ++j) {
    if constexpr (kRows == 4) {
      const Quad q = sum_lanes(sum[j][0], sum[j][1], sum[j][2], sum[j][3]);
      std::memcpy(out + j * kBlockRows, &q, sizeof q);
    } else {
      out[j * kBlockRows] = sum_lanes(sum[j][0]);
    }
  }
}

// factors[j][r] = W_r . h_j for the drift tasks and the rows of a block.
HM_INLINE void block_dots(const DenseLayer& d, const float* w, int rows, float* factors) {
  int r = 0;
  for (; r + 4 <= rows; r += 4) {
    for_tiles<kTileTasks>(d.drift_tasks, [&](auto tasks, int64_t j) {
      dots<4, tasks.value>(w + r * d.width, d.width, d.hidden + j * d.padded, d.padded, factors + j * kBlockRows + r);
    });
  }
  for (; r < rows; ++r) {
    for (int64_t j = 0; j < d.drift_tasks; ++j) {
      dots<1, 1>(w + r * d.width, d.width, d.hidden + j * d.padded, d.padded, factors + j * kBlockRows + r);
    }
  }
}

// factors: dots -> g = coefficient (dot + b - target). Returns the sum of squared residuals.
HM_INLINE double residuals(const DenseLayer& d, int64_t row, int rows, float* factors) {
  double total = 0;
  for (int64_t j = 0; j < d.drift_tasks; ++j) {
    Vec sum{};
    for (int r = 0; r < rows; r += kLanes) {
      float* f = factors + j * kBlockRows + r;
      const Vec residual = (load_up_to(f, rows - r) + load_up_to(d.bias + row + r, rows - r)) -
                           load_up_to(d.targets + j * d.rows + row + r, rows - r);
      sum += residual * residual;
      store_up_to(f, d.coefficient * residual, rows - r);
    }
    total += sum_lanes(sum);
  }
  return total;
}

// grad_hidden[j] += sum_r g[j][r] W_r for kTasks tasks and kColumns vectors; the last one has `rest` lanes if kPart.
template <int kTasks, int kColumns, bool kPart>
HM_INLINE void hidden_tile(const float* w, int64_t width, int rows, const float* factors, float* grad_hidden,
                           int64_t padded, int rest) {
  Vec sum[kTasks][kColumns] = {};
  for (int r = 0; r < rows; ++r) {
    Vec row[kColumns];
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) {
      const float* p = w + r * width + c * kLanes;
      row[c] = kPart && c == kColumns - 1 ? load_part(p, rest) : load(p);
    }
#pragma GCC unroll 8
    for (int j = 0; j < kTasks; ++j) {
      const float g = factors[j * kBlockRows + r];
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; ++c) sum[j][c] += row[c] * g;
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < kTasks; ++j) {
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) {
      float* out = grad_hidden + j * padded + c * kLanes;
      store(out, load(out) + sum[j][c]);
    }
  }
}

HM_INLINE void hidden_gradient(const DenseLayer& d, const float* w, int rows, const float* factors,
                               float* grad_hidden) {
  const int64_t vectors = (d.width + kLanes - 1) / kLanes;
  const int rest = static_cast<int>(d.width % kLanes);
  for_tiles<kTileTasks>(d.tasks, [&](auto tasks, int64_t j) {
    for_tiles<kTileColumns>(vectors, [&](auto columns, int64_t c) {
      float* out = grad_hidden + j * d.padded + c * kLanes;
      const float* g = factors + j * kBlockRows;
      if (rest && c + columns.value == vectors) {
        hidden_tile<tasks.value, columns.value, true>(w + c * kLanes, d.width, rows, g, out, d.padded, rest);
      } else {
        hidden_tile<tasks.value, columns.value, false>(w + c * kLanes, d.width, rows, g, out, d.padded, rest);
      }
    });
  });
}

// grad[r] = sum_j g[j][r] h_j for kRows rows and kColumns vectors, the last one with `last` floats.
template <int kRows, int kColumns>
HM_INLINE void outer_tile(const float* factors, int64_t tasks, const float* h, int64_t padded, float* grad,
                          int64_t width, int64_t last) {
  Vec sum[kRows][kColumns] = {};
  for (int64_t j = 0; j < tasks; ++j) {
    Vec g[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) g[r] = broadcast(factors[j * kBlockRows + r]);
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) {
      const Vec hj = load(h + j * padded + c * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sum[r][c] += g[r] * hj;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < kColumns - 1; ++c) store(grad + r * width + c * kLanes, sum[r][c]);
    store_up_to(grad + r * width + (kColumns - 1) * kLanes, sum[r][kColumns - 1], last);
  }
}

template <int kRows>
HM_INLINE void weight_gradient_rows(const DenseLayer& d, const float* factors, float* grad) {
  const int64_t vectors = (d.width + kLanes - 1) / kLanes;
  for_tiles<kTileOuter>(vectors, [&](auto columns, int64_t c) {
    const int64_t last = d.width - (c + columns.value - 1) * kLanes;
    outer_tile<kRows, columns.value>(factors, d.tasks, d.hidden + c * kLanes, d.padded, grad + c * kLanes, d.width,
                                     last);
  });
}

HM_INLINE void adam_vector(const float* grad, float* w, float* m, float* v, const AdamStep& step, int64_t count) {
  Vec wi = load_up_to(w, count), mi = load_up_to(m, count), vi = load_up_to(v, count);
  adam_update(load_up_to(grad, count), wi, mi, vi, step);
  store_up_to(w, wi, count);
  store_up_to(m, mi, count);
  store_up_to(v, vi, count);
}

// Adam on n entries; on the way, what lies `ahead` floats further is asked for, to be written.
HM_INLINE void adam_range(const float* grad, float* w, float* m, float* v, const AdamStep& step, int64_t n,
                          int64_t ahead) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    __builtin_prefetch(w + i + ahead, 1, 2);
    __builtin_prefetch(m + i + ahead, 1, 2);
    __builtin_prefetch(v + i + ahead, 1, 2);
    adam_vector(grad + i, w + i, m + i, v + i, step, kLanes);
  }
  if (i < n) adam_vector(grad + i, w + i, m + i, v + i, step, n - i);
}

HM_INLINE void bias_gradient(const DenseLayer& d, int rows, const float* factors, float* grad) {
  for (int r = 0; r < rows; r += kLanes) {
    Vec sum{};
    for (int64_t j = 0; j < d.tasks; ++j) sum += load_up_to(factors + j * kBlockRows + r, rows - r);
    store_up_to(grad + r, sum, rows - r);
  }
}

void dense_logits(const DenseLayer& d, int64_t begin, int64_t end, float* logits) {
  // The processor's own prefetching stops at every page's end, and the layer is all that is read.
  constexpr int64_t kAhead = 2048;
  int64_t row = begin;
  for (; row + 4 <= end; row += 4) {
    const float* rows = d.weight + row * d.width;
    for (int64_t i = 0; i < 4 * d.width; i += 16) __builtin_prefetch(rows + kAhead + i, 0, 2);
    dots<4, 1>(rows, d.width, d.hidden, d.padded, logits + row);
    for (int r = 0; r < 4; ++r) logits[row + r] += d.bias[row + r];
  }
  for (; row < end; ++row) {
    dots<1, 1>(d.weight + row * d.width, d.width, d.hidden, d.padded, logits + row);
    logits[row] += d.bias[row];
  }
}

double dense_value(const DenseLayer& d, int64_t begin, int64_t end, float* scratch) {
  double total = 0;
  for (int64_t row = begin; row < end; row += kBlockRows) {
    const int rows = static_cast<int>(end - row < kBlockRows ? end - row : kBlockRows);
    block_dots(d, d.weight + row * d.width, rows, scratch);
    total += residuals(d, row, rows, scratch);
  }
  return total;
}

double dense_pass(const DenseLayer& d, int64_t begin, int64_t end, float* scratch, float* grad_hidden) {
  float* factors = scratch;
  float* grad = scratch + d.tasks * kBlockRows;
  double total = 0;
  for (int64_t row = begin; row < end; row += kBlockRows) {
    const int rows = static_cast<int>(end - row < kBlockRows ? end - row : kBlockRows);
    const int64_t at = row * d.width, floats = rows * d.width;
    block_dots(d, d.weight + at, rows, factors);
    total += residuals(d, row, rows, factors);
    if (d.grad_logits) std::memcpy(factors + d.drift_tasks * kBlockRows, d.grad_logits + row, rows * sizeof(float));
    hidden_gradient(d, d.weight + at, rows, factors, grad_hidden);
    float* out = d.grad_weight ? d.grad_weight + at : grad;
    int r = 0;
    for (; r + 2 <= rows; r += 2) weight_gradient_rows<2>(d, factors + r, out + r * d.width);
    if (r < rows) weight_gradient_rows<1>(d, factors + r, out + r * d.width);
    float bias_scratch[kBlockRows];
    float* out_bias = d.grad_bias ? d.grad_bias + row : bias_scratch;
    bias_gradient(d, rows, factors, out_bias);
    if (!d.weight_out) continue;
    adam_range(grad, d.weight_out + at, d.weight_m + at, d.weight_v + at, d.adam, floats, kBlockRows * d.width);
    adam_range(out_bias, d.bias_out + row, d.bias_m + row, d.bias_v + row, d.adam, rows, 0);
  }
  return total;
}

}  // namespace
}  // namespace hypermask
