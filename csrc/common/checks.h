// Argument checks shared by the CPU and CUDA ops. They run before any memory is touched and throw a one-line error.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace hypermask {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Shape = std::vector<int64_t>;

template <class... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream message;
  message << op << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline Shape shape_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return Shape(sizes.begin(), sizes.end());
}

inline std::string to_string(const Shape& shape) {
  std::ostringstream text;
  text << "(";
  for (size_t i = 0; i < shape.size(); ++i) text << (i ? ", " : "") << shape[i];
  text << ")";
  return text.str();
}

// Where all of an op's tensors must be: on the CPU, or on one GPU.
struct Place {
  bool gpu;
  int32_t index;  // of the GPU

  static const Place kCpu;
  static Place gpu_of(const Tensor& t) { return {true, t.get_device_index()}; }
};
inline const Place Place::kCpu = {false, 0};

inline void check_tensor(const char* op, const char* name, const Tensor& t, Place place, ScalarType dtype) {
  if (place.gpu ? !t.is_cuda() : !t.is_cpu()) {
    fail(op, name, " must be on the ", place.gpu ? "GPU" : "CPU", " like the other arguments");
  }
  if (place.gpu && t.get_device_index() != place.index) {
    fail(op, name, " must be on GPU ", place.index, " like the other arguments, not on GPU ", t.get_device_index());
  }
  if (t.scalar_type() != dtype) fail(op, name, " must be ", dtype == ScalarType::Float ? "float32" : "int64");
  if (!t.is_contiguous()) fail(op, name, " must be contiguous");
}

inline void check_float(const char* op, const char* name, const Tensor& t, Place place) {
  check_tensor(op, name, t, place, ScalarType::Float);
}

inline void check_float(const char* op, const char* name, const Tensor& t, Place place, const Shape& shape) {
  check_float(op, name, t, place);
  if (shape_of(t) != shape) fail(op, name, " must have shape ", to_string(shape), ", not ", to_string(shape_of(t)));
}

inline void check_scalar(const char* op, const char* name, const Tensor& t, Place place) {
  check_float(op, name, t, place);
  if (t.numel() != 1) fail(op, name, " must have one entry, not ", t.numel());
}

inline void check_offsets(const char* op, const std::vector<int64_t>& offsets, int64_t size) {
  if (offsets.empty()) fail(op, "offsets must have at least one border");
  if (offsets.front() < 0) fail(op, "offsets must not be negative");
  for (size_t s = 1; s < offsets.size(); ++s) {
    if (offsets[s] < offsets[s - 1]) fail(op, "offsets must ascend, but ", offsets[s - 1], " comes before ", offsets[s]);
  }
  if (offsets.back() > size) fail(op, "offsets end at ", offsets.back(), ", beyond the ", size, " entries");
}

inline int64_t segments(const std::vector<int64_t>& offsets) { return static_cast<int64_t>(offsets.size()) - 1; }

