// The table of CPU kernels: plain functions over raw pointers, compiled once per instruction set.
//
// They are serial. The ops around them, in the other files of csrc/cpu, check arguments, split the work into parts that
// do not depend on the number of threads, and run the parts in parallel.
#pragma once

#include <cstdint>

#include "../common/adam.h"
#include "../common/rounding.h"

namespace hypermask {

constexpr int kBlockRows = 16;  // rows of the dense layer handled together, read three times: the L1 cache holds them

// The dense output layer a_j = W h_j + b, and what its pass over W works on.
// Rows j of hidden and scratch: first the drift tasks (with targets), then, if grad_logits, the current one.
struct DenseLayer {
  int64_t rows;              // N
  int64_t width;             // H
  int64_t padded;            // H rounded up to whole vectors of 16
  int64_t drift_tasks;       // t
  int64_t tasks;             // t, or t + 1 with grad_logits
  const float* weight;       // [N, H]
  const float* bias;         // [N]
  const float* hidden;       // [tasks, padded], padding 0
  const float* targets;      // [t, N]
  const float* grad_logits;  // [N] dLoss/da of the current task, or null
  float coefficient;         // 2 dLoss/dR
  // With factors these are g in place of residuals and grad_logits: g_j = scales[j] factors[j].
  const float* factors;  // [tasks, N] or null
  const float* scales;   // [tasks]
  // gradient mode
  float* grad_weight;  // [N, H] or null
  float* grad_bias;    // [N] or null
  // Adam mode
  float* weight_out;  // the weight again, writable; null in the other modes
  float* bias_out;    // null where the bias is not stepped
  float *weight_m, *weight_v, *bias_m, *bias_v;
  Bfloat16 *rounded_m, *rounded_v;  // in place of weight_m and weight_v: moments in bfloat16, or null
  Draws draws;                      // that these are rounded by
  AdamStep adam;
};

struct Kernels {
  const char* name;
  // counts[digit] of the entries whose higher digits equal prefix; see radix_digit. n < 2^16.
  void (*radix_count)(const float* logits, int64_t n, int pass, uint32_t prefix, uint32_t* counts);
  void (*mask_forward)(const float* logits, float threshold, float* mask, int64_t n);
  void (*mask_backward)(const float* logits, float threshold, const float* grad, float* grad_logits, int64_t n);
  void (*weights_forward)(const float* weight, const float* logits, float threshold, float* out, int64_t n);
  void (*weights_backward)(const float* weight, const float* logits, float threshold, const float* grad,
                           float* grad_weight, float* grad_logits, int64_t n);
  // Sum of |x| (norm 1) or x^2 (norm 2), x = (weight - previous) mask; logits null: no mask. Writes weight * mask to
  // `masked` where that is not null.
  double (*drift_forward)(const float* weight, const float* previous, const float* logits, float threshold, int norm,
                          float* masked, int64_t n);
  // grad_weight and grad_logits of scale * sum |x| (norm 1) or scale * sum x^2 / 2 (norm 2), plus those of
  // <grad, weight * mask> where grad is not null.
  void (*drift_backward)(const float* weight, const float* previous, const float* logits, float threshold, int norm,
                         float scale, const float* grad, float* grad_weight, float* grad_logits, int64_t n);
  // a[row] = W h + b for one hidden vector.
  void (*dense_logits)(const DenseLayer& layer, int64_t begin, int64_t end, float* logits);
  // Sum of squared residuals over rows begin to end and all drift tasks.
  double (*dense_value)(const DenseLayer& layer, int64_t begin, int64_t end, float* scratch);
  // out[j] = W h_j + b - target_j [tasks, N] of all drift tasks; the last one has no target, and none has where targets
  // is null. Returns the sum of squares of those with one.
  double (*dense_residuals)(const DenseLayer& layer, int64_t begin, int64_t end, float* scratch, float* out);
  // dense_value with what follows from it: adding to grad_hidden [tasks, padded], or null, writing gradients or
  // stepping Adam.
  double (*dense_pass)(const DenseLayer& layer, int64_t begin, int64_t end, float* scratch, float* grad_hidden);
};

// From how many tasks on a layer of up to kManyWidth columns is worked on in larger blocks (kernels_dense_many.h). With
// more columns these are no faster.
constexpr int64_t kManyTasks = 16, kManyWidth = 64;
constexpr int kManyRows = 64;

inline bool many_tasks(const DenseLayer& layer) { return layer.tasks >= kManyTasks && layer.padded <= kManyWidth; }

// Floats of scratch that dense_value, dense_residuals and dense_pass need: a factor per task and row of a block, the
// gradients of kBlockRows rows (of their bias: of a block's), and for many tasks the block itself, by rows and by
// columns.
inline int64_t dense_scratch(const DenseLayer& layer) {
  const int64_t gradients = kBlockRows * layer.padded;
  return many_tasks(layer) ? kManyRows * (layer.tasks + 2 * layer.padded) + gradients
                           : kBlockRows * layer.tasks + gradients;
}

const Kernels& kernels_baseline();
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();

}  // namespace hypermask
