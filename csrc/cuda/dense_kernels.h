// The pass over the hypernetwork's dense output layer on the GPU; formulas in csrc/cpu/kernels_dense.h.
//
// A block takes tiles of the layer in turn. In shared memory it makes the factors g of the tile (dense_factors.h), adds
// to the hidden vectors' gradient, with sums that stay in registers from tile to tile, and makes the tile's gradient
// for Adam: both by multiply-adds (dense_multiply_adds.h) or by tensor cores (dense_tensor_cores.h), the `Products`.
// Each value loaded from shared memory feeds 4 multiply-adds or more. Copies run ahead: while a tile is worked on, W of
// the next one is on its way, and each m and v follows as soon as its place is free. W, m and v are read and written
// once. Sums over rows are added in a fixed order: the same bits every time on the same device. The same in two
// launches, by factors that the forward pass has kept: kHidden, then kStep.
#pragma once

#include "dense_factors.h"
#include "dense_multiply_adds.h"
#include "dense_tensor_cores.h"

namespace hypermask {
namespace {

template <class Products, class Moment>
__device__ __forceinline__ void copy_moments(const Dense& d, const Tile& tile, const Shared& s) {
  const Moments<Moment> moments(d, s);
  copy_tile<Products>(d, tile, moments.m, moments.to_m);
  copy_tile<Products>(d, tile, moments.v, moments.to_v);
}

template <class Products, Mode kMode, class Moment>
__device__ __forceinline__ void dense_pass(const Dense& d) {
  __shared__ Step step;
  const DenseLayout& l = d.layout;
  Shared s(l, kMode);
  for (int i = threadIdx.x; i < l.slots * l.hidden_stride; i += kThreads) {
    const int task = i / l.hidden_stride, k = i - task * l.hidden_stride;
    s.hidden[i] = d.hidden && task < d.tasks && k < d.width ? d.hidden[task * d.width + k] : 0.0f;
  }
  if (steps_weights(kMode) && threadIdx.x == 0) {
    step.adam = adam_step(*d.step, *d.lr, d.beta1, d.beta2, d.eps, d.weight_decay, d.decoupled, d.maximize);
    step.draws = draws_of(*d.step, d.first_row, d.width);
  }
  const float coefficient = kMode == kValue || given_factors(kMode) ? 0.0f : 2.0f * *d.outer;
  float* partial = d.partial + static_cast<int64_t>(blockIdx.x) * d.tasks * d.width;
  typename Products::template HiddenGradient<kMode> hidden_gradient(l);
  CurrentRows<Products> given(d, kMode == kAdam);
  double squares = 0;
  const int64_t start = static_cast<int64_t>(blockIdx.x) * l.rows, stride = static_cast<int64_t>(gridDim.x) * l.rows;
  Tile tile(d, start);
  // Each thread closes two groups of copies per tile, W of the next one and m and v of the next one, in this order; so
  // "all but the last group" is W before the barrier below, and m and v in tile_weight.
  copy_tile<Products>(d, tile, s.weight, d.weight);
  cp_async_commit();
  if constexpr (steps_weights(kMode)) copy_moments<Products, Moment>(d, tile, s);
  cp_async_commit();
  given.read(d, tile);
  while (tile.row < d.rows) {
    const Tile next(d, tile.row + stride);
    given.step();
    given.read(d, next);
    cp_async_wait<1>();
    __syncthreads();  // W is here, and all threads are done with the tile before
    if (next.rows > 0) copy_tile<Products>(d, next, s.next_weight, d.weight);
    cp_async_commit();
    if constexpr (given_factors(kMode)) {
      scaled_factors<Products>(d, tile, s);
    } else {
      squares += tile_factors<Products, kMode>(d, tile, s, coefficient, given);
    }
    if constexpr (kMode != kValue) {
      BiasRow<Products, kMode> bias(d, tile);
      __syncthreads();
      if constexpr (sums_hidden(kMode)) hidden_gradient.add_tile(d, s, tile.row == start, partial);
      if constexpr (makes_weights(kMode)) Products::template tile_weight<kMode, Moment>(d, tile, s, step);
      if constexpr (kMode != kStep) bias.update(d, tile, s.factors, step.adam);
    }
    if constexpr (steps_weights(kMode)) {  // where each thread has just used its own pieces
      if (next.rows > 0) copy_moments<Products, Moment>(d, next, s);
    }
    cp_async_commit();
    float* free = s.weight;
    s.weight = s.next_weight;
    s.next_weight = free;
    tile = next;
  }
  squares = block_sum(squares);
  if (threadIdx.x == 0) d.partial_drift[blockIdx.x] = squares;
  if constexpr (sums_hidden(kMode)) hidden_gradient.finish(d, s.hidden, partial);
}

// Blocks on a multiprocessor, which decide how many registers a thread may have: 80 or 128. What needs more than 80 on
// an architecture gets 128, for nothing may spill.
template <int kPack, int kChunk, Mode kMode>
constexpr int dense_blocks() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  constexpr bool small = kPack * kChunk <= (steps_weights(kMode) ? 8 : 16);
#else
  constexpr bool small = kPack * kChunk <= 16;
#endif
  return small && kMode != kGradient ? 3 : 2;
}

template <int kPack, int kChunk, Mode kMode, class Moment>
__global__ void __launch_bounds__(kThreads, (dense_blocks<kPack, kChunk, kMode>())) dense_kernel(Dense d) {
  dense_pass<MultiplyAdds<kPack, kChunk>, kMode, Moment>(d);
}

template <Mode kMode, class Moment>
__global__ void __launch_bounds__(kThreads, 2) dense_tensor_kernel(Dense d) {
  dense_pass<TensorCores, kMode, Moment>(d);
}

// Adds the blocks' sums: 32 outputs a block, 8 groups of partial sums side by side, then the groups in order.
__global__ void finish_kernel(const float* partial, const double* partial_drift, int blocks, int outputs,
                              float* grad_hidden, float* drift) {
  __shared__ double sums[kThreads];
  const int lane = threadIdx.x % 32, group = threadIdx.x / 32, output = blockIdx.x * 32 + lane;
  double sum = 0;
  if (output < outputs) {
#pragma unroll 8
    for (int b = group; b < blocks; b += kThreads / 32) sum += partial[static_cast<int64_t>(b) * outputs + output];
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (group == 0 && output < outputs) {
    for (int g = 1; g < kThreads / 32; ++g) sum += sums[g * 32 + lane];
    grad_hidden[output] = static_cast<float>(sum);
  }
  if (blockIdx.x > 0) return;
  double total = 0;
  for (int b = threadIdx.x; b < blocks; b += kThreads) total += partial_drift[b];
  total = block_sum(total);
  if (threadIdx.x == 0 && drift) *drift = static_cast<float>(total);
}

}  // namespace
}  // namespace hypermask
