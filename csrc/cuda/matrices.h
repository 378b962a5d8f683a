// A convolution's tensors as the matrices of its products: one matrix, or with several groups a stack of one for each.
#pragma once

#include "../conv_shape.h"
#include "aten.h"

namespace d2_deform::cuda {

// Rows [first, first + count) of a matrix, a view.
inline Tensor row_range(Tensor matrix, int64_t first, int64_t count) {
  return torch::stable::narrow(matrix, 0, first, count);
}

// Rows (R, groups * X) as a stack (groups, R, X), a view; a single group's are left as they are.
inline Tensor by_group(const Tensor& rows, int64_t groups) {
  if (groups == 1) return rows;
  const Tensor parted = viewed(rows, {rows.size(0), groups, rows.size(1) / groups});
  return torch::stable::transpose(parted, 0, 1);
}

// A matrix, or each of a stack, transposed: a view.
inline Tensor transposed(const Tensor& matrix) {
  return torch::stable::transpose(matrix, -2, -1);
}

// Sizes of weight_matrix().
inline std::vector<int64_t> weight_matrix_sizes(const ConvShape& s) {
  const int64_t depth = s.taps() * s.group_in();
  if (s.groups == 1) return {s.out_channels, depth};
  return {s.groups, s.group_out(), depth};
}

// weight (out, in/groups, kh, kw) as matrices (outputs of a group, taps * inputs of a group), in the columns' order.
inline Tensor weight_matrix(const ConvShape& s, const Tensor& weight) {
  const Tensor last = torch::stable::contiguous(channels_to_end(weight));
  return viewed(last, weight_matrix_sizes(s));
}

// The way back.
inline Tensor weight_of_matrix(const ConvShape& s, const Tensor& matrix) {
  const Tensor last = viewed(matrix, {s.out_channels, s.kernel_h, s.kernel_w, s.group_in()});
  return torch::stable::contiguous(channels_to_front(last));
}

// A depthwise convolution's weight (channels, 1, kh, kw) as rows of channels (taps, channels).
inline Tensor tap_rows(const ConvShape& s, const Tensor& weight) {
  const Tensor dense = torch::stable::contiguous(weight);
  return torch::stable::contiguous(
      torch::stable::transpose(viewed(dense, {s.in_channels, s.taps()}), 0, 1));
}

}  // namespace d2_deform::cuda
