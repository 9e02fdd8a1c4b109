// Adam's update as torch.optim.Adam makes it (no amsgrad).
#pragma once

#include <cmath>

#include "portable.h"

namespace hypermask {

struct AdamStep {
  float one_minus_beta1, beta2, one_minus_beta2;
  float step_size;          // lr / (1 - beta1^step)
  float inverse_sqrt_bias;  // 1 / sqrt(1 - beta2^step)
  float eps;
  bool plain;  // no weight decay and no maximize: what follows changes nothing
  float sign;  // -1 to maximize
  float l2;    // weight decay that is added to the gradient
  float keep;  // 1 - lr weight_decay where the decay is decoupled (AdamW)
};

// The step number counts from 1. Bias corrections in double, as torch makes them.
#if defined(__CUDACC__)
__host__ __device__ inline
#else
static inline
#endif
    AdamStep adam_step(double step, double lr, double beta1, double beta2, double eps, double weight_decay,
                       bool decoupled, bool maximize) {
  AdamStep s;
  s.one_minus_beta1 = static_cast<float>(1.0 - beta1);
  s.beta2 = static_cast<float>(beta2);
  s.one_minus_beta2 = static_cast<float>(1.0 - beta2);
  s.step_size = static_cast<float>(lr / (1.0 - pow(beta1, step)));
  s.inverse_sqrt_bias = static_cast<float>(1.0 / sqrt(1.0 - pow(beta2, step)));
  s.eps = static_cast<float>(eps);
  s.plain = weight_decay == 0.0 && !maximize;
  s.sign = maximize ? -1.0f : 1.0f;
  s.l2 = decoupled ? 0.0f : static_cast<float>(weight_decay);
  s.keep = decoupled ? static_cast<float>(1.0 - lr * weight_decay) : 1.0f;
  return s;
}

// m += (1 - beta1)(g - m);  v = beta2 v + (1 - beta2) g^2;  w -= step_size m / (sqrt(v) / sqrt(bias2) + eps). Before
// that g = sign g + l2 w and w = keep w, by a branch of its own: without decay the numbers stay those of the line
// above.
template <class F>
HM_INLINE void adam_update(F grad, F& weight, F& first, F& second, const AdamStep& s) {
  if (!s.plain) {
    grad = grad * s.sign + weight * s.l2;
    weight = weight * s.keep;
  }
  first = first + (grad - first) * s.one_minus_beta1;
  second = second * s.beta2 + grad * grad * s.one_minus_beta2;
  const F denominator = Lane<F>::sqrt(second) * s.inverse_sqrt_bias + s.eps;
  weight = weight - s.step_size * Lane<F>::divide(first, denominator);
}

}  // namespace hypermask
