// The kernels for what every processor has.
#define HM_LANES 4
#include "kernels_table.h"

namespace hypermask {
HM_KERNEL_TABLE(baseline)
}  // namespace hypermask
