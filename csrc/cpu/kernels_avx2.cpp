// The kernels for AVX2.
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,bmi")
#define HM_LANES 8
#include "kernels_table.h"

namespace hypermask {
HM_KERNEL_TABLE(avx2)
}  // namespace hypermask
#endif
