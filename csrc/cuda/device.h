// What kernels share: shared memory of a size chosen at launch, accesses of 16 bytes, the sum over a block. For device
// code only, which the tests also compile for the CPU (tests/support/cuda_emulation).
#pragma once

#include <cuda_runtime.h>

#include "../common/launch.h"
#if defined(__CUDACC__)
#include "ptx.h"
#else
#include <emulated_ptx.h>
#endif

namespace hypermask {

#if defined(__CUDACC__)
// The block's shared memory of the size given at launch, aligned for 16-byte copies.
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char dynamic_shared_memory[];
  return reinterpret_cast<T*>(dynamic_shared_memory);
}
#endif

// Floats that are read and written together.
template <int kPack>
struct alignas(4 * kPack) Pack {
  float x[kPack];
};

template <int kPack>
__device__ __forceinline__ Pack<kPack>& pack_at(float* p) {
  return *reinterpret_cast<Pack<kPack>*>(p);
}
template <int kPack>
__device__ __forceinline__ const Pack<kPack>& pack_at(const float* p) {
  return *reinterpret_cast<const Pack<kPack>*>(p);
}

template <class... P>
__host__ __device__ __forceinline__ bool on_16_bytes(const P*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) | ...) % 16) == 0;
}

// Internal linkage: `warps` belongs to the kernels of one file.
namespace {

// The sum over the block's threads, in the same order each time; valid in thread 0. For one call in a kernel.
__device__ __forceinline__ double block_sum(double x) {
  __shared__ double warps[kThreads / 32];
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_down_sync(0xffffffffu, x, distance);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  if (threadIdx.x == 0) {
    x = 0;
    for (int w = 0; w < kThreads / 32; ++w) x += warps[w];
  }
  return x;
}

}  // namespace

}  // namespace hypermask
