// The pass over the hypernetwork's dense output layer, a block of rows at a time.
//
// For the rows p of a block: residuals r_jp = W_p.h_j + b_p - target_jp of the earlier tasks, g_jp = 2 dLoss/dR r_jp
// (for the current task g_p is given), dh_j += g_jp W_p, dW_p = sum_j g_jp h_j, db_p = sum_j g_jp, then Adam on the
// block while it is in the cache. W, m and v are read and written once; the gradient never leaves the cache. The same
// rows in two passes: the residuals are kept by the forward pass, a first pass gives dh and db from them, and a second
// one dW and Adam.
#pragma once

#include "kernels.h"
#include "simd.h"

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
constexpr int kAdamWork = 12;                        // Adam on an entry takes about as long as this many multiply-adds

// For lambdas in the inner loops: as calls they would cost as much as a narrow layer's whole product.
#define HM_LAMBDA __attribute__((always_inline))

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

// A total split into the fewest tiles of at most kMax, of nearly equal size. Made once, or once a block: it takes a
// division.
template <int kMax>
struct Tiles {
  int64_t count, size, larger;  // the first `larger` tiles have one more

  static Tiles of(int64_t total) {
    const int64_t count = (total + kMax - 1) / kMax;
    return {count, count ? total / count : 0, count ? total % count : 0};
  }
};

// f(Size, start) for every tile.
template <int kMax, class F>
HM_INLINE void for_tiles(const Tiles<kMax>& tiles, const F& f) {
  int64_t begin = 0;
  for (int64_t k = 0; k < tiles.count; ++k) {
    const int64_t size = tiles.size + (k < tiles.larger);
    with_size<kMax>(static_cast<int>(size), [&](auto n) HM_LAMBDA { f(n, begin); });
    begin += size;
  }
}

// How the products of a layer are cut.
struct Cut {
  int64_t vectors;  // of a row
  Tiles<kDotTasks> dot_tasks;
  Tiles<kHiddenTasks> hidden_tasks;
  Tiles<kOuterColumns> outer_columns;

  static Cut of(const DenseLayer& d) {
    const int64_t vectors = (d.width + kLanes - 1) / kLanes;
    return {vectors, Tiles<kDotTasks>::of(d.drift_tasks), Tiles<kHiddenTasks>::of(d.tasks),
            Tiles<kOuterColumns>::of(vectors)};
  }
};

// Asks for a later block of W, m and v a few cache lines at a time, in step with the work on this one: so the memory is
// busy all through the block, not only where the block itself reads and writes. Narrow layers' next block comes into
// the L1 cache; where that can't hold it beside this one, the block after the next comes into L2, as more lines can be
// under way there.
class Ahead {
 public:
  // hidden: whether the hidden vectors' gradient is part of the work.
  HM_INLINE Ahead of_block(const DenseLayer& d, int64_t row, bool hidden) {
    Ahead a;
    a.arrays_ = d.weight_out ? 3 : 1;
    a.halves_ = d.rounded_m != nullptr;
    const int64_t bytes = d.weight_out ? (a.halves_ ? 8 : 12) : 4;  // of an entry
    a.near_ = 2 * bytes * kBlockRows * d.width <= (a.halves_ ? kNearHalves : kNear);
    const int64_t later = (row + (a.near_ ? 1 : 2) * kBlockRows) * d.width;
    a.array_[0] = reinterpret_cast<const char*>(d.weight + later);
    a.array_[1] =
        reinterpret_cast<const char*>(a.halves_ ? static_cast<const void*>(d.rounded_m + later) : d.weight_m + later);
    a.array_[2] =
        reinterpret_cast<const char*>(a.halves_ ? static_cast<const void*>(d.rounded_v + later) : d.weight_v + later);
    a.lines_ = kBlockRows * d.width * 4 / kLine;
    const bool weights = d.weight_out || d.grad_weight;
    a.work_ = kBlockRows * ((d.factors ? 0 : d.drift_tasks) + hidden * d.tasks + weights * (d.tasks + kAdamWork));
    if (a.work_ == 0) a.work_ = 1;  // no tasks: there is nothing to do in the meantime
    return a;
  }

  // `work` more multiply-adds per column are done.
  HM_INLINE void advance(Ahead& a, int64_t work) {
    a.done_ += work * a.lines_;
    for (; a.asked_ < a.lines_ && a.asked_ * a.work_ < a.done_; ++a.asked_) {
      const int arrays = a.halves_ && a.asked_ % 2 ? 1 : a.arrays_;  // with half as many lines of the others
      for (int i = 0; i < arrays; ++i) {
        const char* line = a.array_[i] + (i && a.halves_ ? a.asked_ / 2 : a.asked_) * kLine;
        a.near_ ? __builtin_prefetch(line, 0, 3) : __builtin_prefetch(line, 0, 2);
      }
    }
  }

