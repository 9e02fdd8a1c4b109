// What the ops for a few rows of x share: y = x (W * m)^T + b for 1 to 64 rows, where the bytes of W decide the time.
//
// A warp takes 16 rows of W (outputs) by kStep entries of the reduction at a time. Lane l holds 8 consecutive entries
// of rows l / 4 and l / 4 + 8, beginning at 8 (l % 4): loads of 16 bytes, and for 16-bit types just the entries of two
// A operands of mma.m16n8k16, if the reduction is numbered so that a lane's k are consecutive. x has the same layout as
// B operand (8 rows of x in n), so nothing is ever shuffled. Warps of a block share their outputs and take every
// warps-th step; where blocks are too few for the GPU, splits share the steps too, and the last of an output's splits
// to end adds them up. All sums are made in a fixed order.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../common/launch.h"
#include "../common/mask_math.h"
#include "device.h"

namespace hypermask {

struct FewRows {
  const void *x, *weight;  // [rows, inputs], [outputs, inputs]
  const void* threshold;   // one entry
  const void* bias;        // [outputs] or null
  void* y;                 // [rows, outputs]
  float* partial;          // [splits, rows, outputs] in place of y, or null
  unsigned* ended;  // [blocks of a split]: how many splits have, 0 before and after; null: sum_splits_kernel adds
  int64_t outputs, inputs;
  int64_t steps;  // of one split
  int rows;
  bool float_threshold;  // else of W's dtype
};

namespace {

constexpr int kStep = 32;        // entries of the reduction that a warp takes at a time
constexpr int kLaneEntries = 8;  // of them, in a row, are a lane's
constexpr int kTileOutputs = 16;

// 16-bit types in pairs, the lower index in the lower half, and the mask in the accuracy that the type deserves.
template <class T>
struct Element;

template <>
struct Element<float> {
  static constexpr bool kTensorCores = false;
  __device__ static float to_float(float x) { return x; }
  __device__ static float from_float(float x) { return x; }
  __device__ static float mask(float a, float threshold) { return mask_value<float>(a, threshold); }
};

template <>
struct Element<__half> {
  static constexpr bool kTensorCores = true;
  __device__ static float to_float(__half x) { return __half2float(x); }
  __device__ static __half from_float(float x) { return __float2half_rn(x); }
  __device__ static float2 unpack(uint32_t pair) {
    __half2 h;
    memcpy(&h, &pair, sizeof h);
    return __half22float2(h);
  }
  __device__ static uint32_t pack(float low, float high) {
    const __half2 h = __floats2half2_rn(low, high);
    uint32_t pair;
    memcpy(&pair, &h, sizeof pair);
    return pair;
  }
  __device__ static void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma_fp16(d, a, b); }
  // To 2^-18, where W * m is rounded to 2^-12: mask_value's 40 instructions an entry would outlast the bytes.
  __device__ static float mask(float a, float threshold) {
    const float x = magnitude(a);
    const float e = __expf(-2.0f * x);
    const float tanh = x < 0.0625f ? x - x * x * x * (1.0f / 3) : __fdividef(1.0f - e, 1.0f + e);
    return x < threshold ? 0.0f : tanh;
  }
};

template <>
struct Element<__nv_bfloat16> {
  static constexpr bool kTensorCores = true;
  __device__ static float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
  __device__ static __nv_bfloat16 from_float(float x) { return __float2bfloat16_rn(x); }
  __device__ static float2 unpack(uint32_t pair) {
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
  }
  __device__ static uint32_t pack(float low, float high) {
    const __nv_bfloat162 h = __floats2bfloat162_rn(low, high);
    uint32_t pair;
    memcpy(&pair, &h, sizeof pair);
    return pair;
  }
  __device__ static void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma_bf16(d, a, b); }
  // The hardware's tanh is off by 2^-11 at most, where W * m is rounded to 2^-9.
  __device__ static float mask(float a, float threshold) {
    const float x = magnitude(a);
    const float tanh = tanh_approx(x);
    return x < threshold ? 0.0f : tanh;
  }
};

