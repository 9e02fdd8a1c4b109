// The ops over the hypernetwork's dense output layer on the GPU.
#include <cstdlib>
#include <tuple>

#include "../common/dense.h"
#include "../common/registration.h"
#include "dense_kernels.h"
#include "launcher.h"

namespace hypermask {
namespace {

// Tasks from which on tensor cores make the gradients. Another number serves to measure both ways.
int64_t tensor_tasks(const char* op) {
  const char* given = std::getenv("HYPERMASK_TENSOR_TASKS");
  if (!given) return kTensorTasks;
  char* end = nullptr;
  const int64_t tasks = std::strtoll(given, &end, 10);
  if (*end || tasks < 1) fail(op, "HYPERMASK_TENSOR_TASKS must be a number of tasks, 1 or more, not ", given);
  return tasks;
}

// Whether the tiles, hidden vectors and factors of d.layout fit a block's shared memory.
template <Mode kMode>
bool fits(const Launcher& gpu, const Dense& d, int64_t& bytes) {
  const int tiles = dense_tiles(d.layout, makes_weights(kMode), steps_weights(kMode));
  bytes = dense_shared_floats(d.layout, tiles) * static_cast<int64_t>(sizeof(float));
  return bytes + kStaticShared <= gpu.attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
}

template <Mode kMode>
void launch(const Launcher& gpu, void (*kernel)(Dense), Dense d, int64_t bytes, const Tensor& like, float* grad_hidden,
            float* drift) {
  gpu.allow_shared(kernel, bytes);
  int per_processor = 0;
  gpu.check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel, kThreads, bytes));
  const int processors = gpu.attribute(cudaDevAttrMultiProcessorCount);
  const int64_t tiles = ceil_div(d.rows, d.layout.rows);
  const auto blocks = static_cast<int>(std::max<int64_t>(std::min<int64_t>(tiles, processors * per_processor), 1));
  const int outputs = sums_hidden(kMode) ? d.tasks * d.width : 0;
  Tensor partial = empty_of(like, {static_cast<int64_t>(blocks) * outputs}, ScalarType::Float);
  Tensor partial_drift = empty_of(like, {blocks}, ScalarType::Double);
  d.partial = mutable_data(partial);
  d.partial_drift = partial_drift.mutable_data_ptr<double>();
  // Without rows there is no tile with which a sum could begin.
  if (d.rows == 0) gpu.clear(d.partial, outputs * static_cast<int64_t>(sizeof(float)));
  gpu.launch(kernel, blocks, kThreads, bytes, d);
  if (!grad_hidden && !drift) return;
  const auto finish_blocks = static_cast<unsigned>(std::max<int64_t>(ceil_div(outputs, 32), 1));
  gpu.launch(finish_kernel, finish_blocks, kThreads, 0, d.partial, d.partial_drift, blocks, outputs, grad_hidden,
             drift);
}

template <Mode kMode, class Moment = float>
void run(const char* op, Dense d, const Tensor& like, float* grad_hidden, float* drift) {
  const Launcher gpu(op, like);
  const bool aligned = on_16_bytes(d.weight, d.weight_m, d.weight_v, d.grad_weight, d.rounded_m, d.rounded_v);
  int64_t bytes = 0;
  if constexpr (kMode != kValue) {
    if (on_tensor_cores(d.tasks, d.width, aligned, tensor_tasks(op))) {
      d.layout = tensor_layout(d.tasks, d.width);
      if (fits<kMode>(gpu, d, bytes)) {
        return launch<kMode>(gpu, dense_tensor_kernel<kMode, Moment>, d, bytes, like, grad_hidden, drift);
      }
    }
  }
  d.layout = dense_layout(d.tasks, d.width, aligned);
  if (!fits<kMode>(gpu, d, bytes)) {
    fail(op, d.tasks, " tasks of width ", d.width, " need ", bytes, " bytes of shared memory, more than this GPU has");
  }
  const auto kernel = d.layout.pack == 4
                          ? d.layout.chunk == 4 ? dense_kernel<4, 4, kMode, Moment> : dense_kernel<4, 8, kMode, Moment>
                      : d.layout.chunk == 4 ? dense_kernel<1, 4, kMode, Moment>
                                            : dense_kernel<1, 8, kMode, Moment>;
  launch<kMode>(gpu, kernel, d, bytes, like, grad_hidden, drift);
}

