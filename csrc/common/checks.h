// What checks of arguments are made of; those of an op that has a CPU and a CUDA side stand in a file of its family's
// name. They run before any memory is touched and throw a one-line error.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace hypermask {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Shape = std::vector<int64_t>;
using Tensors = std::vector<Tensor>;
using Offsets = std::vector<int64_t>;

template <class... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream message;
  message << op << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline Shape shape_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return Shape(sizes.begin(), sizes.end());
}

inline std::string to_string(const Shape& shape) {
  std::ostringstream text;
  text << "(";
  for (size_t i = 0; i < shape.size(); ++i) text << (i ? ", " : "") << shape[i];
  text << ")";
  return text.str();
}

// Where all of an op's tensors must be: on the CPU, or on one GPU.
struct Place {
  bool gpu;
  int32_t index;  // of the GPU

  static const Place kCpu;
  static Place gpu_of(const Tensor& t) { return {true, t.get_device_index()}; }
};
inline const Place Place::kCpu = {false, 0};

inline void check_tensor(const char* op, const char* name, const Tensor& t, Place place, ScalarType dtype) {
  if (place.gpu ? !t.is_cuda() : !t.is_cpu()) {
    fail(op, name, " must be on the ", place.gpu ? "GPU" : "CPU", " like the other arguments");
  }
  if (place.gpu && t.get_device_index() != place.index) {
    fail(op, name, " must be on GPU ", place.index, " like the other arguments, not on GPU ", t.get_device_index());
  }
  if (t.scalar_type() != dtype) {
    fail(op, name, " must be ",
         dtype == ScalarType::Float ? "float32" : (dtype == ScalarType::BFloat16 ? "bfloat16" : "int64"));
  }
  if (!t.is_contiguous()) fail(op, name, " must be contiguous");
}

inline void check_float(const char* op, const char* name, const Tensor& t, Place place) {
  check_tensor(op, name, t, place, ScalarType::Float);
}

inline void check_tensor(const char* op, const char* name, const Tensor& t, Place place, ScalarType dtype,
                         const Shape& shape) {
  check_tensor(op, name, t, place, dtype);
  if (shape_of(t) != shape) fail(op, name, " must have shape ", to_string(shape), ", not ", to_string(shape_of(t)));
}

inline void check_float(const char* op, const char* name, const Tensor& t, Place place, const Shape& shape) {
  check_tensor(op, name, t, place, ScalarType::Float, shape);
}

inline void check_scalar(const char* op, const char* name, const Tensor& t, Place place) {
  check_float(op, name, t, place);
  if (t.numel() != 1) fail(op, name, " must have one entry, not ", t.numel());
}

inline void check_offsets(const char* op, const Offsets& offsets, int64_t size) {
  if (offsets.empty()) fail(op, "offsets must have at least one border");
  if (offsets.front() < 0) fail(op, "offsets must not be negative");
  for (size_t s = 1; s < offsets.size(); ++s) {
    if (offsets[s] < offsets[s - 1])
      fail(op, "offsets must ascend, but ", offsets[s - 1], " comes before ", offsets[s]);
  }
  if (offsets.back() > size) fail(op, "offsets end at ", offsets.back(), ", beyond the ", size, " entries");
}

inline int64_t segments(const Offsets& offsets) { return static_cast<int64_t>(offsets.size()) - 1; }

inline const float* data(const Tensor& t) { return t.const_data_ptr<float>(); }
inline float* mutable_data(const Tensor& t) { return t.mutable_data_ptr<float>(); }

// The C function that torch::stable::new_empty called before it took an operator's name, whose look-up takes longer
// than all else: with small tensors to make, that was a third of a call.
inline Tensor empty_float(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef shape) {
  int32_t dtype = aoti_torch_dtype_float32();
  AtenTensorHandle made = nullptr;  // on the device and in the layout of `like`
  TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(like.get(), shape.data(), static_cast<int64_t>(shape.size()), &dtype,
                                                   nullptr, nullptr, 0, nullptr, &made));
  return Tensor(made);
}

}  // namespace hypermask
