#include "kernels_table.h"

namespace hypermask {
HM_KERNEL_TABLE(avx512)
}  // namespace hypermask
