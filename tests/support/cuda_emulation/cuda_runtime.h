// What csrc/cuda uses of CUDA's language and runtime, for a host compiler: stands in for NVIDIA's header of this name.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>

#include "block.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __restrict__ __restrict
#define __shared__ static __attribute__((section("cuda_shared")))

// Vectors

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// Functions

template <class T>
inline T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
inline T max(T a, T b) {
  return a < b ? b : a;
}
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __uint_as_float(unsigned x) {
  float f;
  std::memcpy(&f, &x, sizeof f);
  return f;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline unsigned __float_as_uint(float f) {
  unsigned x;
  std::memcpy(&x, &f, sizeof x);
  return x;
}

// Approximate instructions are as far off as documented, all towards larger results or all towards smaller ones.
namespace emulation {
inline int error_direction = 1;  // or -1

// x's magnitude changed by that many units in the last place; what is exact stays.
inline float off_by(float x, int ulps) {
  if (x == 0 || !std::isfinite(x)) return x;
  const unsigned sign = __float_as_uint(x) & 0x80000000u;
  const int magnitude = static_cast<int>(__float_as_uint(x) & 0x7fffffffu) + error_direction * ulps;
  return __uint_as_float(sign | static_cast<unsigned>(max(magnitude, 0)));
}
}  // namespace emulation

// PTX ISA, div.approx.f32: 2 ulp for |b| of 2^-126 to 2^126; beyond, 0, or NaN for infinite a.
inline float __fdividef(float a, float b) {
  if (std::isfinite(b) && fabsf(b) > 0x1p126f) return std::isinf(a) ? NAN : copysignf(0, a) * copysignf(1, b);
  return emulation::off_by(a / b, 2);
}
// CUDA C++ Programming Guide, intrinsic functions: 2 + floor(|1.173 x|) ulp.
inline float __expf(float x) { return emulation::off_by(expf(x), 2 + static_cast<int>(min(fabsf(1.173f * x), 1e6f))); }

template <class T>
inline const T& aligned(const T* p) {
  if (reinterpret_cast<uintptr_t>(p) % alignof(T)) emulation::stop("an access that is not aligned to its size");
  return *p;
}
template <class T>
inline T __ldg(const T* p) {
  return aligned(p);
}
template <class T>
inline T __ldcs(const T* p) {
  return aligned(p);
}
template <class T>
inline T __ldcg(const T* p) {
  return aligned(p);
}
template <class T>
inline void __stcs(T* p, T value) {
  const_cast<T&>(aligned(p)) = value;
}
template <class T>
inline void __stcg(T* p, T value) {
  const_cast<T&>(aligned(p)) = value;
}

// One thread runs at a time: nothing else can come in between, and all see the same memory.
inline void __threadfence() {}
template <class T>
inline T atomicAdd(T* p, T value) {
  const T before = *p;
  *p += value;
  return before;
}
template <class T>
inline T atomicMax(T* p, T value) {
  const T before = *p;
  *p = max(before, value);
  return before;
}
template <class T>
inline T atomicMin(T* p, T value) {
  const T before = *p;
  *p = min(before, value);
  return before;
}

// Waiting and warps; the default arguments are the caller's place.

#define EMULATION_PLACE(what) \
  emulation::Place { what, file, line }
#define EMULATION_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(EMULATION_CALLER) { emulation::wait_for_block(EMULATION_PLACE("__syncthreads")); }
inline void __syncwarp(unsigned mask = emulation::kEveryLane, EMULATION_CALLER) {
  emulation::wait_for_warp(mask, EMULATION_PLACE("__syncwarp"));
}

// The value of the lane source, which must take part.
template <class T>
inline T emulated_shuffle(unsigned mask, T value, unsigned source, emulation::Place place) {
  unsigned char all[emulation::kWarp][emulation::kExchanged];
  emulation::exchange(mask, place, &value, sizeof value, all);
  if (!(mask >> source & 1)) emulation::stop(std::string(place.what) + " from a lane outside the mask");
  std::memcpy(&value, all[source], sizeof value);
  return value;
}
template <class T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = 32, EMULATION_CALLER) {
  const unsigned first = emulation::lane() / width * width;
  return emulated_shuffle(mask, value, first + source % width, EMULATION_PLACE("__shfl_sync"));
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, EMULATION_CALLER) {
  const unsigned lane = emulation::lane(), other = lane ^ lanes;
  const bool inside = other / width <= lane / width;
  return emulated_shuffle(mask, value, inside ? other : lane, EMULATION_PLACE("__shfl_xor_sync"));
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32, EMULATION_CALLER) {
  const unsigned lane = emulation::lane();
  const bool inside = lane % width + distance < static_cast<unsigned>(width);
  return emulated_shuffle(mask, value, inside ? lane + distance : lane, EMULATION_PLACE("__shfl_down_sync"));
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32, EMULATION_CALLER) {
  const unsigned lane = emulation::lane();
  return emulated_shuffle(mask, value, lane % width >= distance ? lane - distance : lane,
                          EMULATION_PLACE("__shfl_up_sync"));
}
inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATION_CALLER) {
  unsigned char all[emulation::kWarp][emulation::kExchanged];
  const unsigned char mine = predicate != 0;
  emulation::exchange(mask, EMULATION_PLACE("__ballot_sync"), &mine, 1, all);
  unsigned result = 0;
  for (unsigned l = 0; l < emulation::kWarp; ++l) {
    if (mask >> l & 1) result |= unsigned{all[l][0]} << l;
  }
  return result;
}