 private:
  // Bytes; the L1 cache has 32768 and holds other things as well. With moments in bfloat16 more of it pays, as less is
  // waited for: the arithmetic is the same for fewer bytes.
  static constexpr int64_t kLine = 64, kNear = 20480, kNearHalves = 25600;
  const char* array_[3];
  int arrays_;
  bool near_, halves_;  // halves_: the moments are in bfloat16
  int64_t lines_, work_, done_ = 0, asked_ = 0;
};

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
#pragma GCC unroll 8
    for (int r = 0; r < 4; ++r) row[r] = load_w(w + r * width + k);
#pragma GCC unroll 8
    for (int j = 0; j < kTasks; ++j) {
      const Vec hj = load(h + j * padded + k);
#pragma GCC unroll 8
      for (int r = 0; r < 4; ++r) sum[j][r] += row[r] * hj;
    }
  };
  const int64_t whole = width / kLanes * kLanes;
  const int rest = static_cast<int>(width - whole);
  for (int64_t k = 0; k < whole; k += kLanes) step(k, [](const float* p) { return load(p); });
  if (rest) step(whole, [rest](const float* p) { return load_part(p, rest); });
  Quad sums[kTasks];
  sum_lanes(sum, sums);
#pragma GCC unroll 8
  for (int j = 0; j < kTasks; ++j) std::memcpy(out + j * kBlockRows, &sums[j], sizeof sums[j]);
}

// factors[j][r] = W_r . h_j for the drift tasks and the rows of a block.
HM_INLINE void block_dots(const DenseLayer& d, const Cut& cut, const float* w, int rows, float* factors, Ahead& ahead) {
  int r = 0;
  for (; r + 4 <= rows; r += 4) {
    for_tiles(cut.dot_tasks, [&](auto tasks, int64_t j) HM_LAMBDA {
      dots<tasks.value>(w + r * d.width, d.width, d.hidden + j * d.padded, d.padded, factors + j * kBlockRows + r);
    });
    Ahead::advance(ahead, 4 * d.drift_tasks);
  }
  for (; r < rows; ++r) {
    for (int64_t j = 0; j < d.drift_tasks; ++j) {
      factors[j * kBlockRows + r] = sum_lanes(row_dot(w + r * d.width, d.width, d.hidden + j * d.padded));
    }
  }
}

