// Schemas of the ops. Meanings and shapes: hypermask_fast/reference.py; shape functions and gradients:
// hypermask_fast/native.py.
#pragma once

#include <torch/csrc/stable/library.h>

namespace hypermask {

inline void define_ops(torch::stable::detail::StableLibrary& m) {
  m.def("mask_thresholds(Tensor logits, int[] offsets, Tensor ranks) -> Tensor");
  m.def("semi_binary_mask(Tensor logits, Tensor threshold) -> Tensor");
  m.def("semi_binary_mask_backward(Tensor grad, Tensor logits, Tensor threshold) -> Tensor");
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
  m.def("output_drift(Tensor hidden, Tensor weight, Tensor bias, Tensor targets) -> Tensor");
  m.def(
      "output_drift_backward(Tensor grad, Tensor hidden, Tensor weight, Tensor bias, Tensor targets)"
      " -> (Tensor, Tensor, Tensor)");
  m.def("hypernet_logits(Tensor hidden, Tensor weight, Tensor bias) -> Tensor");
  m.def(
      "hypernet_adam(Tensor hidden, Tensor grad_logits, Tensor targets, Tensor drift_weight, Tensor(a!) weight,"
      " Tensor(b!) bias, Tensor(c!) weight_m, Tensor(d!) weight_v, Tensor(e!) bias_m, Tensor(f!) bias_v, Tensor step,"
      " Tensor lr, float beta1, float beta2, float eps) -> (Tensor hidden_grad, Tensor drift)");
  m.def("small_masked_linear(Tensor x, Tensor weight, Tensor logits, Tensor threshold, Tensor? bias) -> Tensor");
  m.def(
      "small_chunk_masked_linear(Tensor x, Tensor weight, Tensor hidden, Tensor output_weight, Tensor output_bias,"
      " int start, Tensor threshold, Tensor? bias) -> Tensor");
  m.def("cpu_isa(int isa) -> int");
}

}  // namespace hypermask

// The functions that serve them have the same names with the suffix of the device.
#define HM_IMPLEMENT(m, device)                                                              \
  m.impl("mask_thresholds", TORCH_BOX(&hypermask::mask_thresholds_##device));               \
  m.impl("semi_binary_mask", TORCH_BOX(&hypermask::semi_binary_mask_##device));             \
  m.impl("semi_binary_mask_backward", TORCH_BOX(&hypermask::semi_binary_mask_backward_##device)); \
  m.impl("masked_weights", TORCH_BOX(&hypermask::masked_weights_##device));                 \
  m.impl("masked_weights_backward", TORCH_BOX(&hypermask::masked_weights_backward_##device)); \
  m.impl("weight_drift", TORCH_BOX(&hypermask::weight_drift_##device));                     \
  m.impl("weight_drift_backward", TORCH_BOX(&hypermask::weight_drift_backward_##device));   \
  m.impl("masked_weights_drift", TORCH_BOX(&hypermask::masked_weights_drift_##device));     \
  m.impl("masked_weights_drift_backward", TORCH_BOX(&hypermask::masked_weights_drift_backward_##device)); \
  m.impl("output_drift", TORCH_BOX(&hypermask::output_drift_##device));                     \
  m.impl("output_drift_backward", TORCH_BOX(&hypermask::output_drift_backward_##device));   \
  m.impl("hypernet_logits", TORCH_BOX(&hypermask::hypernet_logits_##device));               \
  m.impl("hypernet_adam", TORCH_BOX(&hypermask::hypernet_adam_##device))

// What only the GPU has kernels for.
#define HM_IMPLEMENT_GPU(m)                                                                \
  HM_IMPLEMENT(m, cuda);                                                                   \
  m.impl("small_masked_linear", TORCH_BOX(&hypermask::small_masked_linear_cuda));          \
  m.impl("small_chunk_masked_linear", TORCH_BOX(&hypermask::small_chunk_masked_linear_cuda))
