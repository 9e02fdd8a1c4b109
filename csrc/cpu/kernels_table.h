// Included by each kernels_*.cpp, which says for which instructions: the table of what was compiled there.
#pragma once

#include "kernels_dense.h"
#include "kernels_elementwise.h"

#define HM_KERNEL_TABLE(isa)                                                                           \
  const Kernels& kernels_##isa() {                                                                     \
    static const Kernels table = {                                                                     \
        #isa,          radix_count,    mask_forward, mask_backward, weights_forward, weights_backward, \
        drift_forward, drift_backward, dense_logits, dense_value,   dense_residuals, dense_pass};      \
    return table;                                                                                      \
  }
