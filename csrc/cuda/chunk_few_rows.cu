// chunk_masked_linear for 1 to 16 rows of x in 16-bit types: W is read once, its logits are made in the kernel.
//
// Entry f = start + out * inputs + k of the hypernetwork's output is hidden[f / C] . output_weight[f % C] +
// output_bias[f % C]. Rows of W that are C / gcd(C, inputs) =: period apart begin at the same position of their chunks,
// period * inputs / C chunks apart: their logits at one k are products of one row of output_weight with several hidden
// vectors. So a block takes up to 48 rows of one residue modulo the period, and 32 k of them have logits
// hidden (48, H) output_weight^T (H, 32), tensor cores' work; the bias is one more column, against a hidden entry of 1.
// Columns are numbered so that the logits come out in the lanes, and in the order, in which W's entries are loaded.
// Each warp stages its rows of output_weight in shared memory; the hidden vectors are the block's. A chunk ends where
// it likes: a block goes chunk by chunk, and takes a step across the border twice, each time with its part of the
// entries.
#include <numeric>

#include "../common/registration.h"
#include "few_rows_kernels.h"
#include "few_rows_launch.h"

namespace hypermask {
namespace {

constexpr int kMaxWarps = 12;  // so that a thread has 168 registers
constexpr int kOutputTiles = 3;
constexpr int kBlockOutputs = kTileOutputs * kOutputTiles;

struct Chunks {
  const void *hidden, *output_weight, *output_bias;  // [chunks, width], [chunk_size, width], [chunk_size]
  int64_t start, chunk_size, period;
  int64_t chunks_per_period;
  int64_t tiles;  // of rows of one residue
  int width;
  bool vectors;  // rows of output_weight begin at multiples of 8 bytes
};

// Columns of a matrix in shared memory: the width and the bias up to whole products, and 8 more, so that the rows of an
// ldmatrix lie in different banks.
__host__ __device__ __forceinline__ int padded(int width) { return (width / 16 + 1) * 16; }
__host__ __device__ __forceinline__ int stride_of(int width) { return padded(width) + 8; }

// The place in shared memory of the position that is the q-th of its step: lane l's columns of product j, l % 4 * 2 and
// the next, are then positions 8 (l % 4) + 2 j and the next.
__device__ __forceinline__ int place_of(int q) { return q % 8 / 2 * 8 + q / 8 * 2 + q % 2; }

// The block's hidden vectors [48][stride], for its rows' entries in chunk `chunk` and its like.
template <class T>
__device__ __forceinline__ void stage_hidden(const Chunks& c, int64_t chunk, int outputs, T* shared) {
  const int lane = threadIdx.x % 32, columns = padded(c.width), stride = stride_of(c.width);
  for (int i = threadIdx.x / 32; i < kBlockOutputs; i += blockDim.x / 32) {
    const T* from = static_cast<const T*>(c.hidden) + (chunk + i * c.chunks_per_period) * c.width;
    for (int h = lane; h < columns; h += 32) {
      const bool inside = i < outputs && h < c.width;
      shared[i * stride + h] = inside ? from[h] : Element<T>::from_float(h == c.width ? 1.0f : 0.0f);
    }
  }
}

// The warp's rows of output_weight, positions first to first + 32 that there are; others become 0.
template <class T>
__device__ __forceinline__ void stage_layer(const Chunks& c, int64_t first, T* shared) {
  const int lane = threadIdx.x % 32, stride = stride_of(c.width);
  const T zero = Element<T>::from_float(0.0f);
  const auto* layer = static_cast<const T*>(c.output_weight) + first * c.width;
  __syncwarp();  // all lanes have read the step before: its mma had to wait for that, but orders no memory
  if (c.vectors && first >= 0 && first + kStep <= c.chunk_size) {
    for (int h = 4 * lane; h < c.width; h += 4 * 32) {
#pragma unroll 8
      for (int q = 0; q < kStep; ++q) cp_async<8>(shared + place_of(q) * stride + h, layer + q * c.width + h);
    }
  } else {
#pragma unroll 1
    for (int q = 0; q < kStep; ++q) {
      const bool inside = first + q >= 0 && first + q < c.chunk_size;
      for (int h = lane; h < c.width; h += 32) {
        shared[place_of(q) * stride + h] = inside ? layer[q * c.width + h] : zero;
      }
    }
  }
  const bool inside = first + lane >= 0 && first + lane < c.chunk_size;
  shared[place_of(lane) * stride + c.width] = inside ? static_cast<const T*>(c.output_bias)[first + lane] : zero;
  cp_async_commit();
}

// logits[m][j]: products of tile m's hidden vectors with positions of product j.
template <class T>
__device__ __forceinline__ void make_logits(int width, int tiles, const T* hidden, const T* layer,
                                            float (&logits)[kOutputTiles][4][4]) {
  const int lane = threadIdx.x % 32, stride = stride_of(width);
  const T* a_row = hidden + (lane / 8 % 2 * 8 + lane % 8) * stride + lane / 16 * 8;
  const T* b_row = layer + (lane / 16 * 8 + lane % 8) * stride + lane / 8 % 2 * 8;
#pragma unroll 1  // its addresses and operands would take the registers of the loads under way
  for (int h = 0; h < padded(width); h += 16) {
    uint32_t b[2][4];
    ldmatrix_x4(b[0], b_row + h);
    ldmatrix_x4(b[1], b_row + 16 * stride + h);
#pragma unroll
    for (int m = 0; m < kOutputTiles; ++m) {
      if (m >= tiles) break;
      uint32_t a[4];
      ldmatrix_x4(a, a_row + m * kTileOutputs * stride + h);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t part[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
        Element<T>::mma(logits[m][j], a, part);
      }
    }
  }
}

template <class T, int kRowTiles, bool kAligned>
__global__ void __launch_bounds__(32 * kMaxWarps) chunk_masked_linear_kernel(FewRows s, Chunks c) {
  using Sums = Product<T, kOutputTiles, kRowTiles, kAligned>;
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32, group = threadIdx.x % 32 / 4;
  const int stride = stride_of(c.width);
  const int64_t residue = blockIdx.x / c.tiles, first_row = blockIdx.x % c.tiles * kBlockOutputs;
  const int64_t first_output = residue + first_row * c.period, row_distance = c.period * s.inputs;
  const int outputs = static_cast<int>(  // 0 or less: none
      min(static_cast<int64_t>(kBlockOutputs), ceil_div(s.outputs - first_output, c.period)));
  const int tiles = (outputs + kTileOutputs - 1) / kTileOutputs;
  T* hidden = dynamic_shared<T>();
  T* layer = hidden + (kBlockOutputs + warp * kStep) * stride;
  for (int i = threadIdx.x % 32; i < kStep * 16; i += 32) {  // columns behind the bias stay 0
    const int h = padded(c.width) - 16 + i % 16;
    if (h > c.width) layer[i / 16 * stride + h] = Element<T>::from_float(0.0f);
  }
  const auto* weight = static_cast<const T*>(s.weight) + (first_output + group * c.period) * s.inputs;
  const float threshold = threshold_of(s, static_cast<T*>(nullptr));

  Sums sums;
  sums.clear();
  const int64_t base = c.start + residue * s.inputs;  // entry k of the residue's first row is number base + k
  const int64_t begin = blockIdx.y * s.steps * kStep, end = min(begin + s.steps * kStep, s.inputs);
  for (int64_t chunk = (base + begin) / c.chunk_size; begin < end && chunk * c.chunk_size - base < end; ++chunk) {
    const int64_t before = chunk * c.chunk_size - base;  // the chunk's position 0 is entry k = before
    const int64_t chunk_begin = max(begin, before), chunk_end = min(end, before + c.chunk_size);
    __syncthreads();
    stage_hidden(c, chunk + first_row * c.chunks_per_period, outputs, hidden);
    __syncthreads();
    for (int64_t step = chunk_begin / kStep + warp; step * kStep < chunk_end; step += warps) {
      stage_layer(c, step * kStep - before, layer);
      const int64_t k = step * kStep + kLaneEntries * (threadIdx.x % 4);
      Entries<T> w[2 * kOutputTiles];
      const auto load = [&](int i) {
        const int64_t left = group + 8 * i < outputs ? s.inputs - k : 0;
        w[i].template load<kAligned, true>(weight + 8 * i * row_distance + k, left);
      };
      if constexpr (kAligned) {  // under way while the logits are made; entry by entry they'd take too many registers
#pragma unroll
        for (int i = 0; i < 2 * kOutputTiles; ++i) load(i);
      }
      float logits[kOutputTiles][4][4] = {};
      cp_async_wait<0>();
      __syncwarp();
      make_logits(c.width, tiles, hidden, layer, logits);
      Entries<T> x[kRowTiles];
      load_x<T, kRowTiles, kAligned>(s, k, x);
      uint32_t keep[Entries<T>::kWords];  // of this lane's entries, those of this chunk
#pragma unroll
      for (int e = 0; e < kLaneEntries; ++e) {
        const uint32_t bits = k + e >= chunk_begin && k + e < chunk_end ? 0xffffu << 16 * (e % 2) : 0;
        keep[e / 2] = e % 2 ? keep[e / 2] | bits : bits;
      }
#pragma unroll
      for (int m = 0; m < kOutputTiles; ++m) {
        if (m >= tiles) break;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if constexpr (!kAligned) load(2 * m + i);
          if (kTileOutputs * m + 8 * i >= outputs) continue;  // W is 0 there
          Entries<T>& part = w[2 * m + i];
          part.make(
              [&](int e) { return part.entry(e) * Element<T>::mask(logits[m][e / 2][2 * i + e % 2], threshold); });
#pragma unroll
          for (int j = 0; j < Entries<T>::kWords; ++j) part.words[j] &= keep[j];
        }
        sums.add(s, m, k, w[2 * m], w[2 * m + 1], x);
      }
    }
  }
  finish<T>(s, sums, dynamic_shared<float>(), first_output, c.period);
}

template <class T, int kRowTiles, bool kAligned>
void run(const Launcher& gpu, FewRows& s, const Chunks& c, const Tensor& x, const char* op) {
  using Sums = Product<T, kOutputTiles, kRowTiles, kAligned>;
  const int64_t row_bytes = stride_of(c.width) * sizeof(T);
  const auto bytes = [&](int warps) {
    return std::max<int64_t>((kBlockOutputs + warps * kStep) * row_bytes, warps * Sums::kSharedFloats * sizeof(float));
  };
  const int limit = gpu.attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  int warps = kMaxWarps;
  while (warps > 1 && bytes(warps) > limit) --warps;
  if (bytes(warps) > limit) fail(op, "hidden is too wide, ", c.width, ", for this GPU's shared memory");
  const auto kernel = chunk_masked_linear_kernel<T, kRowTiles, kAligned>;
  gpu.allow_shared(kernel, bytes(warps));
  launch_splits<T>(gpu, s, x, c.period * c.tiles, warps, 1,
                   [&](dim3 grid) { gpu.launch(kernel, grid, 32 * warps, bytes(warps), s, c); });
}

Chunks chunks_of(const FewRows& s, const Tensor& hidden, const Tensor& output_weight, const Tensor& output_bias,
                 int64_t start) {
  Chunks c{};
  c.hidden = hidden.const_data_ptr();
  c.output_weight = output_weight.const_data_ptr();
  c.output_bias = output_bias.const_data_ptr();
  c.start = start;
  c.chunk_size = std::max<int64_t>(output_weight.size(0), 1);  // 0 only where W is empty
  c.period = c.chunk_size / std::gcd(c.chunk_size, s.inputs);
  c.chunks_per_period = c.period * s.inputs / c.chunk_size;
  c.width = static_cast<int>(hidden.size(1));
  c.vectors = c.width % 4 == 0 && reinterpret_cast<uintptr_t>(c.output_weight) % 8 == 0;
  c.period = std::min(c.period, s.outputs);  // no two rows share positions: a tile has one row
  c.tiles = ceil_div(ceil_div(s.outputs, c.period), kBlockOutputs);
  return c;
}

Tensor chunk_masked_linear(const Tensor& x, const Tensor& weight, const Tensor& hidden, const Tensor& output_weight,
                           const Tensor& output_bias, int64_t start, const Tensor& threshold,
                           const std::optional<Tensor>& bias) {
  const char* op = "chunk_masked_linear";
  check_few_rows(op, x, weight, threshold, bias, Place::gpu_of(x), 16);
  check_chunks(op, weight, hidden, output_weight, output_bias, start, Place::gpu_of(x));
  Tensor y = torch::stable::new_empty(x, {x.size(0), weight.size(0)});
  if (y.numel() == 0) return y;
  const Launcher gpu(op, x);
  FewRows s = few_rows(x, weight, threshold, bias, y);
  const auto launch = [&](auto zero) {
    using T = decltype(zero);
    const Chunks c = chunks_of(s, hidden, output_weight, output_bias, start);
    with_shape<2>(s, vectors_fit({&x, &weight}, s.inputs),
                  [&](auto row_tiles, auto aligned) { run<T, row_tiles(), aligned()>(gpu, s, c, x, op); });
  };
  if (x.scalar_type() == ScalarType::Half) {
    launch(__half{});
  } else {
    launch(__nv_bfloat16{});
  }
  return y;
}

}  // namespace

HM_CUDA(m) { m.impl("chunk_masked_linear", TORCH_BOX(&chunk_masked_linear)); }

}  // namespace hypermask
