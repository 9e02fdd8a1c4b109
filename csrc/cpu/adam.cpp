// Adam's step of many tensors in one call: the numbers of PyTorch's fused Adam, to the bit where PyTorch runs with the
// same vectors, in one parallel region for all tensors instead of one for each.
#include <algorithm>
#include <cmath>
#include <string>

#include "../common/checks.h"
#include "../common/registration.h"
#include "isa.h"
#include "parts.h"

namespace hypermask {
namespace {

// What PyTorch's kernel has as constants, by its names for them where it has some.
struct Fused {
  float first_weight, beta2, second_weight;  // 1 - beta1, beta2, 1 - beta2
  float minus_step_size, bias_correction2_sqrt, eps;
  bool plain;            // no weight decay and no maximize: what follows changes nothing
  float sign, l2, keep;  // -1 to maximize; weight decay that is added to the gradient; what decoupled decay leaves of w
};

struct Arrays {
  float* weight;
  const float* grad;
  float *first, *second;
};

template <bool kFma>
HM_INLINE float multiply_add(float a, float b, float c) {
  return kFma ? __builtin_fmaf(a, b, c) : a * b + c;
}

// In PyTorch's vectors the last product of `second` is added to the first one, in what is left behind them the other
// way round: with fused multiply-adds that is another rounding.
template <bool kFma, bool kPlain, bool kVectors>
HM_INLINE void update(const Arrays& t, int64_t i, const Fused& s) {
  float g = t.grad[i], w = t.weight[i];
  if (!kPlain) {
    w = w * s.keep;
    g = g * s.sign;
    if (s.l2 != 0) g = multiply_add<kFma>(w, s.l2, g);
  }
  const float before = t.first[i];
  const float first = s.first_weight < 0.5f ? multiply_add<kFma>(s.first_weight, g - before, before)
                                            : multiply_add<kFma>(s.first_weight - 1.0f, g - before, g);
  const float second = kVectors ? multiply_add<kFma>(s.second_weight * g, g, t.second[i] * s.beta2)
                                : multiply_add<kFma>(t.second[i], s.beta2, s.second_weight * g * g);
  t.first[i] = first;
  t.second[i] = second;
  t.weight[i] = w + s.minus_step_size * first / (__builtin_sqrtf(second) / s.bias_correction2_sqrt + s.eps);
}

// Entries begin to end, of which those from `tail` on are left behind whole vectors.
template <bool kFma, bool kPlain>
HM_INLINE void update_some(Arrays t, int64_t begin, int64_t end, int64_t tail, Fused s) {
  const int64_t vectors = std::min(end, std::max(begin, tail));
#pragma GCC ivdep
  for (int64_t i = begin; i < vectors; ++i) update<kFma, kPlain, true>(t, i, s);
  for (int64_t i = vectors; i < end; ++i) update<kFma, kPlain, false>(t, i, s);
}

template <bool kFma>
HM_INLINE void update_range(Arrays t, int64_t begin, int64_t end, int64_t tail, Fused s) {
  s.plain ? update_some<kFma, true>(t, begin, end, tail, s) : update_some<kFma, false>(t, begin, end, tail, s);
}

using Run = void (*)(Arrays, int64_t, int64_t, int64_t, Fused);  // by value: so nothing of it changes in a loop

void run_baseline(Arrays t, int64_t begin, int64_t end, int64_t tail, Fused s) {
  update_range<false>(t, begin, end, tail, s);
}

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) void run_avx2(Arrays t, int64_t begin, int64_t end, int64_t tail, Fused s) {
  update_range<true>(t, begin, end, tail, s);
}

__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma"))) void run_avx512(Arrays t, int64_t begin,
                                                                                       int64_t end, int64_t tail,
                                                                                       Fused s) {
  update_range<true>(t, begin, end, tail, s);
}
#endif

constexpr int64_t kVectorOfPyTorch = 8;  // floats: that kernel is compiled for AVX2 at most

Run best() {
#if defined(__x86_64__)
  const std::string isa = kernels().name;
  if (isa == "avx512") return run_avx512;
  if (isa == "avx2") return run_avx2;
#endif
  return run_baseline;
}

