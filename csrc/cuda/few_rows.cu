// masked_linear for 1 to 16 rows of x: W and the logits are read once, 16 bytes a lane, and masked in registers.
#include "../common/registration.h"
#include "few_rows_kernels.h"
#include "few_rows_launch.h"

namespace hypermask {
namespace {

constexpr int kWarps = 16;

// Two tiles of outputs for tensor cores: half the reads of x. One for float32, whose sums take the registers.
template <class T>
constexpr int kOutputTiles = Element<T>::kTensorCores ? 2 : 1;

template <class T, int kRowTiles, bool kAligned>
__global__ void __launch_bounds__(32 * kWarps) masked_linear_kernel(FewRows s, const void* logits) {
  using Sums = Product<T, kOutputTiles<T>, kRowTiles, kAligned>;
  constexpr int kHalves = 2 * kOutputTiles<T>;  // of 8 outputs; this lane has one of each
  const int warp = threadIdx.x / 32, group = threadIdx.x % 32 / 4;
  const int64_t first_output = static_cast<int64_t>(blockIdx.x) * Sums::kOutputs;
  const int64_t entry = (first_output + group) * s.inputs + kLaneEntries * (threadIdx.x % 4);
  const auto* weight = static_cast<const T*>(s.weight) + entry;
  const auto* a = static_cast<const T*>(logits) + entry;
  const float threshold = threshold_of(s, static_cast<T*>(nullptr));
  struct Loaded {
    Entries<T> w[kHalves], a[kHalves];
  };
  const auto load = [&](int64_t step, Loaded& to) {
    const int64_t k = step * kStep, left = s.inputs - k - kLaneEntries * (threadIdx.x % 4);
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {
      const int64_t there = first_output + group + 8 * h < s.outputs ? left : 0;
      to.w[h].template load<kAligned, true>(weight + 8 * h * s.inputs + k, there);
      to.a[h].template load<kAligned, true>(a + 8 * h * s.inputs + k, there);
    }
  };

  Sums sums;
  sums.clear();
  const int64_t begin = blockIdx.y * s.steps, end = min(begin + s.steps, ceil_div(s.inputs, kStep));
  Loaded now, next;  // one step ahead where a load is an instruction, not eight
  if (kAligned) load(begin + warp, next);
  for (int64_t step = begin + warp; step < end; step += kWarps) {
    if constexpr (kAligned) {
      now = next;
      if (step + kWarps < end) load(step + kWarps, next);  // what another split has is not loaded twice
    } else {
      load(step, now);
    }
    const int64_t k = step * kStep + kLaneEntries * (threadIdx.x % 4);
    Entries<T> x[kRowTiles];
    if constexpr (Sums::kTensorCores) load_x<T, kRowTiles, kAligned>(s, k, x);
#pragma unroll
    for (int m = 0; m < kOutputTiles<T>; ++m) {
      Entries<T> masked[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int h = 2 * m + i;
        masked[i].make([&](int e) { return now.w[h].entry(e) * Element<T>::mask(now.a[h].entry(e), threshold); });
      }
      sums.add(s, m, k, masked[0], masked[1], x);
    }
  }
  finish<T>(s, sums, dynamic_shared<float>(), first_output, 1);
}

template <class T, int kRowTiles, bool kAligned>
void run(const Launcher& gpu, FewRows& s, const Tensor& x, const Tensor& logits) {
  using Sums = Product<T, kOutputTiles<T>, kRowTiles, kAligned>;
  launch_splits<T>(gpu, s, x, ceil_div(s.outputs, Sums::kOutputs), kWarps, [&](dim3 grid) {
    constexpr int64_t kBytes = kWarps * Sums::kSharedFloats * sizeof(float);
    gpu.launch(masked_linear_kernel<T, kRowTiles, kAligned>, grid, 32 * kWarps, kBytes, s, logits.const_data_ptr());
  });
}

Tensor masked_linear(const Tensor& x, const Tensor& weight, const Tensor& logits, const Tensor& threshold,
                     const std::optional<Tensor>& bias) {
  const char* op = "masked_linear";
  check_few_rows(op, x, weight, threshold, bias, Place::gpu_of(x));
  check_like(op, "logits", logits, weight, Place::gpu_of(x), shape_of(weight));
  Tensor y = torch::stable::new_empty(x, {x.size(0), weight.size(0)});
  if (y.numel() == 0) return y;
  const Launcher gpu(op, x);
  FewRows s = few_rows(x, weight, threshold, bias, y);
  with_type(x, [&](auto zero) {
    using T = decltype(zero);
    with_shape(s, vectors_fit({&x, &weight, &logits}, s.inputs),
               [&](auto row_tiles, auto aligned) { run<T, row_tiles(), aligned()>(gpu, s, x, logits); });
  });
  return y;
}

}  // namespace

HM_CUDA(m) { m.impl("masked_linear", TORCH_BOX(&masked_linear)); }

}  // namespace hypermask