// The modes that step the layer, whose moments are in float32 or in bfloat16.
template <Mode kMode>
void run_step(const char* op, Dense d, const Tensor& weight_m, const Tensor& weight_v, int64_t first_row,
              const Tensor& like, float* grad_hidden, float* drift) {
  if (in_bfloat16(weight_m)) {
    d.rounded_m = mutable_bfloat16(weight_m);
    d.rounded_v = mutable_bfloat16(weight_v);
    d.first_row = first_row;
    run<kMode, Bfloat16>(op, d, like, grad_hidden, drift);
  } else {
    d.weight_m = mutable_data(weight_m);
    d.weight_v = mutable_data(weight_v);
    run<kMode>(op, d, like, grad_hidden, drift);
  }
}

Dense dense_layer(const char* op, const Tensor& hidden, const Tensor& weight, const Tensor& bias, int64_t drift_tasks) {
  if (weight.size(1) > 4096 || drift_tasks >= 4096) fail(op, "hidden has more than 4096 rows or columns");
  Dense d{};
  d.rows = weight.size(0);
  d.width = static_cast<int>(weight.size(1));
  d.tasks = d.drift_tasks = d.target_tasks = static_cast<int>(drift_tasks);
  d.weight = const_cast<float*>(data(weight));
  d.bias = const_cast<float*>(data(bias));
  d.hidden = data(hidden);
  return d;
}

// The logits of one task, in the arithmetic of its drift: against them as targets that is exactly 0.
Tensor hypernet_logits(const Tensor& hidden, const Tensor& weight, const Tensor& bias) {
  const char* op = "hypernet_logits";
  check_dense(op, hidden, weight, bias, Place::gpu_of(weight));
  check_float(op, "hidden", hidden, Place::gpu_of(weight), {weight.size(1)});
  Tensor logits = empty_float(weight, {weight.size(0)});
  Dense d = dense_layer(op, hidden, weight, bias, 1);
  d.target_tasks = 0;
  d.logits = mutable_data(logits);
  run<kValue>(op, d, weight, nullptr, nullptr);
  return logits;
}

Tensor output_drift(const Tensor& hidden, const Tensor& weight, const Tensor& bias, const Tensor& targets) {
  const char* op = "output_drift";
  check_output_drift(op, hidden, weight, bias, targets, Place::gpu_of(weight));
  Tensor drift = empty_float(weight, {});
  Dense d = dense_layer(op, hidden, weight, bias, targets.size(0));
  d.targets = data(targets);
  run<kValue>(op, d, weight, nullptr, mutable_data(drift));
  return drift;
}

std::tuple<Tensor, Tensor, Tensor> output_drift_backward(const Tensor& grad, const Tensor& hidden, const Tensor& weight,
                                                         const Tensor& bias, const Tensor& targets) {
  const char* op = "output_drift_backward";
  check_output_drift(op, hidden, weight, bias, targets, Place::gpu_of(weight));
  check_scalar(op, "grad", grad, Place::gpu_of(weight));
  Tensor grad_hidden = empty_float(hidden, shape_of(hidden));
  Tensor grad_weight = empty_float(weight, shape_of(weight));
  Tensor grad_bias = empty_float(bias, shape_of(bias));
  Dense d = dense_layer(op, hidden, weight, bias, targets.size(0));
  d.targets = data(targets);
  d.outer = data(grad);
  d.grad_weight = mutable_data(grad_weight);
  d.grad_bias = mutable_data(grad_bias);
  run<kGradient>(op, d, weight, mutable_data(grad_hidden), nullptr);
  return {grad_hidden, grad_weight, grad_bias};
}

std::tuple<Tensor, Tensor> hypernet_adam(const Tensor& hidden, const Tensor& grad_logits, const Tensor& targets,
                                         const Tensor& drift_weight, const Tensor& weight, const Tensor& bias,
                                         const Tensor& weight_m, const Tensor& weight_v, const Tensor& bias_m,
                                         const Tensor& bias_v, const Tensor& step, const Tensor& lr, double beta1,
                                         double beta2, double eps, double weight_decay, bool decoupled, bool maximize,
                                         int64_t first_row) {
  const char* op = "hypernet_adam";
  check_adam(op, hidden, grad_logits, targets, drift_weight, weight, bias, weight_m, weight_v, bias_m, bias_v, step, lr,
             Place::gpu_of(weight));
  Tensor grad_hidden = empty_float(hidden, shape_of(hidden));
  Tensor drift = empty_float(hidden, {});
  Dense d = dense_layer(op, hidden, weight, bias, targets.size(0));
  d.targets = data(targets);
  d.tasks = d.drift_tasks + 1;
  d.grad_logits = data(grad_logits);
  d.outer = data(drift_weight);
  d.bias_m = mutable_data(bias_m);
  d.bias_v = mutable_data(bias_v);
  d.step = data(step);
  d.lr = data(lr);
  d.beta1 = beta1;
  d.beta2 = beta2;
  d.eps = eps;
  d.weight_decay = weight_decay;
  d.decoupled = decoupled;
  d.maximize = maximize;
  run_step<kAdam>(op, d, weight_m, weight_v, first_row, weight, mutable_data(grad_hidden), mutable_data(drift));
  return {grad_hidden, drift};
}

