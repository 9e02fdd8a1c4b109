// The CPU side of every op; schemas and shapes in csrc/registration.cpp and hypermask_fast/reference.py.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "../common/checks.h"
#include "../common/mask_math.h"

namespace hypermask {

using Tensors = std::vector<Tensor>;
using Offsets = std::vector<int64_t>;

Tensor mask_thresholds_cpu(const Tensor& logits, const Offsets& offsets, const Tensor& ranks);
Tensor semi_binary_mask_cpu(const Tensor& logits, const Tensor& threshold);
Tensor semi_binary_mask_backward_cpu(const Tensor& grad, const Tensor& logits, const Tensor& threshold);
Tensors masked_weights_cpu(const Tensors& weights, const Tensor& logits, const Tensor& thresholds,
                           const Offsets& offsets);
std::tuple<Tensors, Tensor> masked_weights_backward_cpu(const Tensors& grads, const Tensors& weights,
                                                        const Tensor& logits, const Tensor& thresholds,
                                                        const Offsets& offsets);
Tensor weight_drift_cpu(const Tensors& weights, const Tensor& previous, const Offsets& offsets, int64_t norm,
                        const std::optional<Tensor>& logits, const std::optional<Tensor>& thresholds);
std::tuple<Tensors, Tensor> weight_drift_backward_cpu(const Tensor& grad, const Tensor& norms, const Tensors& weights,
                                                      const Tensor& previous, const Offsets& offsets, int64_t norm,
                                                      const std::optional<Tensor>& logits,
                                                      const std::optional<Tensor>& thresholds);
std::tuple<Tensors, Tensor> masked_weights_drift_cpu(const Tensors& weights, const Tensor& logits,
                                                     const Tensor& thresholds, const Offsets& offsets,
                                                     const Tensor& previous, int64_t norm);
std::tuple<Tensors, Tensor> masked_weights_drift_backward_cpu(const Tensors& grads, const Tensor& grad,
                                                              const Tensor& norms, const Tensors& weights,
                                                              const Tensor& logits, const Tensor& thresholds,
                                                              const Offsets& offsets, const Tensor& previous,
                                                              int64_t norm);
Tensor output_drift_cpu(const Tensor& hidden, const Tensor& weight, const Tensor& bias, const Tensor& targets);
std::tuple<Tensor, Tensor, Tensor> output_drift_backward_cpu(const Tensor& grad, const Tensor& hidden,
                                                             const Tensor& weight, const Tensor& bias,
                                                             const Tensor& targets);
Tensor hypernet_logits_cpu(const Tensor& hidden, const Tensor& weight, const Tensor& bias);
std::tuple<Tensor, Tensor> hypernet_adam_cpu(const Tensor& hidden, const Tensor& grad_logits, const Tensor& targets,
                                             const Tensor& drift_weight, const Tensor& weight, const Tensor& bias,
                                             const Tensor& weight_m, const Tensor& weight_v, const Tensor& bias_m,
                                             const Tensor& bias_v, const Tensor& step, const Tensor& lr, double beta1,
                                             double beta2, double eps);

}  // namespace hypermask
