// The ops' CPU and CUDA sides, as the library hypermask_fast.
#include <torch/csrc/stable/library.h>

#include "cpu/cpu_ops.h"
#include "cpu/isa.h"
#include "ops.h"
#if defined(HYPERMASK_WITH_CUDA)
#include "cuda/cuda_ops.h"
#endif

#include <Python.h>

STABLE_TORCH_LIBRARY(hypermask_fast, m) { hypermask::define_ops(m); }

STABLE_TORCH_LIBRARY_IMPL(hypermask_fast, CPU, m) { HM_IMPLEMENT(m, cpu); }

#if defined(HYPERMASK_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(hypermask_fast, CUDA, m) { HM_IMPLEMENT_GPU(m); }
#endif

STABLE_TORCH_LIBRARY_IMPL(hypermask_fast, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&hypermask::choose_isa));
}

// An empty Python module: importing it loads the library, which registers the ops.
PyMODINIT_FUNC PyInit__native(void) {
  static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native", nullptr, -1, nullptr,
                                          nullptr,               nullptr,   nullptr, nullptr};
  return PyModule_Create(&definition);
}