std::tuple<Tensor, Tensor> output_residuals(const Tensor& hidden, const Tensor& weight, const Tensor& bias,
                                            const Tensor& targets) {
  const char* op = "output_residuals";
  check_residuals(op, hidden, weight, bias, targets, Place::gpu_of(weight));
  Tensor residuals = empty_float(weight, {hidden.size(0), weight.size(0)});
  Tensor drift = empty_float(weight, {});
  Dense d = dense_layer(op, hidden, weight, bias, hidden.size(0));
  d.targets = data(targets);
  d.target_tasks = d.drift_tasks - 1;
  d.logits = mutable_data(residuals);
  run<kValue>(op, d, weight, nullptr, mutable_data(drift));
  return {residuals, drift};
}

// What the two passes over kept factors have in common. The hidden vectors are the step's only.
Dense factored_layer(const char* op, const Tensor& factors, const Tensor& scales, const Tensor& weight) {
  if (weight.size(1) > 4096 || factors.size(0) > 4096)
    fail(op, "factors or weight have more than 4096 rows or columns");
  Dense d{};
  d.rows = weight.size(0);
  d.width = static_cast<int>(weight.size(1));
  d.tasks = static_cast<int>(factors.size(0));
  d.weight = const_cast<float*>(data(weight));
  d.factors = data(factors);
  d.scales = data(scales);
  return d;
}

std::tuple<Tensor, Tensor> hidden_gradient(const Tensor& factors, const Tensor& scales, const Tensor& weight) {
  const char* op = "hidden_gradient";
  check_factors(op, factors, scales, weight, Place::gpu_of(weight));
  Tensor grad_hidden = empty_float(weight, {factors.size(0), weight.size(1)});
  Tensor grad_bias = empty_float(weight, {weight.size(0)});
  Dense d = factored_layer(op, factors, scales, weight);
  d.grad_bias = mutable_data(grad_bias);
  run<kHidden>(op, d, weight, mutable_data(grad_hidden), nullptr);
  return {grad_hidden, grad_bias};
}

void factored_adam(const Tensor& factors, const Tensor& scales, const Tensor& hidden, const Tensor& weight,
                   const Tensor& weight_m, const Tensor& weight_v, const Tensor& step, const Tensor& lr, double beta1,
                   double beta2, double eps, double weight_decay, bool decoupled, bool maximize, int64_t first_row) {
  const char* op = "factored_adam";
  check_factored_adam(op, factors, scales, hidden, weight, weight_m, weight_v, step, lr, Place::gpu_of(weight));
  Dense d = factored_layer(op, factors, scales, weight);
  d.hidden = data(hidden);
  d.step = data(step);
  d.lr = data(lr);
  d.beta1 = beta1;
  d.beta2 = beta2;
  d.eps = eps;
  d.weight_decay = weight_decay;
  d.decoupled = decoupled;
  d.maximize = maximize;
  run_step<kStep>(op, d, weight_m, weight_v, first_row, weight, nullptr, nullptr);
}

}  // namespace

HM_CUDA(m) {
  m.impl("hypernet_logits", TORCH_BOX(&hypernet_logits));
  m.impl("output_drift", TORCH_BOX(&output_drift));
  m.impl("output_drift_backward", TORCH_BOX(&output_drift_backward));
  m.impl("hypernet_adam", TORCH_BOX(&hypernet_adam));
  m.impl("output_residuals", TORCH_BOX(&output_residuals));
  m.impl("hidden_gradient", TORCH_BOX(&hidden_gradient));
  m.impl("factored_adam", TORCH_BOX(&factored_adam));
}

}  // namespace hypermask
