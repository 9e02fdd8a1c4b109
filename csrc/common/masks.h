// Argument checks of the ops over masks and masked weights.
#pragma once

#include "checks.h"

namespace hypermask {

inline void check_weights(const char* op, const char* name, const Tensors& weights, const Offsets& offsets,
                          Place place) {
  if (static_cast<int64_t>(weights.size()) > segments(offsets)) {
    fail(op, "got ", weights.size(), " ", name, " but offsets of ", segments(offsets), " segments");
  }
  for (size_t s = 0; s < weights.size(); ++s) {
    check_float(op, name, weights[s], place);
    if (weights[s].numel() != offsets[s + 1] - offsets[s]) {
      fail(op, name, " ", s, " has ", weights[s].numel(), " entries, its segment ", offsets[s + 1] - offsets[s]);
    }
  }
}

// Rows that share one threshold each; the threshold's shape is that of the logits with trailing dimensions left out
// or 1.
inline int64_t check_mask(const char* op, const Tensor& logits, const Tensor& threshold, Place place) {
  check_float(op, "logits", logits, place);
  check_float(op, "threshold", threshold, place);
  const int64_t rows = threshold.numel();
  if (rows == 1) return 1;
  Shape leading = shape_of(threshold);
  const Shape shape = shape_of(logits);
  while (!leading.empty() && leading.back() == 1) leading.pop_back();
  if (threshold.dim() != logits.dim() || leading.size() > shape.size() ||
      !std::equal(leading.begin(), leading.end(), shape.begin())) {
    fail(op, "threshold of shape ", to_string(shape_of(threshold)), " is not one per leading row of logits of shape ",
         to_string(shape));
  }
  return rows;
}

// One weight with logits of its own, and one threshold.
inline void check_masked_weight(const char* op, const Tensor& weight, const Tensor& logits, const Tensor& threshold,
                                Place place) {
  check_float(op, "weight", weight, place);
  check_float(op, "logits", logits, place, shape_of(weight));
  check_scalar(op, "threshold", threshold, place);
}

inline void check_masked(const char* op, const Tensors& weights, const Tensor& logits, const Tensor& thresholds,
                         const Offsets& offsets, Place place) {
  check_float(op, "logits", logits, place);
  if (logits.dim() != 1) fail(op, "logits must be flat, not of shape ", to_string(shape_of(logits)));
  check_offsets(op, offsets, logits.numel());
  check_float(op, "thresholds", thresholds, place, {segments(offsets)});
  check_weights(op, "weights", weights, offsets, place);
}

inline void check_drift(const char* op, const Tensors& weights, const Tensor& previous, const Offsets& offsets,
                        int64_t norm, const std::optional<Tensor>& logits, const std::optional<Tensor>& thresholds,
                        Place place) {
  check_float(op, "previous", previous, place);
  if (previous.dim() != 1) fail(op, "previous must be flat, not of shape ", to_string(shape_of(previous)));
  check_offsets(op, offsets, previous.numel());
  check_weights(op, "weights", weights, offsets, place);
  if (norm != 1 && norm != 2) fail(op, "norm must be 1 or 2, not ", norm);
  if (logits.has_value() != thresholds.has_value()) fail(op, "logits and thresholds go together, one is missing");
  if (logits) {
    check_float(op, "logits", *logits, place, {previous.numel()});
    check_float(op, "thresholds", *thresholds, place, {segments(offsets)});
  }
}

inline void check_grads(const char* op, const Tensors& grads, const Tensors& weights, const Offsets& offsets,
                        Place place) {
  if (grads.size() != weights.size()) fail(op, "got ", grads.size(), " grads for ", weights.size(), " weights");
  check_weights(op, "grads", grads, offsets, place);
}

inline void check_drift_backward(const char* op, const Tensor& grad, const Tensor& norms, const Tensors& weights,
                                 const Tensor& previous, const Offsets& offsets, int64_t norm,
                                 const std::optional<Tensor>& logits, const std::optional<Tensor>& thresholds,
                                 Place place) {
  check_drift(op, weights, previous, offsets, norm, logits, thresholds, place);
  const Shape shape = {static_cast<int64_t>(weights.size())};
  check_float(op, "grad", grad, place, shape);
  check_float(op, "norms", norms, place, shape);
}

}  // namespace hypermask
