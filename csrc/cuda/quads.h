// A run of entries dealt to a block's threads four at a time: one access of 16 bytes where all arrays begin on 16, else
// four single ones, kThreads apart, so that as many bytes are under way. The offsets of segments decide which it is.
#pragma once

#include "device.h"

namespace hypermask {
namespace {

// Entries i to i + 4.
struct Vector {
  int i;

  __device__ __forceinline__ bool has(int) const { return true; }
  __device__ __forceinline__ Pack<4> load(const float* p) const {
    const float4 v = __ldg(reinterpret_cast<const float4*>(p + i));
    return {{v.x, v.y, v.z, v.w}};
  }
  __device__ __forceinline__ void store(float* p, const Pack<4>& v) const {
    __stcg(reinterpret_cast<float4*>(p + i), make_float4(v.x[0], v.x[1], v.x[2], v.x[3]));  // never taken apart
  }
};

// Entries i, i + step, i + 2 step, i + 3 step before `end`; the others read as 0.
struct Singles {
  int i, end, step;

  __device__ __forceinline__ bool has(int n) const { return i + n * step < end; }
  __device__ __forceinline__ Pack<4> load(const float* p) const {
    Pack<4> values;
#pragma unroll
    for (int n = 0; n < 4; ++n) values.x[n] = has(n) ? p[i + n * step] : 0.0f;
    return values;
  }
  __device__ __forceinline__ void store(float* p, const Pack<4>& values) const {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      if (has(n)) p[i + n * step] = values.x[n];
    }
  }
};

// f(quad) for this thread's entries of 0 to `count`; `vectors`: whether all arrays begin on 16 bytes.
template <class F>
__device__ __forceinline__ void for_quads(int count, bool vectors, const F& f) {
  const int first = static_cast<int>(threadIdx.x) * (vectors ? 4 : 1), step = vectors ? 1 : kThreads;
  for (int i = first; i < count; i += 4 * kThreads) {
    if (vectors && i + 4 <= count) {
      f(Vector{i});
    } else {
      f(Singles{i, count, step});
    }
  }
}

// g(n) for each of four entries.
template <class G>
__device__ __forceinline__ Pack<4> each_of(const G& g) {
  Pack<4> values;
#pragma unroll
  for (int n = 0; n < 4; ++n) values.x[n] = g(n);
  return values;
}

}  // namespace
}  // namespace hypermask