// factors: dots -> g = coefficient (dot + b - target). Returns the sum of squared residuals.
HM_INLINE double residuals(const DenseLayer& d, int64_t row, int rows, float* factors) {
  double total = 0;
  for (int64_t j = 0; j < d.drift_tasks; ++j) {
    Vec sum{};
    __builtin_prefetch(d.targets + j * d.rows + row + kBlockRows, 0, 3);
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

// out[j] = dots + b - target_j for the rows of a block; the last task's, and all where there are none, without a
// target. Returns the squares of those with one.
HM_INLINE double write_residuals(const DenseLayer& d, int64_t row, int rows, const float* dots, float* out) {
  double total = 0;
  const int64_t last = d.drift_tasks - 1;
  for (int64_t j = 0; j <= last; ++j) {
    Vec sum{};
    float* to = out + j * d.rows + row;
    const float* target = d.targets && j < last ? d.targets + j * d.rows + row : nullptr;
    if (target) __builtin_prefetch(target + kBlockRows, 0, 3);
    __builtin_prefetch(to + kBlockRows, 1, 3);
    for (int r = 0; r < rows; r += kLanes) {
      Vec x = load_up_to(dots + j * kBlockRows + r, rows - r) + load_up_to(d.bias + row + r, rows - r);
      if (target) {
        x = x - load_up_to(target + r, rows - r);
        sum += x * x;
      }
      store_up_to(to + r, x, rows - r);
    }
    total += sum_lanes(sum);
  }
  return total;
}

// factors[j][r] = scales[j] times the row's given factor.
HM_INLINE void scaled_factors(const DenseLayer& d, int64_t row, int rows, float* factors) {
  for (int64_t j = 0; j < d.tasks; ++j) {
    const float* from = d.factors + j * d.rows + row;
    __builtin_prefetch(from + kBlockRows, 0, 3);
    for (int r = 0; r < rows; r += kLanes) {
      store_up_to(factors + j * kBlockRows + r, d.scales[j] * load_up_to(from + r, rows - r), rows - r);
    }
  }
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
#pragma GCC unroll 8
      for (int j = 0; j < kTasks; ++j) g[j] = broadcast(factors[j * kBlockRows + r]);
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; ++c) {
        const Vec row = column(c);
#pragma GCC unroll 8
        for (int j = 0; j < kTasks; ++j) sum[j][c] += row * g[j];
      }
    } else {
      Vec row[kColumns];
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; ++c) row[c] = column(c);
#pragma GCC unroll 8
      for (int j = 0; j < kTasks; ++j) {
        const float g = factors[j * kBlockRows + r];
#pragma GCC unroll 8
        for (int c = 0; c < kColumns; ++c) sum[j][c] += row[c] * g;
      }
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

HM_INLINE void hidden_gradient(const DenseLayer& d, const Cut& cut, const float* w, int rows, const float* factors,
                               float* grad_hidden, Ahead& ahead) {
  const int rest = static_cast<int>(d.width % kLanes);
  for_tiles(cut.hidden_tasks, [&](auto tasks, int64_t j) HM_LAMBDA {
    for_tiles(Tiles<hidden_columns(tasks.value)>::of(cut.vectors), [&](auto columns, int64_t c) HM_LAMBDA {
      float* out = grad_hidden + j * d.padded + c * kLanes;
      const float* g = factors + j * kBlockRows;
      if (rest && c + columns.value == cut.vectors) {
        hidden_tile<tasks.value, columns.value, true>(w + c * kLanes, d.width, rows, g, out, d.padded, rest);
      } else {
        hidden_tile<tasks.value, columns.value, false>(w + c * kLanes, d.width, rows, g, out, d.padded, rest);
      }
      Ahead::advance(ahead, kBlockRows * tasks.value * columns.value / cut.vectors);
    });
  });
}

// What becomes of a gradient: written, or Adam on the entry at once. `at` counts from the layer's first entry. By
// value, so that the compiler need not fear that a store changes a pointer or a constant.
struct WriteGradient {
  float* grad;
  HM_INLINE void take(WriteGradient to, Vec grad, int64_t at, int64_t count) { store_up_to(to.grad + at, grad, count); }
};

template <class Moment>
struct StepAdam {
  float* w;
  Moment *m, *v;
  AdamStep step;
  Draws draws;  // where the moments are rounded
  HM_INLINE void take(StepAdam to, Vec grad, int64_t at, int64_t count) {
    float* w = to.w + at;
    Moment *m = to.m + at, *v = to.v + at;
    Vec wi = load_up_to(w, count), mi = load_up_to(m, count), vi = load_up_to(v, count);
    adam_update(grad, wi, mi, vi, to.step);
    store_up_to(w, wi, count);
    if constexpr (sizeof(Moment) == 4) {
      store_up_to(m, mi, count);
      store_up_to(v, vi, count);
    } else {
      const Draws& d = to.draws;
      const UnsignedVec x = kLaneNumbers * d.stride + (d.start + d.stride * static_cast<uint32_t>(at));
      store_up_to(m, v, rounded_first(mi, first_bits<Vec>(x)), rounded_second(vi, second_bits<Vec>(x)), count);
    }
  }
};

// grad[r] = sum_j g[j][r] h_j for kRows rows from entry `at` on and kColumns vectors, the last one with `last` floats.
template <int kRows, int kColumns, class To>
HM_INLINE void outer_tile(const float* factors, int64_t tasks, const float* h, int64_t padded, To to, int64_t at,
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
    for (int c = 0; c < kColumns; ++c) {
      To::take(to, sum[r][c], at + r * width + c * kLanes, c < kColumns - 1 ? kLanes : last);
    }
  }
}

template <int kRows, class To>
HM_INLINE void weight_gradient_rows(const DenseLayer& d, const Cut& cut, const float* factors, To to, int64_t row) {
  for_tiles(cut.outer_columns, [&](auto columns, int64_t c) HM_LAMBDA {
    const int64_t last = d.width - (c + columns.value - 1) * kLanes;
    outer_tile<kRows, columns.value>(factors, d.tasks, d.hidden + c * kLanes, d.padded, to, row * d.width + c * kLanes,
                                     d.width, last);
  });
}

template <class To>
HM_INLINE void weight_gradient(const DenseLayer& d, const Cut& cut, int64_t row, int rows, const float* factors, To to,
                               Ahead& ahead) {
  int r = 0;
  for (; r + 2 <= rows; r += 2) {
    weight_gradient_rows<2>(d, cut, factors + r, to, row + r);
    Ahead::advance(ahead, 2 * (d.tasks + kAdamWork));
  }
  if (r < rows) weight_gradient_rows<1>(d, cut, factors + r, to, row + r);
}

