// Masks, masked weights and weight drift on the GPU, all segments in one launch (per 64 of them).
#include "../common/mask_math.h"
#include "cuda_ops.h"
#include "device.h"
#include "launcher.h"

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

struct Tile {
  int segment;
  int64_t begin, end;  // within the segment
};

__device__ __forceinline__ Tile tile_of_block(const Segments& s) {
  Tile t;
  t.segment = BlockTable::find(s.blocks, blockIdx.x);
  t.begin = (blockIdx.x - s.blocks.first_block[t.segment]) * kTileEntries;
  t.end = min(t.begin + kTileEntries, s.offset[t.segment + 1] - s.offset[t.segment]);
  return t;
}

__global__ void mask_forward_kernel(const float* logits, const float* threshold, float* mask, int64_t columns,
                                    int64_t total) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; i < total; i += step) {
    mask[i] = mask_value(logits[i], threshold[i / columns]);
  }
}

__global__ void mask_backward_kernel(const float* logits, const float* threshold, const float* grad, float* out,
                                     int64_t columns, int64_t total) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; i < total; i += step) {
    float mask, slope;
    mask_and_slope(logits[i], threshold[i / columns], mask, slope);
    out[i] = grad[i] * slope;
  }
}

__global__ void weights_forward_kernel(Segments s, const float* logits, const float* thresholds) {
  const Tile t = tile_of_block(s);
  const float* a = logits + s.offset[t.segment];
  const float limit = thresholds[t.segment];
  for (int64_t i = t.begin + threadIdx.x; i < t.end; i += kThreads) {
    s.out[t.segment][i] = s.weight[t.segment][i] * mask_value(a[i], limit);
  }
}

__global__ void weights_backward_kernel(Segments s, const float* logits, const float* thresholds, float* grad_logits) {
  const Tile t = tile_of_block(s);
  const float* a = logits + s.offset[t.segment];
  float* da = grad_logits + s.offset[t.segment];
  const float limit = thresholds[t.segment];
  for (int64_t i = t.begin + threadIdx.x; i < t.end; i += kThreads) {
    float mask, slope;
    mask_and_slope(a[i], limit, mask, slope);
    const float g = s.grad[t.segment][i];
    s.out[t.segment][i] = g * mask;
    da[i] = g * s.weight[t.segment][i] * slope;
  }
}

