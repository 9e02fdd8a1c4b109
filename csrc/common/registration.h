// Where an op is registered: by the files that implement it, as hypermask_native::<op>.
//
// csrc/cpu/<file>.cpp defines the schemas of its ops, also of those that only CUDA has kernels for, and registers their
// CPU side; csrc/cuda/<file>.cu of the same name registers their CUDA side:
//
//   HM_SCHEMAS(m) { m.def("semi_binary_mask(Tensor logits, Tensor threshold) -> Tensor"); }
//   HM_CPU(m) { m.impl("semi_binary_mask", TORCH_BOX(&semi_binary_mask)); }
//   HM_CUDA(m) { m.impl("semi_binary_mask", TORCH_BOX(&semi_binary_mask)); }
//
// What an op computes: hypermask_fast/ops/reference/; shape functions and gradients: hypermask_fast/ops/native.
#pragma once

#include <torch/csrc/stable/library.h>

#if defined(HYPERMASK_EMULATED)
#include <emulated_registration.h>  // of the tests, which run csrc/cuda on a CPU
#else
#define HM_SCHEMAS(m) STABLE_TORCH_LIBRARY_FRAGMENT(hypermask_native, m)
#define HM_CPU(m) STABLE_TORCH_LIBRARY_IMPL(hypermask_native, CPU, m)
#define HM_CUDA(m) STABLE_TORCH_LIBRARY_IMPL(hypermask_native, CUDA, m)
#endif
