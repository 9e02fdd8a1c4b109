// Argument checks of the ops for a few rows of x, in float32, float16 or bfloat16.
#pragma once

#include "checks.h"

namespace hypermask {

inline const char* name_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    default:
      return "";
  }
}

// Of the dtype of `like`, contiguous, of the shape given.
inline void check_like(const char* op, const char* name, const Tensor& t, const Tensor& like, Place place,
                       const Shape& shape) {
  if (t.scalar_type() != like.scalar_type()) {
    fail(op, name, " must be ", name_of(like.scalar_type()), " like x");
  }
  check_tensor(op, name, t, place, t.scalar_type());
  if (shape_of(t) != shape) fail(op, name, " must have shape ", to_string(shape), ", not ", to_string(shape_of(t)));
}

inline void check_few_rows(const char* op, const Tensor& x, const Tensor& weight, const Tensor& threshold,
                           const std::optional<Tensor>& bias, Place place, int64_t most_rows) {
  if (!*name_of(x.scalar_type())) fail(op, "x must be float32, float16 or bfloat16");
  check_tensor(op, "x", x, place, x.scalar_type());
  if (x.dim() != 2) fail(op, "x must have shape (rows, in), not ", to_string(shape_of(x)));
  if (x.size(0) > most_rows) fail(op, "x has ", x.size(0), " rows, more than ", most_rows);
  if (weight.dim() != 2) fail(op, "weight must have shape (out, in), not ", to_string(shape_of(weight)));
  check_like(op, "weight", weight, x, place, {weight.size(0), x.size(1)});
  if (threshold.scalar_type() != ScalarType::Float && threshold.scalar_type() != x.scalar_type()) {
    fail(op, "threshold must be float32 or ", name_of(x.scalar_type()), " like x");
  }
  check_tensor(op, "threshold", threshold, place, threshold.scalar_type());
  if (threshold.numel() != 1) fail(op, "threshold must have one entry, not ", threshold.numel());
  if (bias) check_like(op, "bias", *bias, x, place, {weight.size(0)});
}

inline void check_chunks(const char* op, const Tensor& weight, const Tensor& hidden, const Tensor& output_weight,
                         const Tensor& output_bias, int64_t start, Place place) {
  if (weight.scalar_type() == ScalarType::Float) fail(op, "x must be float16 or bfloat16");
  if (hidden.dim() != 2) fail(op, "hidden must have shape (chunks, H), not ", to_string(shape_of(hidden)));
  if (output_weight.dim() != 2) {
    fail(op, "output_weight must have shape (C, H), not ", to_string(shape_of(output_weight)));
  }
  const int64_t chunks = hidden.size(0), chunk_size = output_weight.size(0), width = hidden.size(1);
  if (width > 512) fail(op, "hidden is ", width, " wide, more than 512");
  check_like(op, "hidden", hidden, weight, place, {chunks, width});
  check_like(op, "output_weight", output_weight, weight, place, {chunk_size, width});
  check_like(op, "output_bias", output_bias, weight, place, {chunk_size});
  // Sizes of tensors that have memory: their product can't overflow unless it has none to begin with.
  if (start < 0 || weight.numel() > chunks * chunk_size || start > chunks * chunk_size - weight.numel()) {
    fail(op, "entries ", start, " to ", start + weight.numel(), " lie outside the ", chunks * chunk_size,
         " that the chunks generate");
  }
}

}  // namespace hypermask