// partial[block] = the tile's sum of |x| or x^2, x = (weight - previous) mask.
__global__ void drift_forward_kernel(Segments s, const float* previous, const float* logits, const float* thresholds,
                                     int norm, double* partial) {
  const Tile t = tile_of_block(s);
  const int64_t base = s.offset[t.segment];
  const float limit = logits ? thresholds[t.segment] : 0.0f;
  double sum = 0;
  for (int64_t i = t.begin + threadIdx.x; i < t.end; i += kThreads) {
    float x = s.weight[t.segment][i] - previous[base + i];
    if (logits) x *= mask_value(logits[base + i], limit);
    sum += norm == 1 ? fabsf(x) : x * x;
  }
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

__device__ __forceinline__ float sign(float x) { return x > 0 ? 1.0f : x < 0 ? -1.0f : x; }

__global__ void drift_backward_kernel(Segments s, const float* previous, const float* logits, const float* thresholds,
                                      int norm, const float* grad, const float* norms, float* grad_logits) {
  const Tile t = tile_of_block(s);
  const int64_t base = s.offset[t.segment];
  const float limit = logits ? thresholds[t.segment] : 0.0f;
  const float value = norms[t.segment];
  const float scale = norm == 1 ? grad[t.segment] : value == 0 ? 0.0f : grad[t.segment] / value;
  for (int64_t i = t.begin + threadIdx.x; i < t.end; i += kThreads) {
    const float change = s.weight[t.segment][i] - previous[base + i];
    float mask = 1.0f, slope = 0.0f;
    if (logits) mask_and_slope(logits[base + i], limit, mask, slope);
    const float x = change * mask;
    const float outer = scale * (norm == 1 ? sign(x) : x);
    s.out[t.segment][i] = outer * mask;
    if (logits) grad_logits[base + i] = outer * change * slope;
  }
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

unsigned flat_blocks(int64_t entries) { return static_cast<unsigned>(std::min<int64_t>(ceil_div(entries, kThreads), 65536)); }

}  // namespace

Tensor semi_binary_mask_cuda(const Tensor& logits, const Tensor& threshold) {
  const char* op = "semi_binary_mask";
  const int64_t rows = check_mask(op, logits, threshold, Place::kCuda), total = logits.numel();
  Tensor mask = empty_float(logits, shape_of(logits));
  if (total == 0) return mask;
  const Launcher gpu(op, logits);
  gpu.launch(mask_forward_kernel, flat_blocks(total), kThreads, 0, data(logits), data(threshold), mutable_data(mask),
             total / rows, total);
  return mask;
}

Tensor semi_binary_mask_backward_cuda(const Tensor& grad, const Tensor& logits, const Tensor& threshold) {
  const char* op = "semi_binary_mask_backward";
  const int64_t rows = check_mask(op, logits, threshold, Place::kCuda), total = logits.numel();
  check_float(op, "grad", grad, Place::kCuda, shape_of(logits));
  Tensor result = empty_float(logits, shape_of(logits));
  if (total == 0) return result;
  const Launcher gpu(op, logits);
  gpu.launch(mask_backward_kernel, flat_blocks(total), kThreads, 0, data(logits), data(threshold), data(grad),
             mutable_data(result), total / rows, total);
  return result;
}

Tensors masked_weights_cuda(const Tensors& weights, const Tensor& logits, const Tensor& thresholds,
                            const Offsets& offsets) {
  const char* op = "masked_weights";
  check_masked(op, weights, logits, thresholds, offsets, Place::kCuda);
  Tensors masked = empty_like_all(weights);
  const Launcher gpu(op, logits);
  for_segments(weights, nullptr, &masked, offsets, [&](const Segments& s, int64_t first) {
    const auto blocks = static_cast<unsigned>(s.blocks.first_block[s.blocks.count]);
    if (blocks) gpu.launch(weights_forward_kernel, blocks, kThreads, 0, s, data(logits), data(thresholds) + first);
  });
  return masked;
}

std::tuple<Tensors, Tensor> masked_weights_backward_cuda(const Tensors& grads, const Tensors& weights,
                                                         const Tensor& logits, const Tensor& thresholds,
                                                         const Offsets& offsets) {
  const char* op = "masked_weights_backward";
  check_masked(op, weights, logits, thresholds, offsets, Place::kCuda);
  if (grads.size() != weights.size()) fail(op, "got ", grads.size(), " grads for ", weights.size(), " weights");
  check_weights(op, "grads", grads, offsets, Place::kCuda);
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

Tensor weight_drift_cuda(const Tensors& weights, const Tensor& previous, const Offsets& offsets, int64_t norm,
                         const std::optional<Tensor>& logits, const std::optional<Tensor>& thresholds) {
  const char* op = "weight_drift";
  check_drift(op, weights, previous, offsets, norm, logits, thresholds, Place::kCuda);
  Tensor norms = empty_float(previous, {static_cast<int64_t>(weights.size())});
  const Launcher gpu(op, previous);
  const float* a = logits ? data(*logits) : nullptr;
  for_segments(weights, nullptr, nullptr, offsets, [&](const Segments& s, int64_t first) {
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

std::tuple<Tensors, Tensor> weight_drift_backward_cuda(const Tensor& grad, const Tensor& norms, const Tensors& weights,
                                                       const Tensor& previous, const Offsets& offsets, int64_t norm,
                                                       const std::optional<Tensor>& logits,
                                                       const std::optional<Tensor>& thresholds) {
  const char* op = "weight_drift_backward";
  check_drift(op, weights, previous, offsets, norm, logits, thresholds, Place::kCuda);
  const Shape shape = {static_cast<int64_t>(weights.size())};
  check_float(op, "grad", grad, Place::kCuda, shape);
  check_float(op, "norms", norms, Place::kCuda, shape);
  Tensors grad_weights = empty_like_all(weights);
  Tensor grad_logits = empty_float(previous, logits ? shape_of(*logits) : Shape{0});
  const Launcher gpu(op, previous);
  const float* a = logits ? data(*logits) : nullptr;
  float* da = mutable_data(grad_logits);
  if (a) clear_outside(gpu, da, logits->numel(), offsets, weights.size());
  for_segments(weights, nullptr, &grad_weights, offsets, [&](const Segments& s, int64_t first) {
    const auto blocks = static_cast<unsigned>(s.blocks.first_block[s.blocks.count]);
    if (!blocks) return;
    gpu.launch(drift_backward_kernel, blocks, kThreads, 0, s, data(previous), a,
               a ? data(*thresholds) + first : nullptr, static_cast<int>(norm), data(grad) + first, data(norms) + first,
               da);
  });
  return {grad_weights, grad_logits};
}

}  // namespace hypermask
