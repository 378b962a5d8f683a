// Between torch's tensors (any strides, any floating type) and the kernels' dense rows of float or double.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

namespace d2_deform::cpu {

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

// One picture of a feature map: channels x height x width with any strides, counted in elements.
template <typename S>
struct Picture {
  S* data;
  int64_t channels, height, width;
  int64_t channel_stride, row_stride, column_stride;

  // Channels [first, first + count) alone.
  Picture slice(int64_t first, int64_t count) const {
    Picture part = *this;
    part.data += first * channel_stride;
    part.channels = count;
    return part;
  }
};

template <typename S>
Picture<S> picture(const Tensor& tensor, int64_t n) {
  return {
      static_cast<S*>(tensor.data_ptr()) + n * tensor.stride(0),
      tensor.size(1),
      tensor.size(2),
      tensor.size(3),
      tensor.stride(1),
      tensor.stride(2),
      tensor.stride(3)};
}

// Calls f(cell, channel, element) for every element of map rows [begin, end): sixteen channels at a time, so that
// both the channels-first side and the channels-last side move whole cache lines.
template <typename S, typename F>
inline void for_each_element(const Picture<S>& map, int64_t begin, int64_t end, const F& f) {
  constexpr int64_t kBlock = 16;
  for (int64_t h = begin; h < end; ++h) {
    for (int64_t c0 = 0; c0 < map.channels; c0 += kBlock) {
      const int64_t c1 = std::min(map.channels, c0 + kBlock);
      S* row = map.data + h * map.row_stride;
      for (int64_t w = 0; w < map.width; ++w) {
        for (int64_t c = c0; c < c1; ++c) {
          f(h * map.width + w, c, row[c * map.channel_stride + w * map.column_stride]);
        }
      }
    }
  }
}

// Map rows [begin, end) -> rows[cell * row_length + channel], cell = h * width + w. Channels beyond the map's, up to
// row_length, are left alone.
template <typename S, typename T>
void load_rows(const Picture<S>& map, int64_t begin, int64_t end, T* rows, int64_t row_length) {
  for_each_element(map, begin, end, [=](int64_t cell, int64_t c, S& element) {
    rows[cell * row_length + c] = static_cast<T>(element);
  });
}

// The way back.
template <typename S, typename T>
void store_rows(
    const Picture<S>& map, int64_t begin, int64_t end, const T* rows, int64_t row_length) {
  for_each_element(map, begin, end, [=](int64_t cell, int64_t c, S& element) {
    element = static_cast<S>(rows[cell * row_length + c]);
  });
}

}  // namespace d2_deform::cpu