// A lane's 8 consecutive entries.
template <class T>
struct Entries {
  static constexpr int kWords = kLaneEntries * sizeof(T) / 4;
  uint32_t words[kWords];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = 0;
  }

  // `left` entries from p on exist, the others become 0. Aligned: p to 16 bytes, and left is a multiple of 8.
  template <bool kAligned, bool kStream>
  __device__ __forceinline__ void load(const T* p, int64_t left) {
    clear();
    if constexpr (kAligned) {
      if (left > 0) {
#pragma unroll
        for (int i = 0; i < kWords; i += 4) {
          const auto* from = reinterpret_cast<const uint4*>(p) + i / 4;
          const uint4 v = kStream ? __ldcs(from) : __ldg(from);  // what is read once does not push x out of the cache
          words[i] = v.x;
          words[i + 1] = v.y;
          words[i + 2] = v.z;
          words[i + 3] = v.w;
        }
      }
    } else {
      T entries[kLaneEntries];
#pragma unroll
      for (int e = 0; e < kLaneEntries; ++e) entries[e] = e < left ? p[e] : Element<T>::from_float(0.0f);
      memcpy(words, entries, sizeof words);
    }
  }

  __device__ __forceinline__ float entry(int e) const {
    if constexpr (Element<T>::kTensorCores) {
      const float2 pair = Element<T>::unpack(words[e / 2]);
      return e % 2 ? pair.y : pair.x;
    } else {
      return __uint_as_float(words[e]);
    }
  }

  // Entries 2i and 2i + 1 of a 16-bit type, or entry i of float32, as f(entry) makes them.
  template <class F>
  __device__ __forceinline__ void make(const F& f) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      if constexpr (Element<T>::kTensorCores) {
        words[i] = Element<T>::pack(f(2 * i), f(2 * i + 1));
      } else {
        words[i] = __float_as_uint(f(i));
      }
    }
  }
};

// x's entries k to k + 8 for the columns of a warp's products: of row 8 n + lane / 4.
template <class T, int kRowTiles, bool kAligned>
__device__ __forceinline__ void load_x(const FewRows& s, int64_t k, Entries<T> (&x)[kRowTiles]) {
#pragma unroll
  for (int n = 0; n < kRowTiles; ++n) {
    const int row = 8 * n + threadIdx.x % 32 / 4;
    const auto* from = static_cast<const T*>(s.x) + row * s.inputs + k;
    x[n].template load<kAligned, false>(from, row < s.rows ? s.inputs - k : 0);
  }
}

// (W * m) x^T of kOutputTiles tiles of 16 outputs and kRowTiles tiles of 8 rows of x.
template <class T, int kOutputTiles, int kRowTiles, bool kAligned>
struct Product {
  static constexpr int kColumns = 8 * kRowTiles;
  static constexpr int kOutputs = kTileOutputs * kOutputTiles;
  static constexpr bool kTensorCores = Element<T>::kTensorCores;
  // Tensor cores: as mma has them. Otherwise sums over this lane's entries, of two outputs for each row of x.
  float sum[kOutputTiles][kTensorCores ? kRowTiles : kColumns][kTensorCores ? 4 : 2];

  __device__ __forceinline__ void clear() {
    for (auto& tile : sum) {
      for (auto& part : tile) {
        for (float& value : part) value = 0;
      }
    }
  }

  // Adds tile m's entries from k on: `low` of output lane / 4, `high` of the one 8 further on.
  __device__ __forceinline__ void add(const FewRows& s, int m, int64_t k, const Entries<T>& low, const Entries<T>& high,
                                      const Entries<T> (&x)[kRowTiles]) {
    if constexpr (kTensorCores) {
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        const uint32_t a[4] = {low.words[2 * q], high.words[2 * q], low.words[2 * q + 1], high.words[2 * q + 1]};
#pragma unroll
        for (int n = 0; n < kRowTiles; ++n) {
          const uint32_t b[2] = {x[n].words[2 * q], x[n].words[2 * q + 1]};
          Element<T>::mma(sum[m][n], a, b);
        }
      }
    } else {
#pragma unroll
      for (int row = 0; row < kColumns; ++row) {
        if (row >= s.rows) break;
        Entries<T> of_row;
        of_row.template load<kAligned, false>(static_cast<const T*>(s.x) + row * s.inputs + k, s.inputs - k);
#pragma unroll
        for (int e = 0; e < kLaneEntries; ++e) {
          sum[m][row][0] += low.entry(e) * of_row.entry(e);
          sum[m][row][1] += high.entry(e) * of_row.entry(e);
        }
      }
    }
  }

  static constexpr int kStride = kColumns + 1;              // odd, for the banks of shared memory
  static constexpr int kSharedFloats = kOutputs * kStride;  // of a warp

  // This warp's sums to shared [outputs][kStride].
  __device__ __forceinline__ void store(float* shared) {
    const int group = threadIdx.x % 32 / 4, quarter = threadIdx.x % 4;
#pragma unroll
    for (int m = 0; m < kOutputTiles; ++m) {
      if constexpr (kTensorCores) {
#pragma unroll
        for (int n = 0; n < kRowTiles; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int output = m * kTileOutputs + group + i / 2 * 8;
            shared[output * kStride + 8 * n + 2 * quarter + i % 2] = sum[m][n][i];
          }
        }
      } else {
#pragma unroll
        for (int row = 0; row < kColumns; ++row) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float value = sum[m][row][i];
            value += __shfl_xor_sync(0xffffffffu, value, 1);
            value += __shfl_xor_sync(0xffffffffu, value, 2);
            if (quarter == 0) shared[(m * kTileOutputs + group + i * 8) * kStride + row] = value;
          }
        }
      }
    }
  }
};

