// Kernels that show what the emulation finds, each with a mistake of its own, and its instructions against plain loops.
#include <cfenv>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/device.h"
#include "memory.h"

namespace hypermask {
namespace {

template <class... P, class... A>
std::string outcome(void (*kernel)(P...), unsigned threads, size_t shared_bytes, A... arguments) {
  cudaLaunchConfig_t config;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  try {
    return cudaLaunchKernelEx(&config, kernel, arguments...) == cudaSuccess ? "" : "refused";
  } catch (const std::runtime_error& error) {
    return error.what();
  }
}

// Warps meet in the middle, which orders nothing between them.
__global__ void neighbour_kernel(bool barrier, float* out) {
  __shared__ float values[64];
  values[threadIdx.x] = static_cast<float>(threadIdx.x);
  __syncwarp();
  if (barrier) __syncthreads();
  out[threadIdx.x] = values[(threadIdx.x + 1) % 64];
}

__global__ void ended_kernel() {
  if (threadIdx.x == 5) return;
  __syncthreads();
}

__global__ void apart_kernel() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void half_a_warp_kernel() {
  if (threadIdx.x < 16) __shfl_down_sync(0xffffffffu, 1.0f, 1);
}

__global__ void beyond_kernel() { dynamic_shared<float>()[threadIdx.x + 1] = 0; }

__global__ void copy_kernel(bool wait, const float* in, float* out) {
  float* buffer = dynamic_shared<float>();
  cp_async<16>(buffer + 4 * threadIdx.x, in + 4 * threadIdx.x);
  cp_async_commit();
  if (wait) cp_async_wait<0>();
  __syncthreads();
  out[threadIdx.x] = buffer[threadIdx.x];
}

__global__ void read_kernel(const float* in, int at, float* out) { *out = in[at]; }

__global__ void write_kernel(float* out, int at) { out[at] = 1; }

// d = A B, with A and B^T in shared memory as bfloat16: A by ldmatrix, B by ldmatrix of its transpose.
__global__ void mma_kernel(const uint16_t* a, const uint16_t* b_transposed, float* d) {
  auto* shared = dynamic_shared<uint16_t>();
  for (int i = threadIdx.x; i < 256; i += 32) shared[i] = a[i];
  for (int i = threadIdx.x; i < 128; i += 32) shared[256 + i] = b_transposed[i];
  __syncwarp();
  const int lane = threadIdx.x, matrix = lane / 8, row = lane % 8;
  uint32_t fa[4], fb[4];
  ldmatrix_x4(fa, shared + (row + matrix % 2 * 8) * 16 + matrix / 2 * 8);
  ldmatrix_x4(fb, shared + 256 + row * 16 + matrix % 2 * 8);  // the upper two repeat the lower two
  float sum[4] = {};
  const uint32_t low[2] = {fb[0], fb[1]};
  mma_bf16(sum, fa, low);
  for (int i = 0; i < 4; ++i) d[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sum[i];
}

// The same in TF32, each lane's entries by the instruction's definition, of d that begins with 1.
__global__ void mma_tf32_kernel(const float* a, const float* b, float* d) {
  const int lane = threadIdx.x, row = lane / 4, column = lane % 4;
  uint32_t fa[4], fb[2];
  for (int i = 0; i < 4; ++i) fa[i] = __float_as_uint(a[(row + i % 2 * 8) * 8 + column + i / 2 * 4]);
  for (int i = 0; i < 2; ++i) fb[i] = __float_as_uint(b[(column + i * 4) * 8 + row]);
  float sum[4] = {1, 1, 1, 1};
  mma_tf32(sum, fa, fb);
  for (int i = 0; i < 4; ++i) d[(row + i / 2 * 8) * 8 + column * 2 + i % 2] = sum[i];
}

// Which operations on floats trap: none.
__global__ void environment_kernel(bool* traps) {
  if (fegetexcept() != 0) *traps = true;
  __syncthreads();
  if (fegetexcept() != 0) *traps = true;
}

// Blocks that come in between use the host's stack while threads of another one have yet to begin.
bool nothing_traps() {
  bool traps = false;
  cudaLaunchConfig_t config;
  config.gridDim = dim3(4);
  config.blockDim = dim3(64);
  return cudaLaunchKernelEx(&config, environment_kernel, &traps) == cudaSuccess && !traps;
}

bool neighbours_right(bool barrier) {
  std::vector<float> out(64);
  outcome(neighbour_kernel, 64, 0, barrier, out.data());
  for (int i = 0; i < 64; ++i) {
    if (out[i] != static_cast<float>((i + 1) % 64)) return false;
  }
  return true;
}

bool copies_right(bool wait) {
  alignas(16) float in[128];
  float out[32];
  for (int i = 0; i < 128; ++i) in[i] = static_cast<float>(i);
  outcome(copy_kernel, 32, sizeof in, wait, in, out);
  for (int i = 0; i < 32; ++i) {
    if (out[i] != in[i]) return false;
  }
  return true;
}

bool mma_right() {
  std::vector<uint16_t> a(256), b(128);
  const auto bits = [](int i) { return __float2bfloat16_rn(static_cast<float>(i % 37 - 18)).bits; };
  for (int i = 0; i < 256; ++i) a[i] = bits(7 * i);
  for (int i = 0; i < 128; ++i) b[i] = bits(11 * i + 3);
  std::vector<float> d(128);
  outcome(mma_kernel, 32, 768, a.data(), b.data(), d.data());
  for (int r = 0; r < 16; ++r) {
    for (int c = 0; c < 8; ++c) {
      int sum = 0;
      for (int k = 0; k < 16; ++k) sum += ((7 * (r * 16 + k)) % 37 - 18) * ((11 * (c * 16 + k) + 3) % 37 - 18);
      if (d[r * 8 + c] != static_cast<float>(sum)) return false;
    }
  }
  return true;
}

// Whole numbers and, in their lower 13 bits, what is to be ignored; then a sum that does not fit, which is cut off.
bool mma_tf32_right() {
  std::vector<float> a(128), b(64), d(128);
  const auto entry = [](int i) { return i % 37 - 18; };
  const auto noisy = [](int i) { return __uint_as_float(__float_as_uint(static_cast<float>(i)) | (i ? 0x1fffu : 0)); };
  for (int i = 0; i < 128; ++i) a[i] = noisy(entry(7 * i));
  for (int i = 0; i < 64; ++i) b[i] = noisy(entry(11 * i + 3));
  outcome(mma_tf32_kernel, 32, 0, a.data(), b.data(), d.data());
  for (int r = 0; r < 16; ++r) {
    for (int c = 0; c < 8; ++c) {
      int sum = 1;
      for (int k = 0; k < 8; ++k) sum += entry(7 * (r * 8 + k)) * entry(11 * (k * 8 + c) + 3);
      if (d[r * 8 + c] != static_cast<float>(sum)) return false;
    }
  }
  a.assign(128, 0);
  b.assign(64, 0);
  for (int i = 0; i < 16; ++i) a[i * 8] = 0x1p-12f;
  for (int i = 0; i < 8; ++i) b[i] = 1.5f * 0x1p-12f;  // 1 + 1.5 * 2^-24 would round up
  outcome(mma_tf32_kernel, 32, 0, a.data(), b.data(), d.data());
  return d == std::vector<float>(128, 1.0f);
}

// What reading and writing entry `at` of a tensor of `size` floats leads to.
std::string access(emulation::Guard guard, int size, int at) {
  emulation::set_guard(guard);
  const auto memory = emulation::allocate(size * sizeof(float));
  emulation::set_guard(emulation::Guard::kOff);
  auto* tensor = static_cast<float*>(memory.get());
  float value = 0;
  emulation::damage();
  std::string result = outcome(read_kernel, 1, 0, tensor, at, &value);
  if (value == value) result += "a number";
  result += outcome(write_kernel, 1, 0, tensor, at);
  return result + emulation::damage();
}

// Holds in one order of threads only: the mistake shows in the other.
bool in_one_order(bool (*right)(bool), bool correct) {
  int holds = 0;
  for (bool descending : {false, true}) {
    emulation::set_descending(descending);
    holds += right(correct);
  }
  emulation::set_descending(false);
  return holds == 1;
}

}  // namespace
}  // namespace hypermask

// What went wrong, or "".
extern "C" __attribute__((visibility("default"))) const char* emulation_self_test() {
  using namespace hypermask;
  static std::string result;
  result.clear();
  const auto expect = [](bool condition, const char* what) {
    if (!condition) result += std::string(what) + "; ";
  };
  const auto contains = [](const std::string& text, const char* part) { return text.find(part) != std::string::npos; };
  expect(neighbours_right(true) && copies_right(true), "correct kernels");
  expect(!neighbours_right(false) && !in_one_order(neighbours_right, true), "a missing barrier");
  expect(in_one_order(copies_right, false), "a missing wait for copies");
  expect(contains(outcome(ended_kernel, 64, 0), "thread 5 of block 0 has ended"), "a thread that ended");
  expect(contains(outcome(apart_kernel, 64, 0), "threads part ways"), "barriers in two places");
  expect(contains(outcome(half_a_warp_kernel, 32, 0), "threads part ways"), "half a warp");
  expect(contains(outcome(beyond_kernel, 32, 128), "beyond its dynamic shared memory"), "a write beyond the end");
  expect(outcome(beyond_kernel, 2000, 0) == "refused", "a block that is too large");
  expect(outcome(beyond_kernel, 32, 100 * 1024) == "refused", "shared memory not asked for");
  cudaFuncSetAttribute(beyond_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 100 * 1024);
  expect(outcome(beyond_kernel, 32, 100 * 1024) == "refused", "shared memory that may stay cache");
  cudaFuncSetAttribute(beyond_kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  expect(outcome(beyond_kernel, 32, 100 * 1024).empty(), "shared memory for several blocks");
  float nothing = 0;
  expect(cudaMemsetAsync(&nothing, 0, 0, nullptr) != cudaSuccess, "a memset of nothing");
  for (const int at : {0, 6}) {
    expect(access(emulation::Guard::kBehind, 7, at).empty(), "an access to a tensor");
    expect(access(emulation::Guard::kBefore, 7, at).empty(), "an access to a tensor");
  }
  const auto outside = [&](emulation::Guard guard, int at) {
    return contains(access(guard, 7, at), "outside of all tensors");
  };
  expect(outside(emulation::Guard::kBehind, 8) && outside(emulation::Guard::kBefore, -1), "an access far off");
  expect(access(emulation::Guard::kBehind, 7, 7) == "memory beside a tensor was written", "an access just beyond");
  expect(access(emulation::Guard::kBefore, 7, 7) == "memory beside a tensor was written", "an access just beyond");
  expect(mma_right(), "mma");
  expect(mma_tf32_right(), "mma in TF32");
  expect(nothing_traps(), "a kernel's floating-point environment");
  return result.c_str();
}
