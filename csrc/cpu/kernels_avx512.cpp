// The kernels for AVX-512.
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,bmi")
#define HM_LANES 16
#include "kernels_table.h"

namespace hypermask {
HM_KERNEL_TABLE(avx512)
}  // namespace hypermask
#endif
