// The host's side of a kernel: the device, the stream, launches and their errors.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "../common/checks.h"
#include "../common/launch.h"

// Weak, so that the extension also loads where torch comes without CUDA.
#pragma weak aoti_torch_get_current_cuda_stream

namespace hypermask {

// Makes a tensor's device the current one for as long as it lives, and launches on torch's stream there.
class Launcher {
 public:
  Launcher(const char* op, const Tensor& t) : op_(op), device_(t.get_device_index()), guard_(device_) {
    if (!aoti_torch_get_current_cuda_stream) fail(op, "this torch comes without CUDA");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  void check(cudaError_t error) const {
    if (error != cudaSuccess) fail(op_, cudaGetErrorString(error));
  }

  int attribute(cudaDeviceAttr which) const {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, device_));
    return value;
  }

  int device() const { return device_; }
  cudaStream_t stream() const { return stream_; }

  // Whether launches become part of a graph instead of running.
  bool capturing() const {
    cudaStreamCaptureStatus status{};
    check(cudaStreamIsCapturing(stream_, &status));
    return status != cudaStreamCaptureStatusNone;
  }

  // On this GPU, of a __device__ array's first entry.
  template <class T, int kGroups, int kCount>
  T* address_of(T (&memory)[kGroups][kCount]) const {
    void* address = nullptr;
    check(cudaGetSymbolAddress(&address, memory));
    return static_cast<T*>(address);
  }

  // Lets the kernel have that many bytes of shared memory in a block, and as many blocks side by side as shared memory
  // can hold: what the driver would rather keep as L1 cache, kernels that read everything once have no use for.
  template <class... Parameters>
  void allow_shared(void (*kernel)(Parameters...), int64_t bytes) const {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
    const int all = cudaSharedmemCarveoutMaxShared;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, all));
  }

  // Asynchronous, as kernel<<<grid, threads, shared_bytes>>>(arguments...).
  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), dim3 grid, dim3 threads, int64_t shared_bytes,
              const Arguments&... arguments) const {
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = threads;
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.stream = stream_;
    check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
  }

  void clear(void* memory, int64_t bytes) const {
    if (bytes == 0) return;  // a memset of nothing is a node of a captured graph too
    check(cudaMemsetAsync(memory, 0, static_cast<size_t>(bytes), stream_));
  }

 private:
  const char* op_;
  int device_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

inline Tensor empty_of(const Tensor& like, const Shape& shape, ScalarType dtype) {
  return torch::stable::new_empty(like, shape, dtype);
}

}  // namespace hypermask
