// masked_linear for a few rows of x: CUDA's alone (csrc/cuda/few_rows.cu). The schema is here, so that every build has
// it.
#include "../common/registration.h"

HM_SCHEMAS(m) {
  m.def("masked_linear(Tensor x, Tensor weight, Tensor logits, Tensor threshold, Tensor? bias) -> Tensor");
}