HM_INLINE void bias_gradient(const DenseLayer& d, int rows, const float* factors, float* grad) {
  for (int r = 0; r < rows; r += kLanes) {
    Vec sum{};
    for (int64_t j = 0; j < d.tasks; ++j) sum += load_up_to(factors + j * kBlockRows + r, rows - r);
    store_up_to(grad + r, sum, rows - r);
  }
}

// Row after row, in the order of the memory: nothing but the layer is read, and the processor's own prefetching keeps
// up.
void dense_logits(const DenseLayer& d, int64_t begin, int64_t end, float* logits) {
  const auto dot = [&](int64_t row) HM_LAMBDA { return row_dot(d.weight + row * d.width, d.width, d.hidden); };
  int64_t row = begin;
  for (; row + 4 <= end; row += 4) {
    const Vec a = dot(row), b = dot(row + 1), c = dot(row + 2), e = dot(row + 3);
    Quad bias;
    std::memcpy(&bias, d.bias + row, sizeof bias);
    const Quad q = sum_lanes(a, b, c, e) + bias;
    std::memcpy(logits + row, &q, sizeof q);
  }
  for (; row < end; ++row) logits[row] = sum_lanes(dot(row)) + d.bias[row];
}

double dense_value(const DenseLayer& d, int64_t begin, int64_t end, float* scratch) {
  const Cut cut = Cut::of(d);
  double total = 0;
  for (int64_t row = begin; row < end; row += kBlockRows) {
    const int rows = static_cast<int>(end - row < kBlockRows ? end - row : kBlockRows);
    Ahead ahead = Ahead::of_block(d, row, false);
    block_dots(d, cut, d.weight + row * d.width, rows, scratch, ahead);
    total += residuals(d, row, rows, scratch);
  }
  return total;
}

double dense_residuals(const DenseLayer& d, int64_t begin, int64_t end, float* scratch, float* out) {
  const Cut cut = Cut::of(d);
  double total = 0;
  for (int64_t row = begin; row < end; row += kBlockRows) {
    const int rows = static_cast<int>(end - row < kBlockRows ? end - row : kBlockRows);
    Ahead ahead = Ahead::of_block(d, row, false);
    block_dots(d, cut, d.weight + row * d.width, rows, scratch, ahead);
    total += write_residuals(d, row, rows, scratch, out);
  }
  return total;
}

double dense_pass(const DenseLayer& d, int64_t begin, int64_t end, float* factors, float* grad_hidden) {
  const Cut cut = Cut::of(d);
  double total = 0;
  for (int64_t row = begin; row < end; row += kBlockRows) {
    const int rows = static_cast<int>(end - row < kBlockRows ? end - row : kBlockRows);
    const float* w = d.weight + row * d.width;
    Ahead ahead = Ahead::of_block(d, row, grad_hidden != nullptr);
    if (d.factors) {
      scaled_factors(d, row, rows, factors);
    } else {
      block_dots(d, cut, w, rows, factors, ahead);
      total += residuals(d, row, rows, factors);
      if (d.grad_logits) std::memcpy(factors + d.drift_tasks * kBlockRows, d.grad_logits + row, rows * sizeof(float));
    }
    if (grad_hidden) hidden_gradient(d, cut, w, rows, factors, grad_hidden, ahead);
    if (d.grad_bias) bias_gradient(d, rows, factors, d.grad_bias + row);
    if (d.weight_out) {
      if (d.rounded_m) {
        const StepAdam<Bfloat16> step{d.weight_out, d.rounded_m, d.rounded_v, d.adam, d.draws};
        weight_gradient(d, cut, row, rows, factors, step, ahead);
      } else {
        const StepAdam<float> step{d.weight_out, d.weight_m, d.weight_v, d.adam, {}};
        weight_gradient(d, cut, row, rows, factors, step, ahead);
      }
    } else if (d.grad_weight) {
      weight_gradient(d, cut, row, rows, factors, WriteGradient{d.grad_weight}, ahead);
    }
    if (d.bias_out) {
      float grad_bias[kBlockRows];
      bias_gradient(d, rows, factors, grad_bias);
      const StepAdam<float> step{d.bias_out, d.bias_m, d.bias_v, d.adam, {}};
      for (int r = 0; r < rows; r += kLanes) {
        StepAdam<float>::take(step, load_up_to(grad_bias + r, rows - r), row + r, rows - r);
      }
    }
  }
  return total;
}

}  // namespace
}  // namespace hypermask
