// The pass over the hypernetwork's dense output layer, a block of rows at a time.
//
// For the rows p of a block: residuals r_jp = W_p.h_j + b_p - target_jp of the earlier tasks, g_jp = 2 dLoss/dR r_jp
// (for the current task g_p is given), dh_j += g_jp W_p, dW_p = sum_j g_jp h_j, db_p = sum_j g_jp, then Adam on the
// block while it is in the cache. W, m and v are read and written once; the gradient never leaves the cache. The same
// rows in two passes: the residuals are kept by the forward pass, a first pass gives dh and db from them, and a second
// one dW and Adam.
//
// The three products are those of FewTasks or of ManyTasks, by the number of tasks.
#pragma once

#include "kernels_dense_few.h"
#include "kernels_dense_many.h"
#include "kernels_dense_step.h"

namespace hypermask {
namespace {

// What comes to the cache meanwhile, of a row of targets or the like that is worked on `kRows` entries at a time.
template <int kRows, bool kWrite = false>
HM_INLINE void ask_for_next(const float* p) {
  for (int r = 0; r < kRows; r += kLine) __builtin_prefetch(p + kRows + r, kWrite, kRows == kBlockRows ? 3 : 2);
}

// factors: dots -> g = coefficient (dot + b - target). Returns the sum of squared residuals.
template <int kRows>
HM_INLINE double residuals(const DenseLayer& d, int64_t row, int rows, float* factors) {
  double total = 0;
  for (int64_t j = 0; j < d.drift_tasks; ++j) {
    Vec sum{};
    const float* target = d.targets + j * d.rows + row;
    ask_for_next<kRows>(target);
    for (int r = 0; r < rows; r += kLanes) {
      float* f = factors + j * kRows + r;
      const Vec residual =
          (load_up_to(f, rows - r) + load_up_to(d.bias + row + r, rows - r)) - load_up_to(target + r, rows - r);
      sum += residual * residual;
      store_up_to(f, d.coefficient * residual, rows - r);
    }
    total += sum_lanes(sum);
  }
  return total;
}

// out[j] = dots + b - target_j for the rows of a block; the last task's, and all where there are none, without a
// target. Returns the squares of those with one.
template <int kRows>
HM_INLINE double write_residuals(const DenseLayer& d, int64_t row, int rows, const float* dots, float* out) {
  double total = 0;
  const int64_t last = d.drift_tasks - 1;
  for (int64_t j = 0; j <= last; ++j) {
    Vec sum{};
    float* to = out + j * d.rows + row;
    const float* target = d.targets && j < last ? d.targets + j * d.rows + row : nullptr;
    if (target) ask_for_next<kRows>(target);
    ask_for_next<kRows, true>(to);
    for (int r = 0; r < rows; r += kLanes) {
      Vec x = load_up_to(dots + j * kRows + r, rows - r) + load_up_to(d.bias + row + r, rows - r);
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
template <int kRows>
HM_INLINE void scaled_factors(const DenseLayer& d, int64_t row, int rows, float* factors) {
  for (int64_t j = 0; j < d.tasks; ++j) {
    const float* from = d.factors + j * d.rows + row;
    ask_for_next<kRows>(from);
    for (int r = 0; r < rows; r += kLanes) {
      store_up_to(factors + j * kRows + r, d.scales[j] * load_up_to(from + r, rows - r), rows - r);
    }
  }
}

template <int kRows>
HM_INLINE void bias_gradient(const DenseLayer& d, int rows, const float* factors, float* grad) {
  for (int r = 0; r < rows; r += kLanes) {
    Vec sum{};
    for (int64_t j = 0; j < d.tasks; ++j) sum += load_up_to(factors + j * kRows + r, rows - r);
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

constexpr int64_t kStepEntries = 1024;

// Rows whose gradients lie one behind the other while they are stepped, so that Adam works on whole vectors: as many as
// fill these, and then twice as many while they are a small part of the L1 cache.
HM_INLINE int step_rows(const DenseLayer& d) {
  int rows = 1;
  while (rows < kBlockRows && (rows * d.width % kLanes || 2 * rows * d.width <= kStepEntries)) rows *= 2;
  return rows;
}

// f(row, rows, ahead) of every block of the rows begin to end; returns the sum of what that gives.
template <class Products, class F>
HM_INLINE double sum_of_blocks(const DenseLayer& d, int64_t begin, int64_t end, bool hidden, const F& f) {
  double total = 0;
  for (int64_t row = begin; row < end; row += Products::kRows) {
    const int rows = static_cast<int>(end - row < Products::kRows ? end - row : Products::kRows);
    AheadOfProducts ahead = AheadOfProducts::of_block(d, row, Products::kRows, hidden);
    total += f(row, rows, ahead);
  }
  return total;
}

// The scratch memory of a block: factors, then gradients, then what the products pack.
template <class Products>
HM_INLINE float* gradients_in(const DenseLayer& d, float* scratch) {
  return scratch + Products::kRows * d.tasks;
}
template <class Products>
HM_INLINE Products products_in(const DenseLayer& d, float* scratch) {
  return Products::of(d, gradients_in<Products>(d, scratch) + kBlockRows * d.padded);
}

template <class Products>
double value_by(const DenseLayer& d, int64_t begin, int64_t end, float* scratch) {
  const Products products = products_in<Products>(d, scratch);
  return sum_of_blocks<Products>(d, begin, end, false, [&](int64_t row, int rows, AheadOfProducts& ahead) HM_LAMBDA {
    Products::dot_products(products, d, row, rows, scratch, ahead);
    return residuals<Products::kRows>(d, row, rows, scratch);
  });
}

template <class Products>
double residuals_by(const DenseLayer& d, int64_t begin, int64_t end, float* scratch, float* out) {
  const Products products = products_in<Products>(d, scratch);
  return sum_of_blocks<Products>(d, begin, end, false, [&](int64_t row, int rows, AheadOfProducts& ahead) HM_LAMBDA {
    Products::dot_products(products, d, row, rows, scratch, ahead);
    return write_residuals<Products::kRows>(d, row, rows, scratch, out);
  });
}

// The weight's gradient of a block's rows, and what becomes of it.
template <class Products>
HM_INLINE void step_rows_of(const Products& products, const DenseLayer& d, int64_t row, int rows, const float* factors,
                            float* gradients, bool hidden) {
  const AheadOfStep ahead = AheadOfStep::of_block(d, Products::kRows, hidden);
  if (d.grad_weight) {
    Products::weight_gradient(products, d, rows, factors, WriteGradient{d.grad_weight}, row * d.width);
  } else if (d.weight_out && (Products::kBuffered || d.rounded_m || d.width <= kManyWidth)) {
    const int at_once = step_rows(d);
    const bool near = next_block_in_l1(d, Products::kRows);
    for (int r = 0; r < rows; r += at_once) {
      const int now = rows - r < at_once ? rows - r : at_once;
      Products::weight_gradient(products, d, now, factors + r, WriteGradient{gradients}, 0);
      step_weight(d, gradients, (row + r) * d.width, now * d.width, ahead, near);
    }
  } else if constexpr (!Products::kBuffered) {  // moments in float32 of a wide layer: the memory decides
    if (d.weight_out) {
      const StepAdam<float> step{d.weight_out, d.weight_m, d.weight_v, d.adam, {}, ahead};
      Products::weight_gradient(products, d, rows, factors, step, row * d.width);
    }
  }
}

template <class Products>
double pass_by(const DenseLayer& d, int64_t begin, int64_t end, float* factors, float* grad_hidden) {
  constexpr int kRows = Products::kRows;
  const Products products = products_in<Products>(d, factors);
  float* gradients = gradients_in<Products>(d, factors);
  return sum_of_blocks<Products>(
      d, begin, end, grad_hidden != nullptr, [&](int64_t row, int rows, AheadOfProducts& ahead) HM_LAMBDA {
        double drift = 0;
        if (d.factors) {
          scaled_factors<kRows>(d, row, rows, factors);
        } else {
          Products::dot_products(products, d, row, rows, factors, ahead);
          drift = residuals<kRows>(d, row, rows, factors);
          if (d.grad_logits) std::memcpy(factors + d.drift_tasks * kRows, d.grad_logits + row, rows * sizeof(float));
        }
        if (grad_hidden) Products::hidden_gradient(products, d, row, rows, factors, grad_hidden, ahead);
        if (d.grad_bias) bias_gradient<kRows>(d, rows, factors, d.grad_bias + row);
        step_rows_of(products, d, row, rows, factors, gradients, grad_hidden != nullptr);
        if (d.bias_out) {
          bias_gradient<kRows>(d, rows, factors, gradients);
          step_bias(d, gradients, row, rows);
        }
        return drift;
      });
}

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
