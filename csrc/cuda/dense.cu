// The pass over the hypernetwork's dense output layer on the GPU; formulas in csrc/cpu/kernels_dense.h.
//
// A block takes tiles of 32 rows in turn. The tile of W goes to shared memory, where the factors g, the hidden vectors'
// gradient and the old weights for Adam are made from it; W, m and v are read and written once. Sums over rows are kept
// per block and added by a second kernel in a fixed order: the same bits every time on the same device.
#include "../common/adam.h"
#include "cuda_ops.h"
#include "device.h"
#include "launcher.h"

namespace hypermask {
namespace {

enum Mode { kValue, kGradient, kAdam };

struct Dense {
  int64_t rows;
  int width, drift_tasks, tasks;  // tasks: drift_tasks, plus one for the current task
  float* weight;                  // written in Adam mode only
  float* bias;
  const float* hidden;        // [tasks, width]
  const float* targets;       // [drift_tasks, rows]
  const float* grad_logits;   // [rows] or null
  const float* outer;         // one entry: dLoss/dR; null in value mode
  float *grad_weight, *grad_bias;
  float *weight_m, *weight_v, *bias_m, *bias_v;
  const float *step, *lr;     // read on the device, so that a captured step sees them change
  double beta1, beta2, eps;
  float* partial;             // [blocks, tasks, width]
  double* partial_drift;      // [blocks]
};

// factors[j][r] = dLoss/da_jr; a lane per row, a warp per task. Returns this thread's squared residuals.
__device__ __forceinline__ double tile_factors(const Dense& d, int64_t row, int rows, const float* tile,
                                               const float* hidden, float coefficient, float* factors) {
  const int lane = threadIdx.x % 32, stride = static_cast<int>(dense_stride(d.width));
  double squares = 0;
  for (int j = threadIdx.x / 32; j < d.tasks; j += kThreads / 32) {
    float g = 0;
    if (lane < rows && j < d.drift_tasks) {
      const float* h = hidden + j * d.width;
      const float* w = tile + lane * stride;
      float sum = 0;
#pragma unroll 4
      for (int k = 0; k < d.width; ++k) sum += w[k] * h[k];
      const float residual = (sum + d.bias[row + lane]) - d.targets[j * d.rows + row + lane];
      squares += static_cast<double>(residual) * residual;
      g = coefficient * residual;
    } else if (lane < rows) {
      g = d.grad_logits[row + lane];
    }
    factors[j * (kDenseRows + 1) + lane] = g;
  }
  return squares;
}

// grad_hidden[j][k] += sum_r g[j][r] W[r][k]; rows beyond the last are 0 in both.
__device__ __forceinline__ void tile_hidden(const Dense& d, const float* tile, const float* factors,
                                            float* grad_hidden) {
  const int stride = static_cast<int>(dense_stride(d.width));
  for (int i = threadIdx.x; i < d.tasks * d.width; i += kThreads) {
    const float* g = factors + i / d.width * (kDenseRows + 1);
    const float* w = tile + i % d.width;
    float sum = 0;
#pragma unroll 8
    for (int r = 0; r < kDenseRows; ++r) sum += g[r] * w[r * stride];
    grad_hidden[i] += sum;
  }
}

// dW[r][k] = sum_j g[j][r] h[j][k], written or given to Adam at once.
template <Mode kMode>
__device__ __forceinline__ void tile_weight(const Dense& d, int64_t row, int rows, const float* tile,
                                            const float* hidden, const float* factors, const AdamStep& step) {
  const int stride = static_cast<int>(dense_stride(d.width));
  const int64_t base = row * d.width;
  for (int i = threadIdx.x; i < rows * d.width; i += kThreads) {
    const int r = i / d.width, k = i - r * d.width;
    float m = 0, v = 0;
    if (kMode == kAdam) {
      m = d.weight_m[base + i];
      v = d.weight_v[base + i];
    }
    float grad = 0;
    for (int j = 0; j < d.tasks; ++j) grad += factors[j * (kDenseRows + 1) + r] * hidden[j * d.width + k];
    if (kMode == kAdam) {
      float w = tile[r * stride + k];
      adam_update(grad, w, m, v, step);
      d.weight[base + i] = w;
      d.weight_m[base + i] = m;
      d.weight_v[base + i] = v;
    } else {
      d.grad_weight[base + i] = grad;
    }
  }
  if (static_cast<int>(threadIdx.x) < rows) {
    const int64_t at = row + threadIdx.x;
    float grad = 0;
    for (int j = 0; j < d.tasks; ++j) grad += factors[j * (kDenseRows + 1) + threadIdx.x];
    if (kMode == kAdam) {
      float w = d.bias[at], m = d.bias_m[at], v = d.bias_v[at];
      adam_update(grad, w, m, v, step);
      d.bias[at] = w;
      d.bias_m[at] = m;
      d.bias_v[at] = v;
    } else {
      d.grad_bias[at] = grad;
    }
  }
}

template <Mode kMode>
__global__ void __launch_bounds__(kThreads) dense_kernel(Dense d) {
  __shared__ AdamStep step;
  const int stride = static_cast<int>(dense_stride(d.width)), outputs = d.tasks * d.width;
  float* tile = dynamic_shared<float>();
  float* hidden = tile + kDenseRows * stride;
  float* grad_hidden = hidden + outputs;
  float* factors = grad_hidden + outputs;
  for (int i = threadIdx.x; i < outputs; i += kThreads) {
    hidden[i] = d.hidden[i];
    grad_hidden[i] = 0;
  }
  if (kMode == kAdam && threadIdx.x == 0) step = adam_step(*d.step, *d.lr, d.beta1, d.beta2, d.eps);
  const float coefficient = kMode == kValue ? 0.0f : 2.0f * *d.outer;
  double squares = 0;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kDenseRows; row < d.rows;
       row += static_cast<int64_t>(gridDim.x) * kDenseRows) {
    const int rows = static_cast<int>(min(static_cast<int64_t>(kDenseRows), d.rows - row));
    const float* weight = d.weight + row * d.width;
    __syncthreads();  // the tile before is done with
    for (int i = threadIdx.x; i < kDenseRows * d.width; i += kThreads) {
      const int r = i / d.width;
      tile[r * stride + i - r * d.width] = r < rows ? weight[i] : 0.0f;
    }
    __syncthreads();
    squares += tile_factors(d, row, rows, tile, hidden, coefficient, factors);
    if constexpr (kMode != kValue) {
      __syncthreads();
      tile_hidden(d, tile, factors, grad_hidden);
      tile_weight<kMode>(d, row, rows, tile, hidden, factors, step);
    }
  }
  squares = block_sum(squares);
  if (threadIdx.x == 0) d.partial_drift[blockIdx.x] = squares;
  if constexpr (kMode != kValue) {
    for (int i = threadIdx.x; i < outputs; i += kThreads) {  // each thread reads what it wrote itself
      d.partial[static_cast<int64_t>(blockIdx.x) * outputs + i] = grad_hidden[i];
    }
  }
}

// Adds the blocks' sums: 32 outputs a block, 8 groups of partial sums side by side, then the groups in order.
__global__ void finish_kernel(const float* partial, const double* partial_drift, int blocks, int outputs,
                              float* grad_hidden, float* drift) {
  __shared__ double sums[kThreads];
  const int lane = threadIdx.x % 32, group = threadIdx.x / 32, output = blockIdx.x * 32 + lane;
  double sum = 0;
  if (output < outputs) {
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

template <Mode kMode>
void run(const char* op, Dense d, const Tensor& like, float* grad_hidden, float* drift) {
  const Launcher gpu(op, like);
  const int64_t bytes = dense_shared_floats(d.tasks, d.width) * static_cast<int64_t>(sizeof(float));
  const int limit = gpu.attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  if (bytes > limit) {
    fail(op, d.tasks, " tasks of width ", d.width, " need ", bytes, " bytes of shared memory, this GPU has ", limit);
  }
  gpu.check(cudaFuncSetAttribute(dense_kernel<kMode>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(bytes)));
  int per_processor = 0;
  gpu.check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, dense_kernel<kMode>, kThreads, bytes));
  const int processors = gpu.attribute(cudaDevAttrMultiProcessorCount);
  const int64_t tiles = ceil_div(d.rows, kDenseRows);
  const auto blocks = static_cast<int>(std::max<int64_t>(std::min<int64_t>(tiles, processors * per_processor), 1));
  const int outputs = kMode == kValue ? 0 : d.tasks * d.width;
  Tensor partial = empty_of(like, {static_cast<int64_t>(blocks) * outputs}, ScalarType::Float);
  Tensor partial_drift = empty_of(like, {blocks}, ScalarType::Double);
  d.partial = mutable_data(partial);
  d.partial_drift = partial_drift.mutable_data_ptr<double>();
  gpu.launch(dense_kernel<kMode>, blocks, kThreads, bytes, d);
  const auto finish_blocks = static_cast<unsigned>(std::max<int64_t>(ceil_div(outputs, 32), 1));
  gpu.launch(finish_kernel, finish_blocks, kThreads, 0, d.partial, d.partial_drift, blocks, outputs, grad_hidden, drift);
}

Dense dense_layer(const char* op, const Tensor& hidden, const Tensor& weight, const Tensor& bias,
                  const Tensor& targets) {
  if (weight.size(1) > 4096 || hidden.size(0) > 4096) fail(op, "hidden has more than 4096 rows or columns");
  Dense d{};
  d.rows = weight.size(0);
  d.width = static_cast<int>(weight.size(1));
  d.tasks = d.drift_tasks = static_cast<int>(targets.size(0));
  d.weight = const_cast<float*>(data(weight));
  d.bias = const_cast<float*>(data(bias));
  d.hidden = data(hidden);
  d.targets = data(targets);
  return d;
}

}  // namespace

