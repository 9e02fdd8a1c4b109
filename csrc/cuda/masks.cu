// Masks, masked weights and weight drift on the GPU, all segments in one launch (per 64 of them).
#include <tuple>

#include "../common/mask_math.h"
#include "../common/masks.h"
#include "../common/registration.h"
#include "launcher.h"
#include "quads.h"

namespace hypermask {
namespace {

// What a launch over up to kMaxSegments weights works on; pointers that an op does not use are null.
struct Segments {
  BlockTable blocks;
  int64_t offset[kMaxSegments + 1];
  const float* weight[kMaxSegments];
  const float* grad[kMaxSegments];
  float* out[kMaxSegments];
};
static_assert(sizeof(Segments) + 10 * sizeof(void*) <= 4096, "kernel arguments are limited to 4 KiB");

// What one block works on: entries begin to begin + count of a segment.
struct Tile {
  int segment, count;
  int64_t begin, flat;  // flat: the place of its first entry in the flat mask

  __device__ __forceinline__ explicit Tile(const Segments& s) {
    segment = BlockTable::find(s.blocks, blockIdx.x);
    begin = (blockIdx.x - s.blocks.first_block[segment]) * kTileEntries;
    flat = s.offset[segment] + begin;
    count = static_cast<int>(min(kTileEntries, s.offset[segment + 1] - flat));
  }
};

constexpr int kBlocks = 4;  // on a multiprocessor: up to 64 registers a thread, and 32 kB of loads and more under way

// f(first, count, row) for this block's tiles of a matrix [rows, columns], whose rows have a threshold each.
template <class F>
__device__ __forceinline__ void for_row_tiles(int64_t rows, int64_t columns, const F& f) {
  const int64_t of_row = ceil_div(columns, kTileEntries);
  for (int64_t tile = blockIdx.x; tile < rows * of_row; tile += gridDim.x) {
    const int64_t row = tile / of_row, begin = (tile - row * of_row) * kTileEntries;
    f(row * columns + begin, static_cast<int>(min(kTileEntries, columns - begin)), row);
  }
}

__global__ void __launch_bounds__(kThreads, kBlocks)
    mask_forward_kernel(const float* logits, const float* threshold, float* mask, int64_t rows, int64_t columns) {
  for_row_tiles(rows, columns, [&](int64_t first, int count, int64_t row) {
    const float *a = logits + first, limit = threshold[row];
    float* out = mask + first;
    for_quads(count, on_16_bytes(a, out), [&](const auto& quad) {
      const Pack<4> logit = quad.load(a);
      quad.store(out, each_of([&](int n) { return mask_value(logit.x[n], limit); }));
    });
  });
}

__global__ void __launch_bounds__(kThreads, kBlocks)
    mask_backward_kernel(const float* logits, const float* threshold, const float* grad, float* grad_logits,
                         int64_t rows, int64_t columns) {
  for_row_tiles(rows, columns, [&](int64_t first, int count, int64_t row) {
    const float *a = logits + first, *g = grad + first, limit = threshold[row];
    float* da = grad_logits + first;
    for_quads(count, on_16_bytes(a, g, da), [&](const auto& quad) {
      const Pack<4> logit = quad.load(a), outer = quad.load(g);
      quad.store(da, each_of([&](int n) {
                   float mask, slope;
                   mask_and_slope(logit.x[n], limit, mask, slope);
                   return logit_gradient(logit.x[n], limit, slope, outer.x[n]);
                 }));
    });
  });
}

__global__ void __launch_bounds__(kThreads, kBlocks)
    weights_forward_kernel(Segments s, const float* logits, const float* thresholds) {
  const Tile t(s);
  const float *w = s.weight[t.segment] + t.begin, *a = logits + t.flat, limit = thresholds[t.segment];
  float* out = s.out[t.segment] + t.begin;
  for_quads(t.count, on_16_bytes(w, a, out), [&](const auto& quad) {
    const Pack<4> weight = quad.load(w), logit = quad.load(a);
    quad.store(out, each_of([&](int n) { return weight.x[n] * mask_value(logit.x[n], limit); }));
  });
}

__global__ void __launch_bounds__(kThreads, kBlocks)
    weights_backward_kernel(Segments s, const float* logits, const float* thresholds, float* grad_logits) {
  const Tile t(s);
  const float *w = s.weight[t.segment] + t.begin, *a = logits + t.flat, limit = thresholds[t.segment];
  const float* g = s.grad[t.segment] + t.begin;
  float *dw = s.out[t.segment] + t.begin, *da = grad_logits + t.flat;
  for_quads(t.count, on_16_bytes(w, a, g, dw, da), [&](const auto& quad) {
    const Pack<4> weight = quad.load(w), logit = quad.load(a), outer = quad.load(g);
    Pack<4> grad_logit;
    quad.store(dw, each_of([&](int n) {
                 float mask, slope;
                 mask_and_slope(logit.x[n], limit, mask, slope);
                 grad_logit.x[n] = logit_gradient(logit.x[n], limit, slope, outer.x[n] * weight.x[n]);
                 return outer.x[n] * mask;
               }));
    quad.store(da, grad_logit);
  });
}

// partial[block] = the tile's sum of |x| or x^2, x = (weight - previous) mask; writes weight mask too where there are
// outs.
__global__ void __launch_bounds__(kThreads, kBlocks)
    drift_forward_kernel(Segments s, const float* previous, const float* logits, const float* thresholds, int norm,
                         double* partial) {
  const Tile t(s);
  const float *w = s.weight[t.segment] + t.begin, *p = previous + t.flat, *a = logits ? logits + t.flat : nullptr;
  float* out = s.out[t.segment] ? s.out[t.segment] + t.begin : nullptr;
  const float limit = logits ? thresholds[t.segment] : 0.0f;
  double sum = 0;
  for_quads(t.count, on_16_bytes(w, p, a, out), [&](const auto& quad) {
    const Pack<4> weight = quad.load(w), before = quad.load(p), logit = a ? quad.load(a) : Pack<4>{};
    const Pack<4> masked = each_of([&](int n) {
      const float mask = a ? mask_value(logit.x[n], limit) : 1.0f, x = (weight.x[n] - before.x[n]) * mask;
      sum += norm == 1 ? fabsf(x) : x * x;
      return weight.x[n] * mask;
    });
    if (out) quad.store(out, masked);
  });
  sum = block_sum(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// One block per segment adds the partial sums of its blocks, in the same order each time.
__global__ void drift_finish_kernel(BlockTable blocks, const double* partial, int norm, float* norms) {
  double sum = 0;
  for (int64_t b = blocks.first_block[blockIdx.x] + threadIdx.x; b < blocks.first_block[blockIdx.x + 1];
       b += kThreads) {
    sum += partial[b];
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) norms[blockIdx.x] = static_cast<float>(norm == 1 ? sum : sqrt(sum));
}

__device__ __forceinline__ float sign(float x) { return x > 0 ? 1.0f : x < 0 ? -1.0f : 0.0f; }  // 0 for NaN

// Gradients of sum_s grad_s norm_s, with those of sum_s <grad_s, weight_s mask_s> where segments have a grad.
__global__ void __launch_bounds__(kThreads, kBlocks)
    drift_backward_kernel(Segments s, const float* previous, const float* logits, const float* thresholds, int norm,
                          const float* grad, const float* norms, float* grad_logits) {
  const Tile t(s);
  const float *w = s.weight[t.segment] + t.begin, *p = previous + t.flat, *a = logits ? logits + t.flat : nullptr;
  const float* g = s.grad[t.segment] ? s.grad[t.segment] + t.begin : nullptr;
  float *dw = s.out[t.segment] + t.begin, *da = logits ? grad_logits + t.flat : nullptr;
  const float limit = logits ? thresholds[t.segment] : 0.0f;
  const float value = norms[t.segment];
  const float scale = norm == 1 ? grad[t.segment] : value == 0 ? grad[t.segment] * 0.0f : grad[t.segment] / value;
  for_quads(t.count, on_16_bytes(w, p, a, g, dw, da), [&](const auto& quad) {
    const Pack<4> weight = quad.load(w), before = quad.load(p), logit = a ? quad.load(a) : Pack<4>{};
    const Pack<4> from_above = g ? quad.load(g) : Pack<4>{};
    Pack<4> grad_logit;
    quad.store(dw, each_of([&](int n) {
                 const float change = weight.x[n] - before.x[n];
                 float mask = 1.0f, slope = 0.0f;
                 if (a) mask_and_slope(logit.x[n], limit, mask, slope);
                 const float x = change * mask;
                 const float outer = scale * (norm == 1 ? sign(x) : x);
                 const float of_weight =
                     g ? from_above.x[n] * weight.x[n] : 0.0f;  // 0 * weight would be NaN where that is Inf
                 grad_logit.x[n] = logit_gradient(logit.x[n], limit, slope, outer * change + of_weight);
                 return (outer + from_above.x[n]) * mask;
               }));
    if (a) quad.store(da, grad_logit);
  });
}

Tensors empty_like_all(const Tensors& tensors) {
  Tensors result;
  for (const Tensor& t : tensors) result.push_back(empty_float(t, shape_of(t)));
  return result;
}

// f(segments, first): one launch for every kMaxSegments weights that have entries.
template <class F>
void for_segments(const Tensors& weights, const Tensors* grads, const Tensors* outs, const Offsets& offsets,
                  const F& f) {
  const auto total = static_cast<int64_t>(weights.size());
  for (int64_t first = 0; first < total; first += kMaxSegments) {
    Segments s{};
    const int count = static_cast<int>(std::min<int64_t>(kMaxSegments, total - first));
    int64_t sizes[kMaxSegments];
    for (int i = 0; i < count; ++i) {
      sizes[i] = offsets[first + i + 1] - offsets[first + i];
      s.offset[i] = offsets[first + i];
      s.weight[i] = data(weights[first + i]);
      if (grads) s.grad[i] = data((*grads)[first + i]);
      if (outs) s.out[i] = mutable_data((*outs)[first + i]);
    }
    s.offset[count] = offsets[first + count];
    fill_table(s.blocks, sizes, count);
    f(s, first);
  }
}

void clear_outside(const Launcher& gpu, float* flat, int64_t size, const Offsets& offsets, size_t weights) {
  constexpr auto kBytes = static_cast<int64_t>(sizeof(float));
  gpu.clear(flat, offsets[0] * kBytes);
  gpu.clear(flat + offsets[weights], (size - offsets[weights]) * kBytes);
}

// Blocks for [rows, columns]: a tile each, or several where there are more than the GPU holds at a time.
unsigned row_blocks(const Launcher& gpu, int64_t rows, int64_t columns) {
  const int64_t held = gpu.attribute(cudaDevAttrMultiProcessorCount) * int64_t{16};
  return static_cast<unsigned>(std::min(rows * ceil_div(columns, kTileEntries), held));
}

Tensor semi_binary_mask(const Tensor& logits, const Tensor& threshold) {
  const char* op = "semi_binary_mask";
  const int64_t rows = check_mask(op, logits, threshold, Place::gpu_of(logits)), total = logits.numel();
  Tensor mask = empty_float(logits, shape_of(logits));
  if (total == 0) return mask;
  const Launcher gpu(op, logits);
  const int64_t columns = total / rows;
  gpu.launch(mask_forward_kernel, row_blocks(gpu, rows, columns), kThreads, 0, data(logits), data(threshold),
             mutable_data(mask), rows, columns);
  return mask;
}

Tensor semi_binary_mask_backward(const Tensor& grad, const Tensor& logits, const Tensor& threshold) {
  const char* op = "semi_binary_mask_backward";
  const int64_t rows = check_mask(op, logits, threshold, Place::gpu_of(logits)), total = logits.numel();
  check_float(op, "grad", grad, Place::gpu_of(logits), shape_of(logits));
  Tensor result = empty_float(logits, shape_of(logits));
  if (total == 0) return result;
  const Launcher gpu(op, logits);
  const int64_t columns = total / rows;
  gpu.launch(mask_backward_kernel, row_blocks(gpu, rows, columns), kThreads, 0, data(logits), data(threshold),
             data(grad), mutable_data(result), rows, columns);
  return result;
}

Tensors masked_weights(const Tensors& weights, const Tensor& logits, const Tensor& thresholds, const Offsets& offsets) {
  const char* op = "masked_weights";
  check_masked(op, weights, logits, thresholds, offsets, Place::gpu_of(logits));
  Tensors masked = empty_like_all(weights);
  const Launcher gpu(op, logits);
  for_segments(weights, nullptr, &masked, offsets, [&](const Segments& s, int64_t first) {
    const auto blocks = static_cast<unsigned>(s.blocks.first_block[s.blocks.count]);
    if (blocks) gpu.launch(weights_forward_kernel, blocks, kThreads, 0, s, data(logits), data(thresholds) + first);
  });
  return masked;
}

std::tuple<Tensors, Tensor> masked_weights_backward(const Tensors& grads, const Tensors& weights, const Tensor& logits,
                                                    const Tensor& thresholds, const Offsets& offsets) {
  const char* op = "masked_weights_backward";
  check_masked(op, weights, logits, thresholds, offsets, Place::gpu_of(logits));
  check_grads(op, grads, weights, offsets, Place::gpu_of(logits));
  Tensors grad_weights = empty_like_all(weights);
  Tensor grad_logits = empty_float(logits, shape_of(logits));
  const Launcher gpu(op, logits);
  float* da = mutable_data(grad_logits);
  clear_outside(gpu, da, logits.numel(), offsets, weights.size());
  for_segments(weights, &grads, &grad_weights, offsets, [&](const Segments& s, int64_t first) {
    const auto blocks = static_cast<unsigned>(s.blocks.first_block[s.blocks.count]);
    if (blocks) {
      gpu.launch(weights_backward_kernel, blocks, kThreads, 0, s, data(logits), data(thresholds) + first, da);
    }
  });
  return {grad_weights, grad_logits};
}

// The drift's norm per segment; also writes weight * mask to `masked`, a tensor per weight, unless that is null.
Tensor drift_norms(const char* op, const Tensors& weights, const Tensor& previous, const Offsets& offsets, int64_t norm,
                   const std::optional<Tensor>& logits, const std::optional<Tensor>& thresholds,
                   const Tensors* masked) {
  Tensor norms = empty_float(previous, {static_cast<int64_t>(weights.size())});
  const Launcher gpu(op, previous);
  const float* a = logits ? data(*logits) : nullptr;
  for_segments(weights, nullptr, masked, offsets, [&](const Segments& s, int64_t first) {
    const auto blocks = static_cast<unsigned>(s.blocks.first_block[s.blocks.count]);
    Tensor partial = empty_of(previous, {blocks}, ScalarType::Double);
    auto* sums = partial.mutable_data_ptr<double>();
    if (blocks) {
      gpu.launch(drift_forward_kernel, blocks, kThreads, 0, s, data(previous), a,
                 a ? data(*thresholds) + first : nullptr, static_cast<int>(norm), sums);
    }
    gpu.launch(drift_finish_kernel, s.blocks.count, kThreads, 0, s.blocks, sums, static_cast<int>(norm),
               mutable_data(norms) + first);
  });
  return norms;
}

// Gradients of the drift and, unless `grads` is null, of the masked weights with it.
std::tuple<Tensors, Tensor> drift_gradients(const char* op, const Tensor& grad, const Tensor& norms,
                                            const Tensors* grads, const Tensors& weights, const Tensor& previous,
                                            const Offsets& offsets, int64_t norm, const std::optional<Tensor>& logits,
                                            const std::optional<Tensor>& thresholds) {
  Tensors grad_weights = empty_like_all(weights);
  Tensor grad_logits = empty_float(previous, logits ? shape_of(*logits) : Shape{0});
  const Launcher gpu(op, previous);
  const float* a = logits ? data(*logits) : nullptr;
  float* da = mutable_data(grad_logits);
  if (a) clear_outside(gpu, da, logits->numel(), offsets, weights.size());
  for_segments(weights, grads, &grad_weights, offsets, [&](const Segments& s, int64_t first) {
    const auto blocks = static_cast<unsigned>(s.blocks.first_block[s.blocks.count]);
    if (!blocks) return;
    gpu.launch(drift_backward_kernel, blocks, kThreads, 0, s, data(previous), a,
               a ? data(*thresholds) + first : nullptr, static_cast<int>(norm), data(grad) + first, data(norms) + first,
               da);
  });
  return {grad_weights, grad_logits};
}

Tensor weight_drift(const Tensors& weights, const Tensor& previous, const Offsets& offsets, int64_t norm,
                    const std::optional<Tensor>& logits, const std::optional<Tensor>& thresholds) {
  const char* op = "weight_drift";
  check_drift(op, weights, previous, offsets, norm, logits, thresholds, Place::gpu_of(previous));
  return drift_norms(op, weights, previous, offsets, norm, logits, thresholds, nullptr);
}

std::tuple<Tensors, Tensor> weight_drift_backward(const Tensor& grad, const Tensor& norms, const Tensors& weights,
                                                  const Tensor& previous, const Offsets& offsets, int64_t norm,
                                                  const std::optional<Tensor>& logits,
                                                  const std::optional<Tensor>& thresholds) {
  const char* op = "weight_drift_backward";
  check_drift_backward(op, grad, norms, weights, previous, offsets, norm, logits, thresholds, Place::gpu_of(previous));
  return drift_gradients(op, grad, norms, nullptr, weights, previous, offsets, norm, logits, thresholds);
}

std::tuple<Tensors, Tensor> masked_weights_drift(const Tensors& weights, const Tensor& logits, const Tensor& thresholds,
                                                 const Offsets& offsets, const Tensor& previous, int64_t norm) {
  const char* op = "masked_weights_drift";
  check_drift(op, weights, previous, offsets, norm, logits, thresholds, Place::gpu_of(previous));
  Tensors masked = empty_like_all(weights);
  Tensor norms = drift_norms(op, weights, previous, offsets, norm, logits, thresholds, &masked);
  return {masked, norms};
}

std::tuple<Tensors, Tensor> masked_weights_drift_backward(const Tensors& grads, const Tensor& grad, const Tensor& norms,
                                                          const Tensors& weights, const Tensor& logits,
                                                          const Tensor& thresholds, const Offsets& offsets,
                                                          const Tensor& previous, int64_t norm) {
  const char* op = "masked_weights_drift_backward";
  check_drift_backward(op, grad, norms, weights, previous, offsets, norm, logits, thresholds, Place::gpu_of(previous));
  check_grads(op, grads, weights, offsets, Place::gpu_of(previous));
  return drift_gradients(op, grad, norms, &grads, weights, previous, offsets, norm, logits, thresholds);
}

}  // namespace

HM_CUDA(m) {
  m.impl("semi_binary_mask", TORCH_BOX(&semi_binary_mask));
  m.impl("semi_binary_mask_backward", TORCH_BOX(&semi_binary_mask_backward));
  m.impl("masked_weights", TORCH_BOX(&masked_weights));
  m.impl("masked_weights_backward", TORCH_BOX(&masked_weights_backward));
  m.impl("weight_drift", TORCH_BOX(&weight_drift));
  m.impl("weight_drift_backward", TORCH_BOX(&weight_drift_backward));
  m.impl("masked_weights_drift", TORCH_BOX(&masked_weights_drift));
  m.impl("masked_weights_drift_backward", TORCH_BOX(&masked_weights_drift_backward));
}

}  // namespace hypermask
