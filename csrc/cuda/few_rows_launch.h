// The host's side of the ops for a few rows of x: arguments, the choice of a kernel's instance, and splits.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <type_traits>

#include "../common/few_rows.h"
#include "few_rows_kernels.h"
#include "launcher.h"

namespace hypermask {

inline FewRows few_rows(const Tensor& x, const Tensor& weight, const Tensor& threshold,
                        const std::optional<Tensor>& bias, const Tensor& y) {
  FewRows s{};
  s.x = x.const_data_ptr();
  s.weight = weight.const_data_ptr();
  s.threshold = threshold.const_data_ptr();
  s.bias = bias ? bias->const_data_ptr() : nullptr;
  s.y = y.mutable_data_ptr();
  s.outputs = weight.size(0);
  s.inputs = weight.size(1);
  s.rows = static_cast<int>(x.size(0));
  s.float_threshold = threshold.scalar_type() == ScalarType::Float;
  return s;
}

// Whether every row of `inputs` entries begins at a multiple of 16 bytes, and none ends within a lane's entries.
inline bool vectors_fit(std::initializer_list<const Tensor*> tensors, int64_t inputs) {
  bool fit = inputs % 8 == 0;
  for (const Tensor* t : tensors) fit = fit && reinterpret_cast<uintptr_t>(t->const_data_ptr()) % 16 == 0;
  return fit;
}

// f(zero of x's type)
template <class F>
void with_type(const Tensor& x, const F& f) {
  if (x.scalar_type() == ScalarType::BFloat16) {
    f(__nv_bfloat16{});
  } else if (x.scalar_type() == ScalarType::Half) {
    f(__half{});
  } else {
    f(float{});
  }
}

// f(tiles of 8 rows of x, whether vectors fit), as constants. Where they don't, one instance serves all rows.
template <class F>
void with_shape(const FewRows& s, bool fit, const F& f) {
  using One = std::integral_constant<int, 1>;
  using Two = std::integral_constant<int, 2>;
  if (!fit) {
    f(Two{}, std::false_type{});
  } else if (s.rows > 8) {
    f(Two{}, std::true_type{});
  } else {
    f(One{}, std::true_type{});
  }
}

// launch(grid) with `tiles` blocks of `warps` warps, and several times as many where that is less than the GPU can
// hold, as long as each warp has a step of the reduction to do.
template <class T, class Launch>
void launch_splits(const Launcher& gpu, FewRows& s, const Tensor& x, int64_t tiles, int warps, const Launch& launch) {
  const int64_t steps = ceil_div(s.inputs, kStep), processors = gpu.attribute(cudaDevAttrMultiProcessorCount);
  const int64_t wanted = std::max<int64_t>(std::min(processors / tiles, steps / warps), 1);
  s.steps = std::max<int64_t>(ceil_div(steps, wanted), 1);
  const int64_t splits = std::max<int64_t>(ceil_div(steps, s.steps), 1);
  Tensor partial = empty_of(x, {splits > 1 ? splits * s.rows * s.outputs : 0}, ScalarType::Float);
  if (splits > 1) s.partial = partial.mutable_data_ptr<float>();
  launch(dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(splits)));
  if (splits > 1) {
    const auto blocks = static_cast<unsigned>(ceil_div(s.rows * s.outputs, kThreads));
    gpu.launch(sum_splits_kernel<T>, blocks, kThreads, 0, s, static_cast<int>(splits));
  }
}

}  // namespace hypermask
