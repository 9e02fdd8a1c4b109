// The hypernetwork's trunk, elu(V elu(... elu(V1 e + c1) ...) + c) of each task's embedding e: forward and backward in
// a call each. These are so few products that threads would cost more than they bring. What belongs to one task is
// to the bit what it is with other tasks beside it.
#include <algorithm>
#include <cmath>

#include "../common/checks.h"
#include "../common/registration.h"

namespace hypermask {
namespace {

constexpr int kSums = 16;  // partial sums side by side, which the compiler keeps in vectors

float dot(const float* a, const float* b, int64_t size) {
  float sums[kSums] = {};
  int64_t k = 0;
  for (; k + kSums <= size; k += kSums) {
    for (int i = 0; i < kSums; ++i) sums[i] += a[k + i] * b[k + i];
  }
  for (int i = 0; k + i < size; ++i) sums[i] += a[k + i] * b[k + i];
  for (int half = kSums / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  }
  return sums[0];
}

void add_scaled(float* to, float scale, const float* x, int64_t size) {
  for (int64_t k = 0; k < size; ++k) to[k] += scale * x[k];
}

Tensor zeros(const Tensor& like, const Shape& shape) {
  Tensor result = empty_float(like, shape);
  std::fill(mutable_data(result), mutable_data(result) + result.numel(), 0.0f);
  return result;
}

// How many layers there are, each a weight (H, inputs) and a bias (H,).
size_t check_trunk(const char* op, const Tensors& embeddings, const Tensors& layers) {
  if (embeddings.empty()) fail(op, "there must be an embedding");
  if (layers.empty() || layers.size() % 2) fail(op, "layers must be weights and biases in turn");
  check_float(op, "embeddings", embeddings[0], Place::kCpu);
  int64_t width = embeddings[0].numel();
  for (const Tensor& e : embeddings) check_float(op, "embeddings", e, Place::kCpu, {width});
  for (size_t l = 0; l < layers.size(); l += 2) {
    const int64_t rows = layers[l + 1].numel();
    check_float(op, "a weight", layers[l], Place::kCpu, {rows, width});
    check_float(op, "a bias", layers[l + 1], Place::kCpu, {rows});
    width = rows;
  }
  return layers.size() / 2;
}

// One row per task of what a layer is given: of the first one the embeddings, else what the layer before returned.
std::vector<const float*> inputs_of(size_t layer, const Tensors& embeddings, const Tensors& kept) {
  std::vector<const float*> rows;
  for (size_t j = 0; j < embeddings.size(); ++j) {
    rows.push_back(layer == 0 ? data(embeddings[j])
                              : data(kept[2 * layer - 2]) + static_cast<int64_t>(j) * kept[2 * layer - 2].size(1));
  }
  return rows;
}

// For each layer its outputs and ELU's slopes there, (T, H) each. The last outputs are the trunk's.
Tensors trunk(const Tensors& embeddings, const Tensors& layers) {
  const size_t count = check_trunk("trunk", embeddings, layers);
  const auto tasks = static_cast<int64_t>(embeddings.size());
  Tensors kept;
  for (size_t l = 0; l < count; ++l) {
    const Tensor &weight = layers[2 * l], &bias = layers[2 * l + 1];
    const int64_t rows = weight.size(0), width = weight.size(1);
    Tensor outputs = empty_float(weight, {tasks, rows}), slopes = empty_float(weight, {tasks, rows});
    const std::vector<const float*> inputs = inputs_of(l, embeddings, kept);
    const float *w = data(weight), *b = data(bias);
    float *out = mutable_data(outputs), *slope = mutable_data(slopes);
    for (int64_t j = 0; j < tasks; ++j) {
      for (int64_t p = 0; p < rows; ++p) {
        const float sum = dot(inputs[j], w + p * width, width) + b[p];
        const float power = sum > 0 ? 1.0f : std::exp(sum);
        out[j * rows + p] = sum > 0 ? sum : power - 1.0f;
        slope[j * rows + p] = power;
      }
    }
    kept.push_back(outputs);
    kept.push_back(slopes);
  }
  return kept;
}

// Gradients of every embedding, then of every weight and bias, from that of the trunk's outputs.
Tensors trunk_backward(const Tensor& grad, const Tensors& kept, const Tensors& embeddings, const Tensors& layers) {
  const char* op = "trunk_backward";
  const size_t count = check_trunk(op, embeddings, layers);
  const auto tasks = static_cast<int64_t>(embeddings.size());
  if (kept.size() != 2 * count) fail(op, "kept must be what trunk returned");
  for (size_t l = 0; l < 2 * count; ++l) {
    check_float(op, "kept", kept[l], Place::kCpu, {tasks, layers[l / 2 * 2].size(0)});
  }
  check_float(op, "grad", grad, Place::kCpu, shape_of(kept.back()));
  Tensors of_embeddings, of_layers(2 * count, grad);
  for (const Tensor& e : embeddings) of_embeddings.push_back(zeros(e, shape_of(e)));
  std::vector<float> above(data(grad), data(grad) + grad.numel());
  for (size_t l = count; l-- > 0;) {
    const Tensor& weight = layers[2 * l];
    const int64_t rows = weight.size(0), width = weight.size(1);
    Tensor of_weight = zeros(weight, {rows, width}), of_bias = zeros(weight, {rows});
    const std::vector<const float*> inputs = inputs_of(l, embeddings, kept);
    std::vector<float> below(l == 0 ? 0 : tasks * width);
    const float *w = data(weight), *slope = data(kept[2 * l + 1]);
    float *dw = mutable_data(of_weight), *db = mutable_data(of_bias);
    for (int64_t j = 0; j < tasks; ++j) {
      float* dx = l == 0 ? mutable_data(of_embeddings[j]) : below.data() + j * width;
      for (int64_t p = 0; p < rows; ++p) {
        const float g = above[j * rows + p] * slope[j * rows + p];
        db[p] += g;
        add_scaled(dw + p * width, g, inputs[j], width);
        add_scaled(dx, g, w + p * width, width);
      }
    }
    of_layers[2 * l] = of_weight;
    of_layers[2 * l + 1] = of_bias;
    above = std::move(below);
  }
  of_embeddings.insert(of_embeddings.end(), of_layers.begin(), of_layers.end());
  return of_embeddings;
}

}  // namespace

HM_SCHEMAS(m) {
  m.def("trunk(Tensor[] embeddings, Tensor[] layers) -> Tensor[]");
  m.def("trunk_backward(Tensor grad, Tensor[] kept, Tensor[] embeddings, Tensor[] layers) -> Tensor[]");
}

HM_CPU(m) {
  m.impl("trunk", TORCH_BOX(&trunk));
  m.impl("trunk_backward", TORCH_BOX(&trunk_backward));
}

}  // namespace hypermask
