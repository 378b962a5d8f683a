// The sizes of one call of deformable (PS-)RoI pooling, forward or backward, and their check.
#pragma once

#include "geometry.h"
#include "tensors.h"

namespace d2_deform {

constexpr int64_t kMostSamples = 1 << 16;  // per bin and axis

// Sizes of one call. offset_groups: K, the output channels that share an offset are out_channels / K.
struct PoolShape {
  int64_t batch, in_channels, height, width;
  int64_t rois, pooled_h, pooled_w, group_size, out_channels, offset_groups;

  D2_DEFORM_HOST_DEVICE int64_t cells() const { return height * width; }
  D2_DEFORM_HOST_DEVICE int64_t bins() const { return pooled_h * pooled_w; }
  D2_DEFORM_HOST_DEVICE int64_t group_channels() const { return out_channels / offset_groups; }
  // Row of the offset tensor (R, 2K, Ph, Pw) that holds x shifts; the y shifts follow it.
  D2_DEFORM_HOST_DEVICE int64_t offset_row(int64_t roi, int64_t offset_group) const {
    return (roi * 2 * offset_groups + 2 * offset_group) * bins();
  }
};

// Throws where a kernel would read outside a tensor (the Python functions explain more kindly).
inline PoolShape pool_shape(
    const Tensor& input,
    const Tensor& rois,
    const std::optional<Tensor>& offset,
    int64_t pooled_h,
    int64_t pooled_w,
    int64_t group_size,
    int64_t sampling_ratio) {
  STD_TORCH_CHECK(input.dim() == 4, "input: expected (N, C, H, W)");
  STD_TORCH_CHECK(rois.dim() == 2 && rois.size(1) == 5, "rois: expected (R, 5)");
  STD_TORCH_CHECK(
      pooled_h > 0 && pooled_w > 0 && group_size > 0 && sampling_ratio > 0,
      "output_size, group_size and sampling_ratio must be positive");
  STD_TORCH_CHECK(sampling_ratio <= kMostSamples, "sampling_ratio: at most 65536");
  STD_TORCH_CHECK(
      input.size(1) > 0 && group_size <= input.size(1) &&
          input.size(1) % (group_size * group_size) == 0,
      "input: its channels must be a multiple of group_size**2");
  PoolShape s{
      input.size(0),
      input.size(1),
      input.size(2),
      input.size(3),
      rois.size(0),
      pooled_h,
      pooled_w,
      group_size,
      input.size(1) / (group_size * group_size),
      1};
  STD_TORCH_CHECK(s.height > 0 && s.width > 0, "input: the feature map is empty");
  if (offset.has_value()) {
    STD_TORCH_CHECK(
        offset->dim() == 4 && offset->size(0) == s.rois && offset->size(1) > 0 &&
            offset->size(1) % 2 == 0 && s.out_channels % (offset->size(1) / 2) == 0 &&
            offset->size(2) == pooled_h && offset->size(3) == pooled_w,
        "offset: expected (R, 2*K, Ph, Pw) with K a divisor of the output channels");
    s.offset_groups = offset->size(1) / 2;
  }
  return s;
}

// The sizes of a backward call; grad_output must be of the output's shape.
inline PoolShape pool_shape_of_gradient(
    const Tensor& grad_output,
    const Tensor& input,
    const Tensor& rois,
    const std::optional<Tensor>& offset,
    int64_t group_size,
    int64_t sampling_ratio,
    bool need_offset) {
  STD_TORCH_CHECK(grad_output.dim() == 4, "grad_output: expected (R, C, Ph, Pw)");
  const PoolShape s = pool_shape(
      input, rois, offset, grad_output.size(2), grad_output.size(3), group_size, sampling_ratio);
  STD_TORCH_CHECK(
      grad_output.size(0) == s.rois && grad_output.size(1) == s.out_channels,
      "grad_output: expected the shape of the output");
  STD_TORCH_CHECK(
      grad_output.scalar_type() == input.scalar_type(), "grad_output: expected input's type");
  STD_TORCH_CHECK(
      !need_offset || offset.has_value(), "offset: its gradient is asked for, but it is absent");
  return s;
}

}  // namespace d2_deform
