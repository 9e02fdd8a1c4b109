// Which compiled variant of the CPU kernels runs.
#pragma once

#include "kernels.h"

namespace hypermask {

// The table of the best instruction set this machine has, or of the one chosen by the op cpu_isa, or once by the
// environment: HYPERMASK_CPU_ISA=baseline|avx2|avx512.
const Kernels& kernels();

}  // namespace hypermask
