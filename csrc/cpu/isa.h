// Which compiled variant of the CPU kernels runs.
#pragma once

#include "kernels.h"

namespace hypermask {

// The table of the best instruction set this machine has, or of the one chosen by choose_isa.
const Kernels& kernels();

// 0 baseline, 1 AVX2, 2 AVX-512; other numbers only ask. Returns the choice in force. A set that the machine or the
// build lacks is an error. Also read once from the environment: HYPERMASK_CPU_ISA=baseline|avx2|avx512.
int64_t choose_isa(int64_t isa);

}  // namespace hypermask