#undef EMULATION_PLACE
#undef EMULATION_CALLER

// The runtime: a GPU of the size of an H200 multiprocessor, but only three of them, so that blocks take several tiles.

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorInvalidConfiguration };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributePreferredSharedMemoryCarveout };
enum cudaSharedCarveout { cudaSharedmemCarveoutDefault = -1, cudaSharedmemCarveoutMaxShared = 100 };
using cudaStream_t = void*;
inline const cudaStream_t cudaStreamPerThread = reinterpret_cast<cudaStream_t>(2);
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

namespace emulation {
constexpr int kProcessors = 3;
constexpr size_t kSharedDefault = 48 * 1024, kSharedLimit = 227 * 1024, kParameterBytes = 4096;
struct SharedMemory {  // of a kernel, as cudaFuncSetAttribute set it
  size_t limit = kSharedDefault;
  int carveout = -1;
};
inline std::map<const void*, SharedMemory>& shared_memory() {
  static std::map<const void*, SharedMemory> of_kernels;
  return of_kernels;
}
}  // namespace emulation

namespace emulation {
inline bool capturing = false;  // what the stream says; what is launched runs all the same
inline int launches = 0;        // of kernels so far
}  // namespace emulation
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = emulation::capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
template <class T>
inline cudaError_t cudaGetSymbolAddress(void** address, T& symbol) {
  *address = &symbol;
  return cudaSuccess;
}

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : error == cudaErrorInvalidValue ? "invalid value" : "invalid configuration";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  *value = which == cudaDevAttrMultiProcessorCount ? emulation::kProcessors : static_cast<int>(emulation::kSharedLimit);
  return cudaSuccess;
}
// Stricter than CUDA: a memset of nothing is a launch for nothing.
inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  if (bytes == 0) return cudaErrorInvalidValue;
  std::memset(memory, value, bytes);
  return cudaSuccess;
}
template <class... P>
inline cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute which, int value) {
  emulation::SharedMemory& of_kernel = emulation::shared_memory()[reinterpret_cast<const void*>(kernel)];
  if (which == cudaFuncAttributePreferredSharedMemoryCarveout) {
    if (value < -1 || value > 100) return cudaErrorInvalidValue;
    of_kernel.carveout = value;
  } else {
    if (value < 0 || static_cast<size_t>(value) > emulation::kSharedLimit) return cudaErrorInvalidValue;
    of_kernel.limit = max(static_cast<size_t>(value), emulation::kSharedDefault);
  }
  return cudaSuccess;
}
template <class... P>
inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*)(P...), int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}
template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A... arguments) {
  const dim3 g = config->gridDim, b = config->blockDim;
  const bool grid_fits = g.x > 0 && g.x < 1u << 31 && g.y > 0 && g.y < 65536 && g.z > 0 && g.z < 65536;
  const emulation::SharedMemory shared = emulation::shared_memory()[reinterpret_cast<const void*>(kernel)];
  if (!grid_fits || b.x * b.y * b.z == 0 || b.x * b.y * b.z > 1024) return cudaErrorInvalidConfiguration;
  if (config->dynamicSmemBytes > shared.limit) return cudaErrorInvalidValue;
  // Stricter than CUDA, which may keep the memory of a second block as cache.
  const bool large = config->dynamicSmemBytes > emulation::kSharedDefault;
  if (large && shared.carveout != cudaSharedmemCarveoutMaxShared) return cudaErrorInvalidValue;
  static_assert((sizeof(P) + ... + 0) <= emulation::kParameterBytes, "kernel arguments are limited to 4 KiB");
  ++emulation::launches;
  emulation::run_grid(g, b, config->dynamicSmemBytes, [&] { kernel(arguments...); });
  return cudaSuccess;
}
