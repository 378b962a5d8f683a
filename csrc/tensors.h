// What the CPU and the CUDA kernels share about torch's tensors: types, copies in one type and format, results.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace d2_deform {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Storage: what lies in the tensor. Compute: what the kernels calculate with (float for the half types).
template <typename StorageT, typename ComputeT>
struct Types {
  using Storage = StorageT;
  using Compute = ComputeT;
};

// Calls f(Types<Storage, Compute>{}) for a floating tensor type.
template <typename F>
auto dispatch_types(ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::Double:
      return f(Types<double, double>{});
    case ScalarType::Float:
      return f(Types<float, float>{});
    case ScalarType::Half:
      return f(Types<torch::headeronly::Half, float>{});
    case ScalarType::BFloat16:
      return f(Types<torch::headeronly::BFloat16, float>{});
    default:
      STD_TORCH_CHECK(false, "input: expected float64, float32, float16 or bfloat16");
      return f(Types<float, float>{});
  }
}

template <typename T>
constexpr ScalarType scalar_type_of() {
  return sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;
}

inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// A contiguous copy in type T, or the tensor itself if it is one.
template <typename T>
Tensor dense(const Tensor& tensor) {
  return torch::stable::contiguous(torch::stable::to(tensor, scalar_type_of<T>()));
}

template <typename T>
std::optional<Tensor> dense_or_none(const std::optional<Tensor>& tensor) {
  if (!tensor.has_value()) return std::nullopt;
  return dense<T>(*tensor);
}

template <typename T>
const T* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? static_cast<const T*>(tensor->data_ptr()) : nullptr;
}

// The memory format that a result beside `tensor` (N, C, H, W) takes: channels-last where the tensor is dense in that
// format and in no other.
inline MemoryFormat suggested_format(const Tensor& tensor) {
  if (tensor.is_contiguous()) return MemoryFormat::Contiguous;
  int64_t expected = 1;
  for (int64_t d : {1, 3, 2, 0}) {
    if (tensor.size(d) == 1) continue;
    if (tensor.stride(d) != expected) return MemoryFormat::Contiguous;
    expected *= tensor.size(d);
  }
  return MemoryFormat::ChannelsLast;
}

inline Tensor empty_as(
    const Tensor& like, const std::vector<int64_t>& sizes, ScalarType type, MemoryFormat format) {
  return torch::stable::empty(sizes, type, std::nullopt, like.device(), std::nullopt, format);
}

// Stands for a gradient that nobody asked for.
inline Tensor not_asked(const Tensor& like) {
  return torch::stable::new_empty(like, std::vector<int64_t>{0});
}

// The input as type T in one memory format, a copy only where it is not so already.
template <typename T>
Tensor laid_out(const Tensor& input, MemoryFormat format) {
  return torch::stable::contiguous(torch::stable::to(input, scalar_type_of<T>()), format);
}

// A result computed in type T, as `like`'s type and memory format.
inline Tensor result_as(const Tensor& result, const Tensor& like, MemoryFormat format) {
  return torch::stable::contiguous(torch::stable::to(result, like.scalar_type()), format);
}

}  // namespace d2_deform
