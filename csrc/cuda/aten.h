// torch's own operators that the CUDA kernels lean on, reached through the dispatcher: products, sums, a stable sort.
//
// Only overloads without a Scalar argument, which the stable ABI does not convey. `.out` overloads are not touched by
// autocast: the types are those of the operands.
#pragma once

#include <array>

#include "../tensors.h"

namespace d2_deform::cuda {

// Calls an operator with all its arguments, those with a default included; returns what it leaves.
template <size_t kResults, typename... Args>
std::array<Tensor, kResults> call(const char* name, const char* overload, const Args&... args) {
  StableIValue stack[] = {torch::stable::detail::from(args)...};
  static_assert(sizeof...(args) >= kResults);
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack, TORCH_ABI_VERSION));
  std::array<Tensor, kResults> results;
  for (size_t i = 0; i < kResults; ++i) results[i] = torch::stable::detail::to<Tensor>(stack[i]);
  return results;
}

// out = a * b for matrices (m, k) * (k, n), or for stacks of them (s, m, k) * (s, k, n). In float32, TF32 where torch is
// told so (torch.backends.cuda.matmul); half types are summed in float32.
inline void multiply(const Tensor& a, const Tensor& b, const Tensor& out) {
  call<1>(a.dim() == 3 ? "aten::bmm" : "aten::mm", "out", a, b, out);
}

// Sum over the first dimension, in `type`.
inline Tensor sum_first(const Tensor& tensor, ScalarType type) {
  const std::vector<int64_t> first{0};
  return torch::stable::sum(tensor, first, false, type);
}

// A vector's values in rising order and where each came from; equal values keep their order.
inline std::array<Tensor, 2> stable_sort(const Tensor& keys) {
  return call<2>("aten::sort", "stable", keys, std::optional(true), int64_t(0), false);
}

// (d0, d1, d2, d3) -> (d0, d2, d3, d1), a view.
inline Tensor channels_to_end(const Tensor& tensor) {
  return torch::stable::transpose(torch::stable::transpose(tensor, 1, 2), 2, 3);
}

// (d0, d1, d2, d3) -> (d0, d3, d1, d2), a view.
inline Tensor channels_to_front(const Tensor& tensor) {
  return torch::stable::transpose(torch::stable::transpose(tensor, 2, 3), 1, 2);
}

inline Tensor viewed(const Tensor& tensor, const std::vector<int64_t>& sizes) {
  return torch::stable::view(tensor, sizes);
}

// A map (N, C, H, W) as dense rows (N * H * W, C) of `type`, a copy only where it does not lie so.
inline Tensor rows_of(const Tensor& map, ScalarType type) {
  const Tensor last = torch::stable::contiguous(
      channels_to_end(torch::stable::to(map, type)), MemoryFormat::Contiguous);
  return viewed(last, {map.size(0) * map.size(2) * map.size(3), map.size(1)});
}

// Rows (N * H * W, C) as a map (N, C, H, W) of `like`'s type, in the memory format that goes with `like`.
inline Tensor map_of(const Tensor& rows, int64_t height, int64_t width, const Tensor& like) {
  const int64_t images = rows.size(0) / (height * width);
  const Tensor map = channels_to_front(viewed(rows, {images, height, width, rows.size(1)}));
  return result_as(map, like, suggested_format(like));
}

inline Tensor empty_rows(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType type) {
  return empty_as(like, sizes, type, MemoryFormat::Contiguous);
}

inline Tensor zero_rows(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType type) {
  Tensor rows = empty_rows(like, sizes, type);
  torch::stable::zero_(rows);
  return rows;
}

// Throws unless the tensor lies where the input does.
inline void check_device(const char* name, const Tensor& tensor, const Tensor& input) {
  STD_TORCH_CHECK(
      tensor.device() == input.device(),
      name,
      ": lies on another device than input; move them together");
}

inline void check_device(
    const char* name, const std::optional<Tensor>& tensor, const Tensor& input) {
  if (tensor.has_value()) check_device(name, *tensor, input);
}

}  // namespace d2_deform::cuda