Fused constants(double step, double lr, double beta1, double beta2, double eps, double weight_decay, bool decoupled,
                bool maximize) {
  Fused s;
  s.first_weight = static_cast<float>(1 - beta1);
  s.beta2 = static_cast<float>(beta2);
  s.second_weight = static_cast<float>(1 - beta2);
  s.minus_step_size = static_cast<float>(-(lr / (1 - std::pow(beta1, step))));
  s.bias_correction2_sqrt = static_cast<float>(std::sqrt(1 - std::pow(beta2, step)));
  s.eps = static_cast<float>(eps);
  s.plain = weight_decay == 0 && !maximize;
  s.sign = maximize ? -1.0f : 1.0f;
  s.l2 = decoupled ? 0.0f : static_cast<float>(weight_decay);
  s.keep = decoupled ? static_cast<float>(1 - lr * weight_decay) : 1.0f;
  return s;
}

// A stretch of a tensor, or several small tensors: about as much work as any other.
struct Batch {
  size_t begin, end;  // of the parts
};

std::vector<Batch> batches(const std::vector<Part>& parts) {
  std::vector<Batch> found;
  int64_t entries = kPartEntries;
  for (size_t i = 0; i < parts.size(); ++i) {
    if (entries >= kPartEntries) {
      found.push_back({i, i});
      entries = 0;
    }
    entries += parts[i].end - parts[i].begin;
    found.back().end = i + 1;
  }
  return found;
}

// Counts one step more in each of `steps`, and makes it.
void fused_adam(const Tensors& weights, const Tensors& grads, const Tensors& first, const Tensors& second,
                const Tensors& steps, double lr, double beta1, double beta2, double eps, double weight_decay,
                bool decoupled, bool maximize) {
  const char* op = "fused_adam";
  const size_t count = weights.size();
  if (grads.size() != count || first.size() != count || second.size() != count || steps.size() != count) {
    fail(op, "there must be a gradient, two moments and a counter for each of the ", count, " weights");
  }
  std::vector<int64_t> sizes(count);
  std::vector<Arrays> arrays(count);
  std::vector<Fused> settings(count);
  for (size_t i = 0; i < count; ++i) {
    const Shape shape = shape_of(weights[i]);
    check_float(op, "a weight", weights[i], Place::kCpu);
    check_float(op, "a gradient", grads[i], Place::kCpu, shape);
    check_float(op, "a first moment", first[i], Place::kCpu, shape);
    check_float(op, "a second moment", second[i], Place::kCpu, shape);
    check_scalar(op, "a counter", steps[i], Place::kCpu);
    sizes[i] = weights[i].numel();
    arrays[i] = {mutable_data(weights[i]), data(grads[i]), mutable_data(first[i]), mutable_data(second[i])};
  }
  for (size_t i = 0; i < count; ++i) {
    const float step = *mutable_data(steps[i]) += 1.0f;
    settings[i] = i > 0 && step == *data(steps[i - 1])
                      ? settings[i - 1]
                      : constants(step, lr, beta1, beta2, eps, weight_decay, decoupled, maximize);
  }
  const std::vector<Part> parts = cut(sizes);
  const std::vector<Batch> work = batches(parts);
  const Run run = best();
  torch::stable::parallel_for(0, static_cast<int64_t>(work.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      for (size_t i = work[b].begin; i < work[b].end; ++i) {
        const Part& part = parts[i];
        run(arrays[part.item], part.begin, part.end, sizes[part.item] / kVectorOfPyTorch * kVectorOfPyTorch,
            settings[part.item]);
      }
    }
  });
}

// One step more in each of these counters.
void count_steps(const Tensors& steps) {
  for (const Tensor& step : steps) check_scalar("count_steps", "a counter", step, Place::kCpu);
  for (const Tensor& step : steps) *mutable_data(step) += 1.0f;
}

}  // namespace

HM_SCHEMAS(m) {
  m.def(
      "fused_adam(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] first, Tensor(c!)[] second, Tensor(d!)[] steps,"
      " float lr, float beta1, float beta2, float eps, float weight_decay, bool decoupled, bool maximize) -> ()");
  m.def("count_steps(Tensor(a!)[] steps) -> ()");
}

HM_CPU(m) {
  m.impl("fused_adam", TORCH_BOX(&fused_adam));
  m.impl("count_steps", TORCH_BOX(&count_steps));
}

}  // namespace hypermask