template <class T>
__device__ __forceinline__ float threshold_of(const FewRows& s, T*) {
  return s.float_threshold ? *static_cast<const float*>(s.threshold)
                           : Element<T>::to_float(*static_cast<const T*>(s.threshold));
}

template <class T>
__device__ __forceinline__ void write(const FewRows& s, int64_t row, int64_t output, float value) {
  if (s.bias) value += Element<T>::to_float(static_cast<const T*>(s.bias)[output]);
  static_cast<T*>(s.y)[row * s.outputs + output] = Element<T>::from_float(value);
}

// The splits' sums of one output, added in their order.
__device__ __forceinline__ float sum_of_splits(const FewRows& s, int splits, int64_t entry) {
  float value = 0;
  for (int split = 0; split < splits; ++split) value += __ldcg(s.partial + split * (s.rows * s.outputs) + entry);
  return value;
}

// Whether this block is the last of its outputs' splits to come here: then all their sums are in memory. The whole
// block calls it.
__device__ __forceinline__ bool last_of_splits(const FewRows& s) {
  __shared__ bool last;
  __threadfence();  // this thread's sums before the block is counted
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(s.ended + blockIdx.x, 1u) == gridDim.y - 1;
    if (last) s.ended[blockIdx.x] = 0;  // for the next call
  }
  __syncthreads();
  if (last) __threadfence();
  return last;
}

// Adds the warps' sums in their order; the block's outputs are first, first + distance, ... The whole block calls it.
template <class T, class P>
__device__ __forceinline__ void finish(const FewRows& s, P& product, float* shared, int64_t first, int64_t distance) {
  __syncthreads();  // shared memory may still be read
  product.store(shared + threadIdx.x / 32 * P::kSharedFloats);
  __syncthreads();
  const int warps = blockDim.x / 32;
  const auto each = [&](const auto& f) {  // f(row, output, output counted in the block)
    for (int i = threadIdx.x; i < s.rows * P::kOutputs; i += blockDim.x) {
      const int row = i / P::kOutputs, local = i % P::kOutputs;
      const int64_t output = first + local * distance;
      if (output < s.outputs) f(row, output, local);
    }
  };
  each([&](int row, int64_t output, int local) {
    float value = 0;
    for (int w = 0; w < warps; ++w) value += shared[w * P::kSharedFloats + local * P::kStride + row];
    if (s.partial) {
      s.partial[(static_cast<int64_t>(blockIdx.y) * s.rows + row) * s.outputs + output] = value;
    } else {
      write<T>(s, row, output, value);
    }
  });
  if (!s.partial || !s.ended || !last_of_splits(s)) return;
  each([&](int row, int64_t output, int) {
    write<T>(s, row, output, sum_of_splits(s, static_cast<int>(gridDim.y), row * s.outputs + output));
  });
}

// y = the splits' sums and the bias.
template <class T>
__global__ void __launch_bounds__(kThreads) sum_splits_kernel(FewRows s, int splits) {
  const int64_t size = s.rows * s.outputs, i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < size) write<T>(s, i / s.outputs, i % s.outputs, sum_of_splits(s, splits, i));
}

}  // namespace
}  // namespace hypermask