Tensor output_drift_cuda(const Tensor& hidden, const Tensor& weight, const Tensor& bias, const Tensor& targets) {
  const char* op = "output_drift";
  check_output_drift(op, hidden, weight, bias, targets, Place::kCuda);
  Tensor drift = empty_float(weight, {});
  run<kValue>(op, dense_layer(op, hidden, weight, bias, targets), weight, nullptr, mutable_data(drift));
  return drift;
}

std::tuple<Tensor, Tensor, Tensor> output_drift_backward_cuda(const Tensor& grad, const Tensor& hidden,
                                                              const Tensor& weight, const Tensor& bias,
                                                              const Tensor& targets) {
  const char* op = "output_drift_backward";
  check_output_drift(op, hidden, weight, bias, targets, Place::kCuda);
  check_scalar(op, "grad", grad, Place::kCuda);
  Tensor grad_hidden = empty_float(hidden, shape_of(hidden));
  Tensor grad_weight = empty_float(weight, shape_of(weight));
  Tensor grad_bias = empty_float(bias, shape_of(bias));
  Dense d = dense_layer(op, hidden, weight, bias, targets);
  d.outer = data(grad);
  d.grad_weight = mutable_data(grad_weight);
  d.grad_bias = mutable_data(grad_bias);
  run<kGradient>(op, d, weight, mutable_data(grad_hidden), nullptr);
  return {grad_hidden, grad_weight, grad_bias};
}

