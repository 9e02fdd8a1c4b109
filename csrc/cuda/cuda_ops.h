// The CUDA side of the ops: same arguments and results as the CPU side. No op waits for the device or reads from it on
// the host, so a step made of them can be captured in a CUDA graph.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "../common/checks.h"

namespace hypermask {

using Tensors = std::vector<Tensor>;
using Offsets = std::vector<int64_t>;

Tensor mask_thresholds_cuda(const Tensor& logits, const Offsets& offsets, const Tensor& ranks);
Tensor semi_binary_mask_cuda(const Tensor& logits, const Tensor& threshold);
Tensor semi_binary_mask_backward_cuda(const Tensor& grad, const Tensor& logits, const Tensor& threshold);
Tensors masked_weights_cuda(const Tensors& weights, const Tensor& logits, const Tensor& thresholds,
                            const Offsets& offsets);
std::tuple<Tensors, Tensor> masked_weights_backward_cuda(const Tensors& grads, const Tensors& weights,
                                                         const Tensor& logits, const Tensor& thresholds,
                                                         const Offsets& offsets);
Tensor weight_drift_cuda(const Tensors& weights, const Tensor& previous, const Offsets& offsets, int64_t norm,
                         const std::optional<Tensor>& logits, const std::optional<Tensor>& thresholds);
std::tuple<Tensors, Tensor> weight_drift_backward_cuda(const Tensor& grad, const Tensor& norms, const Tensors& weights,
                                                       const Tensor& previous, const Offsets& offsets, int64_t norm,
                                                       const std::optional<Tensor>& logits,
                                                       const std::optional<Tensor>& thresholds);
Tensor hypernet_logits_cuda(const Tensor& hidden, const Tensor& weight, const Tensor& bias);
std::tuple<Tensors, Tensor> masked_weights_drift_cuda(const Tensors& weights, const Tensor& logits,
                                                      const Tensor& thresholds, const Offsets& offsets,
                                                      const Tensor& previous, int64_t norm);
std::tuple<Tensors, Tensor> masked_weights_drift_backward_cuda(const Tensors& grads, const Tensor& grad,
                                                               const Tensor& norms, const Tensors& weights,
                                                               const Tensor& logits, const Tensor& thresholds,
                                                               const Offsets& offsets, const Tensor& previous,
                                                               int64_t norm);
Tensor output_drift_cuda(const Tensor& hidden, const Tensor& weight, const Tensor& bias, const Tensor& targets);
std::tuple<Tensor, Tensor, Tensor> output_drift_backward_cuda(const Tensor& grad, const Tensor& hidden,
                                                              const Tensor& weight, const Tensor& bias,
                                                              const Tensor& targets);
std::tuple<Tensor, Tensor> hypernet_adam_cuda(const Tensor& hidden, const Tensor& grad_logits, const Tensor& targets,
                                              const Tensor& drift_weight, const Tensor& weight, const Tensor& bias,
                                              const Tensor& weight_m, const Tensor& weight_v, const Tensor& bias_m,
                                              const Tensor& bias_v, const Tensor& step, const Tensor& lr, double beta1,
                                              double beta2, double eps);

Tensor small_masked_linear_cuda(const Tensor& x, const Tensor& weight, const Tensor& logits, const Tensor& threshold,
                                const std::optional<Tensor>& bias);
Tensor small_chunk_masked_linear_cuda(const Tensor& x, const Tensor& weight, const Tensor& hidden,
                                      const Tensor& output_weight, const Tensor& output_bias, int64_t start,
                                      const Tensor& threshold, const std::optional<Tensor>& bias);

}  // namespace hypermask
