// Argument checks of the ops over the hypernetwork's dense output layer.
#pragma once

#include "checks.h"
#include "rounding.h"

namespace hypermask {

inline void check_dense(const char* op, const Tensor& hidden, const Tensor& weight, const Tensor& bias, Place place) {
  check_float(op, "hidden", hidden, place);
  check_float(op, "weight", weight, place);
  if (weight.dim() != 2) fail(op, "weight must have shape (N, H), not ", to_string(shape_of(weight)));
  if (weight.size(1) < 1) fail(op, "weight must have at least one column");
  check_float(op, "bias", bias, place, {weight.size(0)});
}

inline void check_output_drift(const char* op, const Tensor& hidden, const Tensor& weight, const Tensor& bias,
                               const Tensor& targets, Place place) {
  check_dense(op, hidden, weight, bias, place);
  if (hidden.dim() != 3) fail(op, "hidden must have shape (T, 1, H), not ", to_string(shape_of(hidden)));
  if (hidden.size(1) != 1)
    fail(op, "hidden has ", hidden.size(1), " chunks; the kernel serves the dense layer, one chunk");
  const int64_t tasks = hidden.size(0);
  check_float(op, "hidden", hidden, place, {tasks, 1, weight.size(1)});
  check_float(op, "targets", targets, place, {tasks, weight.size(0)});
}

// What the step and the hidden gradient share: the rows of factors, one per hidden vector, and their scales.
inline void check_factors(const char* op, const Tensor& factors, const Tensor& scales, const Tensor& weight,
                          Place place) {
  check_float(op, "weight", weight, place);
  if (weight.dim() != 2) fail(op, "weight must have shape (N, H), not ", to_string(shape_of(weight)));
  if (weight.size(1) < 1) fail(op, "weight must have at least one column");
  if (factors.dim() != 2) fail(op, "factors must have shape (K, N), not ", to_string(shape_of(factors)));
  check_float(op, "factors", factors, place, {factors.size(0), weight.size(0)});
  check_float(op, "scales", scales, place, {factors.size(0)});
}

inline void check_residuals(const char* op, const Tensor& hidden, const Tensor& weight, const Tensor& bias,
                            const Tensor& targets, Place place) {
  check_dense(op, hidden, weight, bias, place);
  if (hidden.dim() != 2 || hidden.size(0) < 1) {
    fail(op, "hidden must have shape (t + 1, H), not ", to_string(shape_of(hidden)));
  }
  check_float(op, "hidden", hidden, place, {hidden.size(0), weight.size(1)});
  check_float(op, "targets", targets, place, {hidden.size(0) - 1, weight.size(0)});
}

inline bool in_bfloat16(const Tensor& t) { return t.scalar_type() == ScalarType::BFloat16; }

inline Bfloat16* mutable_bfloat16(const Tensor& t) { return static_cast<Bfloat16*>(t.mutable_data_ptr()); }

// Of the weight, both in float32 or both in bfloat16.
inline void check_moments(const char* op, const Tensor& weight_m, const Tensor& weight_v, Place place,
                          const Shape& shape) {
  const ScalarType dtype = in_bfloat16(weight_m) ? ScalarType::BFloat16 : ScalarType::Float;
  check_tensor(op, "weight_m", weight_m, place, dtype, shape);
  check_tensor(op, "weight_v", weight_v, place, dtype, shape);
}

inline void check_factored_adam(const char* op, const Tensor& factors, const Tensor& scales, const Tensor& hidden,
                                const Tensor& weight, const Tensor& weight_m, const Tensor& weight_v,
                                const Tensor& step, const Tensor& lr, Place place) {
  check_factors(op, factors, scales, weight, place);
  const int64_t rows = weight.size(0), width = weight.size(1);
  check_float(op, "hidden", hidden, place, {factors.size(0), width});
  check_moments(op, weight_m, weight_v, place, {rows, width});
  check_scalar(op, "step", step, place);
  check_scalar(op, "lr", lr, place);
  if (rows > 0 &&
      (weight.const_data_ptr() == weight_m.const_data_ptr() || weight.const_data_ptr() == weight_v.const_data_ptr() ||
       weight_m.const_data_ptr() == weight_v.const_data_ptr())) {
    fail(op, "weight, weight_m and weight_v must not share memory");
  }
}

inline void check_adam(const char* op, const Tensor& hidden, const Tensor& grad_logits, const Tensor& targets,
                       const Tensor& drift_weight, const Tensor& weight, const Tensor& bias, const Tensor& weight_m,
                       const Tensor& weight_v, const Tensor& bias_m, const Tensor& bias_v, const Tensor& step,
                       const Tensor& lr, Place place) {
  check_residuals(op, hidden, weight, bias, targets, place);
  const int64_t rows = weight.size(0), width = weight.size(1);
  check_float(op, "grad_logits", grad_logits, place, {rows});
  check_scalar(op, "drift_weight", drift_weight, place);
  check_scalar(op, "step", step, place);
  check_scalar(op, "lr", lr, place);
  check_moments(op, weight_m, weight_v, place, {rows, width});
  check_float(op, "bias_m", bias_m, place, {rows});
  check_float(op, "bias_v", bias_v, place, {rows});
  if (rows > 0 &&
      (weight.const_data_ptr() == weight_m.const_data_ptr() || weight.const_data_ptr() == weight_v.const_data_ptr() ||
       weight_m.const_data_ptr() == weight_v.const_data_ptr() || bias_m.const_data_ptr() == bias_v.const_data_ptr())) {
    fail(op, "weight, weight_m and weight_v must not share memory, nor bias_m and bias_v");
  }
}

}  // namespace hypermask