std::tuple<Tensor, Tensor> hypernet_adam_cuda(const Tensor& hidden, const Tensor& grad_logits, const Tensor& targets,
                                              const Tensor& drift_weight, const Tensor& weight, const Tensor& bias,
                                              const Tensor& weight_m, const Tensor& weight_v, const Tensor& bias_m,
                                              const Tensor& bias_v, const Tensor& step, const Tensor& lr, double beta1,
                                              double beta2, double eps) {
  const char* op = "hypernet_adam";
  check_adam(op, hidden, grad_logits, targets, drift_weight, weight, bias, weight_m, weight_v, bias_m, bias_v, step,
             lr, Place::kCuda);
  Tensor grad_hidden = empty_float(hidden, shape_of(hidden));
  Tensor drift = empty_float(hidden, {});
  Dense d = dense_layer(op, hidden, weight, bias, targets);
  d.tasks = d.drift_tasks + 1;
  d.grad_logits = data(grad_logits);
  d.outer = data(drift_weight);
  d.weight_m = mutable_data(weight_m);
  d.weight_v = mutable_data(weight_v);
  d.bias_m = mutable_data(bias_m);
  d.bias_v = mutable_data(bias_v);
  d.step = data(step);
  d.lr = data(lr);
  d.beta1 = beta1;
  d.beta2 = beta2;
  d.eps = eps;
  run<kAdam>(op, d, weight, mutable_data(grad_hidden), mutable_data(drift));
  return {grad_hidden, drift};
}

}  // namespace hypermask
