// The host's side of the ops for a few rows of x: arguments, the choice of a kernel's instance, and splits.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <map>
#include <mutex>
#include <optional>
#include <type_traits>
#include <utility>

#include "../common/few_rows.h"
#include "few_rows_kernels.h"
#include "launcher.h"

namespace hypermask {
namespace {

constexpr int kCounterGroups = 2048, kCounters = 128;
__device__ unsigned counters[kCounterGroups][kCounters];

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

// f(tiles of 8 rows of x, whether vectors fit), as constants; tiles are a power of 2 up to kMostTiles. Where vectors
// don't fit, two instances serve all rows.
template <int kMostTiles, class F>
void with_shape(const FewRows& s, bool fit, const F& f) {
  const auto with_tiles = [&](auto tiles) {
    if (fit) {
      f(tiles, std::true_type{});
    } else if constexpr (tiles() == 2 || tiles() == kMostTiles) {
      f(tiles, std::false_type{});
    }
  };
  if (s.rows <= 8 && fit) {
    with_tiles(std::integral_constant<int, 1>{});
  } else if (s.rows <= 16) {
    with_tiles(std::integral_constant<int, 2>{});
  } else if constexpr (kMostTiles > 2) {
    if (s.rows <= 32 && fit) {
      with_tiles(std::integral_constant<int, 4>{});
    } else {
      with_tiles(std::integral_constant<int, kMostTiles>{});
    }
  }
}

// Counters for the splits of one call, 0 before and after it: `count` of them, or null where there are none to be had.
// A call on a stream has those of the stream, for calls on one stream come one after another. A call that is captured
// has its own for ever, for its graph may run beside anything. They are memory of the kernels' module, so they exist
// once on each GPU.
inline unsigned* split_counters(const Launcher& gpu, unsigned (&memory)[kCounterGroups][kCounters], int64_t count) {
  static std::mutex mutex;
  static std::map<std::pair<int, cudaStream_t>, int> of_streams;
  static int used = 0;
  if (count > kCounters || gpu.stream() == cudaStreamPerThread) return nullptr;  // one handle for many streams
  const bool captured = gpu.capturing();
  const std::lock_guard<std::mutex> lock(mutex);
  const std::pair key(gpu.device(), gpu.stream());
  const auto found = of_streams.find(key);
  if (!captured && found != of_streams.end()) return gpu.address_of(memory) + found->second * kCounters;
  if (used == kCounterGroups) return nullptr;
  if (!captured) of_streams[key] = used;
  return gpu.address_of(memory) + used++ * kCounters;
}

// launch(grid) with `tiles` blocks of `warps` warps, and several times as many where that is less than the GPU can
// hold, as long as each warp has `unit` steps of the reduction to do, in which splits are cut.
template <class T, class Launch>
void launch_splits(const Launcher& gpu, FewRows& s, const Tensor& x, int64_t tiles, int warps, int unit,
                   const Launch& launch) {
  const int64_t units = ceil_div(ceil_div(s.inputs, kStep), unit);
  const int64_t processors = gpu.attribute(cudaDevAttrMultiProcessorCount);
  const int64_t wanted = std::max<int64_t>(std::min(processors / tiles, units / warps), 1);
  const int64_t of_split = std::max<int64_t>(ceil_div(units, wanted), 1);
  const int64_t splits = std::max<int64_t>(ceil_div(units, of_split), 1);
  s.steps = of_split * unit;
  Tensor partial = empty_of(x, {splits > 1 ? splits * s.rows * s.outputs : 0}, ScalarType::Float);
  if (splits > 1) {
    s.partial = partial.mutable_data_ptr<float>();
    s.ended = split_counters(gpu, counters, tiles);
  }
  launch(dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(splits)));
  if (splits > 1 && !s.ended) {
    const auto blocks = static_cast<unsigned>(ceil_div(s.rows * s.outputs, kThreads));
    gpu.launch(sum_splits_kernel<T>, blocks, kThreads, 0, s, static_cast<int>(splits));
  }
}

}  // namespace
}  // namespace hypermask
