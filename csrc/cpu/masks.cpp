// Masks, masked weights and weight drift over all segments in one call.
#include <cmath>
#include <tuple>

#include "../common/masks.h"
#include "../common/registration.h"
#include "isa.h"
#include "parts.h"

namespace hypermask {
namespace {

Tensors empty_like_all(const Tensors& tensors) {
  Tensors result;
  result.reserve(tensors.size());
  for (const Tensor& t : tensors) result.push_back(empty_float(t, t.sizes()));
  return result;
}

std::vector<const float*> pointers(const Tensors& tensors) {
  std::vector<const float*> result;
  result.reserve(tensors.size());
  for (const Tensor& t : tensors) result.push_back(data(t));
  return result;
}

std::vector<float*> mutable_pointers(const Tensors& tensors) {
  std::vector<float*> result;
  result.reserve(tensors.size());
  for (const Tensor& t : tensors) result.push_back(mutable_data(t));
  return result;
}

// Zero where no weight's segment lies: logits before the first border and after the last weight.
void clear_outside(float* flat, int64_t size, const Offsets& offsets, size_t weights) {
  std::fill(flat, flat + offsets[0], 0.0f);
  std::fill(flat + offsets[weights], flat + size, 0.0f);
}

std::vector<Part> row_parts(const Tensor& logits, int64_t rows) {
  return cut(std::vector<int64_t>(rows, rows ? logits.numel() / rows : 0));
}

Tensor semi_binary_mask(const Tensor& logits, const Tensor& threshold) {
  const int64_t rows = check_mask("semi_binary_mask", logits, threshold, Place::kCpu);
  Tensor mask = empty_float(logits, logits.sizes());
  const int64_t columns = rows ? logits.numel() / rows : 0;
  const float *a = data(logits), *limit = data(threshold);
  float* out = mutable_data(mask);
  const Kernels& k = kernels();
  for_parts(row_parts(logits, rows), [&](const Part& part, int64_t) {
    const int64_t at = part.item * columns + part.begin;
    k.mask_forward(a + at, limit[part.item], out + at, part.end - part.begin);
  });
  return mask;
}

Tensor semi_binary_mask_backward(const Tensor& grad, const Tensor& logits, const Tensor& threshold) {
  const char* op = "semi_binary_mask_backward";
  const int64_t rows = check_mask(op, logits, threshold, Place::kCpu);
  check_float(op, "grad", grad, Place::kCpu, shape_of(logits));
  Tensor result = empty_float(logits, logits.sizes());
  const int64_t columns = rows ? logits.numel() / rows : 0;
  const float *a = data(logits), *limit = data(threshold), *g = data(grad);
  float* out = mutable_data(result);
  const Kernels& k = kernels();
  for_parts(row_parts(logits, rows), [&](const Part& part, int64_t) {
    const int64_t at = part.item * columns + part.begin;
    k.mask_backward(a + at, limit[part.item], g + at, out + at, part.end - part.begin);
  });
  return result;
}

Tensors masked_weights(const Tensors& weights, const Tensor& logits, const Tensor& thresholds, const Offsets& offsets) {
  check_masked("masked_weights", weights, logits, thresholds, offsets, Place::kCpu);
  Tensors masked = empty_like_all(weights);
  const auto w = pointers(weights);
  const auto out = mutable_pointers(masked);
  const float *a = data(logits), *limit = data(thresholds);
  const Kernels& k = kernels();
  for_parts(cut(segment_sizes(offsets, weights.size())), [&](const Part& part, int64_t) {
    const int64_t s = part.item, at = part.begin;
    k.weights_forward(w[s] + at, a + offsets[s] + at, limit[s], out[s] + at, part.end - at);
  });
  return masked;
}

Tensor masked_weight(const Tensor& weight, const Tensor& logits, const Tensor& threshold) {
  check_masked_weight("masked_weight", weight, logits, threshold, Place::kCpu);
  Tensor masked = empty_float(weight, weight.sizes());
  const float *w = data(weight), *a = data(logits), limit = *data(threshold);
  float* out = mutable_data(masked);
  const Kernels& k = kernels();
  for_parts(cut({weight.numel()}), [&](const Part& part, int64_t) {
    k.weights_forward(w + part.begin, a + part.begin, limit, out + part.begin, part.end - part.begin);
  });
  return masked;
}

std::tuple<Tensor, Tensor> masked_weight_backward(const Tensor& grad, const Tensor& weight, const Tensor& logits,
                                                  const Tensor& threshold) {
  const char* op = "masked_weight_backward";
  check_masked_weight(op, weight, logits, threshold, Place::kCpu);
  check_float(op, "grad", grad, Place::kCpu, shape_of(weight));
  Tensor grad_weight = empty_float(weight, weight.sizes()), grad_logits = empty_float(logits, logits.sizes());
  const float *w = data(weight), *a = data(logits), *g = data(grad), limit = *data(threshold);
  float *dw = mutable_data(grad_weight), *da = mutable_data(grad_logits);
  const Kernels& k = kernels();
  for_parts(cut({weight.numel()}), [&](const Part& part, int64_t) {
    const int64_t at = part.begin;
    k.weights_backward(w + at, a + at, limit, g + at, dw + at, da + at, part.end - at);
  });
  return {grad_weight, grad_logits};
}

std::tuple<Tensors, Tensor> masked_weights_backward(const Tensors& grads, const Tensors& weights, const Tensor& logits,
                                                    const Tensor& thresholds, const Offsets& offsets) {
  const char* op = "masked_weights_backward";
  check_masked(op, weights, logits, thresholds, offsets, Place::kCpu);
  check_grads(op, grads, weights, offsets, Place::kCpu);
  Tensors grad_weights = empty_like_all(weights);
  Tensor grad_logits = empty_float(logits, logits.sizes());
  const auto w = pointers(weights), g = pointers(grads);
  const auto dw = mutable_pointers(grad_weights);
  const float *a = data(logits), *limit = data(thresholds);
  float* da = mutable_data(grad_logits);
  clear_outside(da, logits.numel(), offsets, weights.size());
  const Kernels& k = kernels();
  for_parts(cut(segment_sizes(offsets, weights.size())), [&](const Part& part, int64_t) {
    const int64_t s = part.item, at = part.begin;
    k.weights_backward(w[s] + at, a + offsets[s] + at, limit[s], g[s] + at, dw[s] + at, da + offsets[s] + at,
                       part.end - at);
  });
  return {grad_weights, grad_logits};
}

// The drift's norm per segment; also writes weight * mask to `masked`, a tensor per weight, unless that is empty.
Tensor drift_norms(const Tensors& weights, const Tensor& previous, const Offsets& offsets, int64_t norm,
                   const std::optional<Tensor>& logits, const std::optional<Tensor>& thresholds,
                   const Tensors& masked) {
  const auto w = pointers(weights);
  const auto out = mutable_pointers(masked);
  const float* before = data(previous);
  const float* a = logits ? data(*logits) : nullptr;
  const float* limit = thresholds ? data(*thresholds) : nullptr;
  const std::vector<Part> parts = cut(segment_sizes(offsets, weights.size()));
  std::vector<double> sums(parts.size());
  const Kernels& k = kernels();
  for_parts(parts, [&](const Part& part, int64_t i) {
    const int64_t s = part.item, flat = offsets[s] + part.begin;
    sums[i] =
        k.drift_forward(w[s] + part.begin, before + flat, a ? a + flat : nullptr, a ? limit[s] : 0.0f,
                        static_cast<int>(norm), out.empty() ? nullptr : out[s] + part.begin, part.end - part.begin);
  });
  Tensor norms = empty_float(previous, {static_cast<int64_t>(weights.size())});
  std::vector<double> total(weights.size());
  for (size_t i = 0; i < parts.size(); ++i) total[parts[i].item] += sums[i];
  float* result = mutable_data(norms);
  for (size_t s = 0; s < total.size(); ++s) {
    result[s] = static_cast<float>(norm == 1 ? total[s] : std::sqrt(total[s]));
  }
  return norms;
}

// Gradients of sum_s grad_s norm_s and, unless `grads` is empty, of sum_s <grads_s, weight_s * mask_s> with it.
std::tuple<Tensors, Tensor> drift_gradients(const Tensor& grad, const Tensor& norms, const Tensors& grads,
                                            const Tensors& weights, const Tensor& previous, const Offsets& offsets,
                                            int64_t norm, const std::optional<Tensor>& logits,
                                            const std::optional<Tensor>& thresholds) {
  Tensors grad_weights = empty_like_all(weights);
  Tensor grad_logits = empty_float(previous, logits ? shape_of(*logits) : Shape{0});
  const auto w = pointers(weights), from_above = pointers(grads);
  const auto dw = mutable_pointers(grad_weights);
  const float *before = data(previous), *g = data(grad), *value = data(norms);
  const float* a = logits ? data(*logits) : nullptr;
  const float* limit = thresholds ? data(*thresholds) : nullptr;
  float* da = mutable_data(grad_logits);
  if (a) clear_outside(da, logits->numel(), offsets, weights.size());
  const Kernels& k = kernels();
  for_parts(cut(segment_sizes(offsets, weights.size())), [&](const Part& part, int64_t) {
    const int64_t s = part.item, at = part.begin, flat = offsets[s] + at;
    // The 2-norm's gradient at 0 is 0, or NaN where what comes from above is not finite.
    const float scale = norm == 1 ? g[s] : value[s] == 0 ? g[s] * 0.0f : g[s] / value[s];
    k.drift_backward(w[s] + at, before + flat, a ? a + flat : nullptr, a ? limit[s] : 0.0f, static_cast<int>(norm),
                     scale, from_above.empty() ? nullptr : from_above[s] + at, dw[s] + at, a ? da + flat : nullptr,
                     part.end - at);
  });
  return {grad_weights, grad_logits};
}

Tensor weight_drift(const Tensors& weights, const Tensor& previous, const Offsets& offsets, int64_t norm,
                    const std::optional<Tensor>& logits, const std::optional<Tensor>& thresholds) {
  check_drift("weight_drift", weights, previous, offsets, norm, logits, thresholds, Place::kCpu);
  return drift_norms(weights, previous, offsets, norm, logits, thresholds, {});
}

std::tuple<Tensors, Tensor> weight_drift_backward(const Tensor& grad, const Tensor& norms, const Tensors& weights,
                                                  const Tensor& previous, const Offsets& offsets, int64_t norm,
                                                  const std::optional<Tensor>& logits,
                                                  const std::optional<Tensor>& thresholds) {
  const char* op = "weight_drift_backward";
  check_drift_backward(op, grad, norms, weights, previous, offsets, norm, logits, thresholds, Place::kCpu);
  return drift_gradients(grad, norms, {}, weights, previous, offsets, norm, logits, thresholds);
}

std::tuple<Tensors, Tensor> masked_weights_drift(const Tensors& weights, const Tensor& logits, const Tensor& thresholds,
                                                 const Offsets& offsets, const Tensor& previous, int64_t norm) {
  check_drift("masked_weights_drift", weights, previous, offsets, norm, logits, thresholds, Place::kCpu);
  Tensors masked = empty_like_all(weights);
  Tensor norms = drift_norms(weights, previous, offsets, norm, logits, thresholds, masked);
  return {masked, norms};
}

std::tuple<Tensors, Tensor> masked_weights_drift_backward(const Tensors& grads, const Tensor& grad, const Tensor& norms,
                                                          const Tensors& weights, const Tensor& logits,
                                                          const Tensor& thresholds, const Offsets& offsets,
                                                          const Tensor& previous, int64_t norm) {
  const char* op = "masked_weights_drift_backward";
  check_drift_backward(op, grad, norms, weights, previous, offsets, norm, logits, thresholds, Place::kCpu);
  check_grads(op, grads, weights, offsets, Place::kCpu);
  return drift_gradients(grad, norms, grads, weights, previous, offsets, norm, logits, thresholds);
}

}  // namespace

HM_SCHEMAS(m) {
  m.def("semi_binary_mask(Tensor logits, Tensor threshold) -> Tensor");
  m.def("semi_binary_mask_backward(Tensor grad, Tensor logits, Tensor threshold) -> Tensor");
  m.def("masked_weight(Tensor weight, Tensor logits, Tensor threshold) -> Tensor");
  m.def("masked_weight_backward(Tensor grad, Tensor weight, Tensor logits, Tensor threshold) -> (Tensor, Tensor)");
  m.def("masked_weights(Tensor[] weights, Tensor logits, Tensor thresholds, int[] offsets) -> Tensor[]");
  m.def(
      "masked_weights_backward(Tensor[] grads, Tensor[] weights, Tensor logits, Tensor thresholds, int[] offsets)"
      " -> (Tensor[], Tensor)");
  m.def(
      "weight_drift(Tensor[] weights, Tensor previous, int[] offsets, int norm, Tensor? logits, Tensor? thresholds)"
      " -> Tensor");
  m.def(
      "weight_drift_backward(Tensor grad, Tensor norms, Tensor[] weights, Tensor previous, int[] offsets, int norm,"
      " Tensor? logits, Tensor? thresholds) -> (Tensor[], Tensor)");
  m.def(
      "masked_weights_drift(Tensor[] weights, Tensor logits, Tensor thresholds, int[] offsets, Tensor previous,"
      " int norm) -> (Tensor[], Tensor)");
  m.def(
      "masked_weights_drift_backward(Tensor[] grads, Tensor grad, Tensor norms, Tensor[] weights, Tensor logits,"
      " Tensor thresholds, int[] offsets, Tensor previous, int norm) -> (Tensor[], Tensor)");
}

HM_CPU(m) {
  m.impl("semi_binary_mask", TORCH_BOX(&semi_binary_mask));
  m.impl("semi_binary_mask_backward", TORCH_BOX(&semi_binary_mask_backward));
  m.impl("masked_weight", TORCH_BOX(&masked_weight));
  m.impl("masked_weight_backward", TORCH_BOX(&masked_weight_backward));
  m.impl("masked_weights", TORCH_BOX(&masked_weights));
  m.impl("masked_weights_backward", TORCH_BOX(&masked_weights_backward));
  m.impl("weight_drift", TORCH_BOX(&weight_drift));
  m.impl("weight_drift_backward", TORCH_BOX(&weight_drift_backward));
  m.impl("masked_weights_drift", TORCH_BOX(&masked_weights_drift));
  m.impl("masked_weights_drift_backward", TORCH_BOX(&masked_weights_drift_backward));
}

}  // namespace hypermask
