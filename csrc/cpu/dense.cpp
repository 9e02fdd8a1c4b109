// Ops over the hypernetwork's dense output layer: logits, drift of the earlier tasks, backward with Adam in one pass.
#include <memory>
#include <tuple>

#include "../common/dense.h"
#include "../common/registration.h"
#include "isa.h"
#include "large.h"
#include "parts.h"

namespace hypermask {
namespace {

constexpr int64_t kMaxChunks = 128;  // fixed, so that sums do not depend on the number of threads
constexpr int64_t kAlign = 16;       // floats in a cache line

// Floats at the start of a cache line.
class Buffer {
 public:
  explicit Buffer(int64_t size) : store_(new float[size + kAlign]) {
    const auto address = reinterpret_cast<uintptr_t>(store_.get());
    start_ = store_.get() + (64 - address % 64) % 64 / sizeof(float);
  }
  float* get() const { return start_; }

 private:
  std::unique_ptr<float[]> store_;
  float* start_;
};

// Hidden vectors with rows padded by zeros to whole cache lines, so that kernels read whole vectors.
Buffer padded_rows(const float* rows, int64_t count, int64_t width, int64_t padded) {
  Buffer result(count * padded);
  for (int64_t j = 0; j < count; ++j) {
    float* out = result.get() + j * padded;
    std::copy(rows + j * width, rows + (j + 1) * width, out);
    std::fill(out + width, out + padded, 0.0f);
  }
  return result;
}

DenseLayer dense_layer(const Tensor& weight, const Tensor& bias, int64_t tasks) {
  DenseLayer d{};
  d.rows = weight.size(0);
  d.width = weight.size(1);
  d.padded = (d.width + kAlign - 1) / kAlign * kAlign;
  d.drift_tasks = d.tasks = tasks;
  d.weight = data(weight);
  d.bias = data(bias);
  return d;
}

int64_t chunk_rows(int64_t rows) {
  const int64_t blocks = (rows + kBlockRows - 1) / kBlockRows;
  return std::max<int64_t>((blocks + kMaxChunks - 1) / kMaxChunks, 1) * kBlockRows;
}

std::vector<Part> chunks(const DenseLayer& d) { return cut({d.rows}, chunk_rows(d.rows)); }

void copy_sums(const Buffer& partial, int64_t chunks, const DenseLayer& d, float* grad_hidden) {
  const int64_t stride = d.tasks * d.padded;
  for (int64_t j = 0; j < d.tasks; ++j) {
    for (int64_t k = 0; k < d.width; ++k) {
      double sum = 0;
      for (int64_t c = 0; c < chunks; ++c) sum += partial.get()[c * stride + j * d.padded + k];
      grad_hidden[j * d.width + k] = static_cast<float>(sum);
    }
  }
}

// Runs dense_pass over all rows; grad_hidden [tasks, width], or null. Returns the sum of squared residuals.
double run_pass(const DenseLayer& d, float* grad_hidden) {
  const std::vector<Part> parts = chunks(d);
  const int64_t stride = d.tasks * d.padded;
  const Buffer partial(grad_hidden ? static_cast<int64_t>(parts.size()) * stride : 0);
  std::vector<double> drift(parts.size());
  const Kernels& k = kernels();
  torch::stable::parallel_for(0, static_cast<int64_t>(parts.size()), 1, [&](int64_t begin, int64_t end) {
    const Buffer scratch(dense_scratch(d));
    for (int64_t i = begin; i < end; ++i) {
      float* sums = grad_hidden ? partial.get() + i * stride : nullptr;
      if (sums) std::fill(sums, sums + stride, 0.0f);
      drift[i] = k.dense_pass(d, parts[i].begin, parts[i].end, scratch.get(), sums);
    }
  });
  if (grad_hidden) copy_sums(partial, static_cast<int64_t>(parts.size()), d, grad_hidden);
  double total = 0;
  for (const double part : drift) total += part;
  return total;
}

// Logits (N,) of one hidden vector (H,), or (T, N) of T of them (T, H): every row to the bit as it is alone.
Tensor hypernet_logits(const Tensor& hidden, const Tensor& weight, const Tensor& bias) {
  const char* op = "hypernet_logits";
  check_dense(op, hidden, weight, bias, Place::kCpu);
  const bool one = hidden.dim() == 1;
  const int64_t tasks = one ? 1 : hidden.size(0), width = weight.size(1), rows = weight.size(0);
  check_float(op, "hidden", hidden, Place::kCpu, one ? Shape{width} : Shape{tasks, width});
  Tensor logits = large_float(weight, one ? Shape{rows} : Shape{tasks, rows});
  DenseLayer d = dense_layer(weight, bias, tasks);
  const Buffer padded = padded_rows(data(hidden), tasks, d.width, d.padded);
  d.hidden = padded.get();
  float* out = mutable_data(logits);
  const std::vector<Part> parts = chunks(d);
  const Kernels& k = kernels();
  torch::stable::parallel_for(0, static_cast<int64_t>(parts.size()), 1, [&](int64_t begin, int64_t end) {
    const Buffer scratch(dense_scratch(d));
    for (int64_t i = begin; i < end; ++i) {
      if (tasks == 1) {
        k.dense_logits(d, parts[i].begin, parts[i].end, out);
      } else {
        k.dense_residuals(d, parts[i].begin, parts[i].end, scratch.get(), out);
      }
    }
  });
  return logits;
}

Tensor output_drift(const Tensor& hidden, const Tensor& weight, const Tensor& bias, const Tensor& targets) {
  check_output_drift("output_drift", hidden, weight, bias, targets, Place::kCpu);
  DenseLayer d = dense_layer(weight, bias, hidden.size(0));
  const Buffer padded = padded_rows(data(hidden), d.tasks, d.width, d.padded);
  d.hidden = padded.get();
  d.targets = data(targets);
  const std::vector<Part> parts = chunks(d);
  std::vector<double> drift(parts.size());
  const Kernels& k = kernels();
  torch::stable::parallel_for(0, static_cast<int64_t>(parts.size()), 1, [&](int64_t begin, int64_t end) {
    const Buffer scratch(dense_scratch(d));
    for (int64_t i = begin; i < end; ++i) {
      drift[i] = k.dense_value(d, parts[i].begin, parts[i].end, scratch.get());
    }
  });
  double total = 0;
  for (const double part : drift) total += part;
  Tensor result = empty_float(weight, {});
  *mutable_data(result) = static_cast<float>(total);
  return result;
}

std::tuple<Tensor, Tensor, Tensor> output_drift_backward(const Tensor& grad, const Tensor& hidden, const Tensor& weight,
                                                         const Tensor& bias, const Tensor& targets) {
  const char* op = "output_drift_backward";
  check_output_drift(op, hidden, weight, bias, targets, Place::kCpu);
  check_scalar(op, "grad", grad, Place::kCpu);
  Tensor grad_hidden = empty_float(hidden, shape_of(hidden));
  Tensor grad_weight = large_float(weight, shape_of(weight));
  Tensor grad_bias = empty_float(bias, shape_of(bias));
  DenseLayer d = dense_layer(weight, bias, hidden.size(0));
  const Buffer padded = padded_rows(data(hidden), d.tasks, d.width, d.padded);
  d.hidden = padded.get();
  d.targets = data(targets);
  d.coefficient = 2 * *data(grad);
  d.grad_weight = mutable_data(grad_weight);
  d.grad_bias = mutable_data(grad_bias);
  run_pass(d, mutable_data(grad_hidden));
  return {grad_hidden, grad_weight, grad_bias};
}

void set_moments(DenseLayer& d, const Tensor& weight_m, const Tensor& weight_v, double step, int64_t first_row) {
  if (in_bfloat16(weight_m)) {
    d.rounded_m = mutable_bfloat16(weight_m);
    d.rounded_v = mutable_bfloat16(weight_v);
    d.draws = draws_of(step, first_row, d.width);
  } else {
    d.weight_m = mutable_data(weight_m);
    d.weight_v = mutable_data(weight_v);
  }
}

std::tuple<Tensor, Tensor> hypernet_adam(const Tensor& hidden, const Tensor& grad_logits, const Tensor& targets,
                                         const Tensor& drift_weight, const Tensor& weight, const Tensor& bias,
                                         const Tensor& weight_m, const Tensor& weight_v, const Tensor& bias_m,
                                         const Tensor& bias_v, const Tensor& step, const Tensor& lr, double beta1,
                                         double beta2, double eps, double weight_decay, bool decoupled, bool maximize,
                                         int64_t first_row) {
  check_adam("hypernet_adam", hidden, grad_logits, targets, drift_weight, weight, bias, weight_m, weight_v, bias_m,
             bias_v, step, lr, Place::kCpu);
  Tensor grad_hidden = empty_float(hidden, shape_of(hidden));
  Tensor drift = empty_float(hidden, {});
  DenseLayer d = dense_layer(weight, bias, targets.size(0));
  d.tasks = d.drift_tasks + 1;
  const Buffer padded = padded_rows(data(hidden), d.tasks, d.width, d.padded);
  d.hidden = padded.get();
  d.targets = data(targets);
  d.grad_logits = data(grad_logits);
  d.coefficient = 2 * *data(drift_weight);
  d.weight_out = mutable_data(weight);
  d.bias_out = mutable_data(bias);
  set_moments(d, weight_m, weight_v, *data(step), first_row);
  d.bias_m = mutable_data(bias_m);
  d.bias_v = mutable_data(bias_v);
  d.adam = adam_step(*data(step), *data(lr), beta1, beta2, eps, weight_decay, decoupled, maximize);
  *mutable_data(drift) = static_cast<float>(run_pass(d, mutable_data(grad_hidden)));
  return {grad_hidden, drift};
}

std::tuple<Tensor, Tensor> output_residuals(const Tensor& hidden, const Tensor& weight, const Tensor& bias,
                                            const Tensor& targets) {
  check_residuals("output_residuals", hidden, weight, bias, targets, Place::kCpu);
  Tensor residuals = large_float(weight, {hidden.size(0), weight.size(0)});
  Tensor drift = empty_float(weight, {});
  DenseLayer d = dense_layer(weight, bias, hidden.size(0));
  const Buffer padded = padded_rows(data(hidden), d.tasks, d.width, d.padded);
  d.hidden = padded.get();
  d.targets = data(targets);
  float* out = mutable_data(residuals);
  const std::vector<Part> parts = chunks(d);
  std::vector<double> squares(parts.size());
  const Kernels& k = kernels();
  torch::stable::parallel_for(0, static_cast<int64_t>(parts.size()), 1, [&](int64_t begin, int64_t end) {
    const Buffer scratch(dense_scratch(d));
    for (int64_t i = begin; i < end; ++i) {
      if (d.tasks == 1) {  // the same numbers, at the rate of the memory
        k.dense_logits(d, parts[i].begin, parts[i].end, out);
      } else {
        squares[i] = k.dense_residuals(d, parts[i].begin, parts[i].end, scratch.get(), out);
      }
    }
  });
  double total = 0;
  for (const double part : squares) total += part;
  *mutable_data(drift) = static_cast<float>(total);
  return {residuals, drift};
}

// What the two passes over kept factors have in common. The hidden vectors are the step's only.
DenseLayer factored_layer(const Tensor& factors, const Tensor& scales, const Tensor& weight) {
  DenseLayer d{};
  d.rows = weight.size(0);
  d.width = weight.size(1);
  d.padded = (d.width + kAlign - 1) / kAlign * kAlign;
  d.drift_tasks = d.tasks = factors.size(0);
  d.weight = data(weight);
  d.factors = data(factors);
  d.scales = data(scales);
  return d;
}

std::tuple<Tensor, Tensor> hidden_gradient(const Tensor& factors, const Tensor& scales, const Tensor& weight) {
  check_factors("hidden_gradient", factors, scales, weight, Place::kCpu);
  Tensor grad_hidden = empty_float(weight, {factors.size(0), weight.size(1)});
  Tensor grad_bias = empty_float(weight, {weight.size(0)});
  DenseLayer d = factored_layer(factors, scales, weight);
  d.grad_bias = mutable_data(grad_bias);
  run_pass(d, mutable_data(grad_hidden));
  return {grad_hidden, grad_bias};
}

void factored_adam(const Tensor& factors, const Tensor& scales, const Tensor& hidden, const Tensor& weight,
                   const Tensor& weight_m, const Tensor& weight_v, const Tensor& step, const Tensor& lr, double beta1,
                   double beta2, double eps, double weight_decay, bool decoupled, bool maximize, int64_t first_row) {
  check_factored_adam("factored_adam", factors, scales, hidden, weight, weight_m, weight_v, step, lr, Place::kCpu);
  DenseLayer d = factored_layer(factors, scales, weight);
  const Buffer padded = padded_rows(data(hidden), d.tasks, d.width, d.padded);
  d.hidden = padded.get();
  d.weight_out = mutable_data(weight);
  set_moments(d, weight_m, weight_v, *data(step), first_row);
  d.adam = adam_step(*data(step), *data(lr), beta1, beta2, eps, weight_decay, decoupled, maximize);
  run_pass(d, nullptr);
}

}  // namespace

HM_SCHEMAS(m) {
  m.def("hypernet_logits(Tensor hidden, Tensor weight, Tensor bias) -> Tensor");
  m.def("output_drift(Tensor hidden, Tensor weight, Tensor bias, Tensor targets) -> Tensor");
  m.def(
      "output_drift_backward(Tensor grad, Tensor hidden, Tensor weight, Tensor bias, Tensor targets)"
      " -> (Tensor, Tensor, Tensor)");
  m.def(
      "hypernet_adam(Tensor hidden, Tensor grad_logits, Tensor targets, Tensor drift_weight, Tensor(a!) weight,"
      " Tensor(b!) bias, Tensor(c!) weight_m, Tensor(d!) weight_v, Tensor(e!) bias_m, Tensor(f!) bias_v, Tensor step,"
      " Tensor lr, float beta1, float beta2, float eps, float weight_decay=0.0, bool decoupled=False,"
      " bool maximize=False, int first_row=0)"
      " -> (Tensor hidden_grad, Tensor drift)");
  m.def(
      "output_residuals(Tensor hidden, Tensor weight, Tensor bias, Tensor targets) -> (Tensor residuals, Tensor "
      "drift)");
  m.def("hidden_gradient(Tensor factors, Tensor scales, Tensor weight) -> (Tensor hidden_grad, Tensor bias_grad)");
  m.def(
      "factored_adam(Tensor factors, Tensor scales, Tensor hidden, Tensor(a!) weight, Tensor(b!) weight_m,"
      " Tensor(c!) weight_v, Tensor step, Tensor lr, float beta1, float beta2, float eps, float weight_decay=0.0,"
      " bool decoupled=False, bool maximize=False, int first_row=0) -> ()");
}

HM_CPU(m) {
  m.impl("hypernet_logits", TORCH_BOX(&hypernet_logits));
  m.impl("output_drift", TORCH_BOX(&output_drift));
  m.impl("output_drift_backward", TORCH_BOX(&output_drift_backward));
  m.impl("hypernet_adam", TORCH_BOX(&hypernet_adam));
  m.impl("output_residuals", TORCH_BOX(&output_residuals));
  m.impl("hidden_gradient", TORCH_BOX(&hidden_gradient));
  m.impl("factored_adam", TORCH_BOX(&factored_adam));
}

}  // namespace hypermask
