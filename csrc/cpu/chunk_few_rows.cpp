// chunk_masked_linear for a few rows of x: CUDA's alone (csrc/cuda/chunk_few_rows.cu). The schema is here, so that
// every build has it.
#include "../common/registration.h"

HM_SCHEMAS(m) {
  m.def(
      "chunk_masked_linear(Tensor x, Tensor weight, Tensor hidden, Tensor output_weight, Tensor output_bias, int start,"
      " Tensor threshold, Tensor? bias) -> Tensor");
}
