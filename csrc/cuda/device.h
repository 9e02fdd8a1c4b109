// Streams, launch errors, and the sum over a block.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "../common/checks.h"
#include "../common/launch.h"

// Weak, so that the extension also loads where torch comes without CUDA.
#pragma weak aoti_torch_get_current_cuda_stream

namespace hypermask {

constexpr int kThreads = 256;

inline cudaStream_t stream_of(const char* op, const Tensor& t) {
  if (!aoti_torch_get_current_cuda_stream) fail(op, "this torch comes without CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void check_cuda(const char* op, cudaError_t error) {
  if (error != cudaSuccess) fail(op, cudaGetErrorString(error));
}

inline void check_launch(const char* op) { check_cuda(op, cudaGetLastError()); }

inline Tensor empty_of(const Tensor& like, const Shape& shape, ScalarType dtype) {
  return torch::stable::new_empty(like, shape, dtype);
}

// The sum over the block's threads, in the same order each time; valid in thread 0.
__device__ __forceinline__ double block_sum(double x) {
  __shared__ double warps[kThreads / 32];
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_down_sync(0xffffffffu, x, distance);
  __syncthreads();  // of an earlier use
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  if (threadIdx.x == 0) {
    x = 0;
    for (int w = 0; w < kThreads / 32; ++w) x += warps[w];
  }
  return x;
}

}  // namespace hypermask
