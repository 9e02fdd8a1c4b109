#include "kernels_table.h"

namespace hypermask {
HM_KERNEL_TABLE(baseline)
}  // namespace hypermask