inline void check_weights(const char* op, const char* name, const std::vector<Tensor>& weights,
                          const std::vector<int64_t>& offsets, Place place) {
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

inline int64_t check_thresholds(const char* op, const Tensor& logits, const std::vector<int64_t>& offsets,
                                const Tensor& ranks, Place place) {
  check_float(op, "logits", logits, place);
  if (logits.dim() < 1) fail(op, "logits must have at least one dimension");
  const int64_t entries = logits.size(logits.dim() - 1);
  check_offsets(op, offsets, entries);
  check_tensor(op, "ranks", ranks, place, ScalarType::Long);
  if (ranks.dim() != 1 || ranks.numel() != segments(offsets)) {
    fail(op, "ranks must have shape (", segments(offsets), ",), not ", to_string(shape_of(ranks)));
  }
  for (size_t s = 1; s < offsets.size(); ++s) {  // entries are counted in 32 bits
    const int64_t size = offsets[s] - offsets[s - 1];
    if (size > UINT32_MAX) fail(op, "segment ", s - 1, " has ", size, " entries, more than 2^32 - 1");
  }
  return entries;
}

// Rows that share one threshold each; the threshold's shape is that of the logits with trailing dimensions left out or 1.
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

inline void check_masked(const char* op, const std::vector<Tensor>& weights, const Tensor& logits,
                         const Tensor& thresholds, const std::vector<int64_t>& offsets, Place place) {
  check_float(op, "logits", logits, place);
  if (logits.dim() != 1) fail(op, "logits must be flat, not of shape ", to_string(shape_of(logits)));
  check_offsets(op, offsets, logits.numel());
  check_float(op, "thresholds", thresholds, place, {segments(offsets)});
  check_weights(op, "weights", weights, offsets, place);
}

inline void check_drift(const char* op, const std::vector<Tensor>& weights, const Tensor& previous,
                        const std::vector<int64_t>& offsets, int64_t norm, const std::optional<Tensor>& logits,
                        const std::optional<Tensor>& thresholds, Place place) {
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

inline void check_grads(const char* op, const std::vector<Tensor>& grads, const std::vector<Tensor>& weights,
                        const std::vector<int64_t>& offsets, Place place) {
  if (grads.size() != weights.size()) fail(op, "got ", grads.size(), " grads for ", weights.size(), " weights");
  check_weights(op, "grads", grads, offsets, place);
}

inline void check_drift_backward(const char* op, const Tensor& grad, const Tensor& norms,
                                 const std::vector<Tensor>& weights, const Tensor& previous,
                                 const std::vector<int64_t>& offsets, int64_t norm,
                                 const std::optional<Tensor>& logits, const std::optional<Tensor>& thresholds,
                                 Place place) {
  check_drift(op, weights, previous, offsets, norm, logits, thresholds, place);
  const Shape shape = {static_cast<int64_t>(weights.size())};
  check_float(op, "grad", grad, place, shape);
  check_float(op, "norms", norms, place, shape);
}

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
  if (hidden.size(1) != 1) fail(op, "hidden has ", hidden.size(1), " chunks; the kernel serves the dense layer, one chunk");
  const int64_t tasks = hidden.size(0);
  check_float(op, "hidden", hidden, place, {tasks, 1, weight.size(1)});
  check_float(op, "targets", targets, place, {tasks, weight.size(0)});
}

inline void check_adam(const char* op, const Tensor& hidden, const Tensor& grad_logits, const Tensor& targets,
                       const Tensor& drift_weight, const Tensor& weight, const Tensor& bias, const Tensor& weight_m,
                       const Tensor& weight_v, const Tensor& bias_m, const Tensor& bias_v, const Tensor& step,
                       const Tensor& lr, Place place) {
  check_dense(op, hidden, weight, bias, place);
  const int64_t rows = weight.size(0), width = weight.size(1);
  if (hidden.dim() != 2 || hidden.size(0) < 1) {
    fail(op, "hidden must have shape (t + 1, H), not ", to_string(shape_of(hidden)));
  }
  check_float(op, "hidden", hidden, place, {hidden.size(0), width});
  check_float(op, "grad_logits", grad_logits, place, {rows});
  check_float(op, "targets", targets, place, {hidden.size(0) - 1, rows});
  check_scalar(op, "drift_weight", drift_weight, place);
  check_scalar(op, "step", step, place);
  check_scalar(op, "lr", lr, place);
  check_float(op, "weight_m", weight_m, place, {rows, width});
  check_float(op, "weight_v", weight_v, place, {rows, width});
  check_float(op, "bias_m", bias_m, place, {rows});
  check_float(op, "bias_v", bias_v, place, {rows});
  if (rows > 0 && (weight.const_data_ptr() == weight_m.const_data_ptr() ||
                   weight.const_data_ptr() == weight_v.const_data_ptr() ||
                   weight_m.const_data_ptr() == weight_v.const_data_ptr() ||
                   bias_m.const_data_ptr() == bias_v.const_data_ptr())) {
    fail(op, "weight, weight_m and weight_v must not share memory, nor bias_m and bias_v");
  }
}

inline const float* data(const Tensor& t) { return t.const_data_ptr<float>(); }
inline float* mutable_data(const Tensor& t) { return t.mutable_data_ptr<float>(); }

inline Tensor empty_float(const Tensor& like, const Shape& shape) {
  return torch::stable::new_empty(like, shape, ScalarType::Float);
}

}  // namespace hypermask
