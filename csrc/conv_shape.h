// The sizes of one call of deformable convolution, forward or backward, and their check.
#pragma once

#include "geometry.h"
#include "tensors.h"

namespace d2_deform {

// Sizes of one call. A "tap" is one of the kernel's kernel_h * kernel_w positions.
struct ConvShape {
  int64_t batch, in_channels, height, width;
  int64_t out_channels, kernel_h, kernel_w, out_height, out_width;
  int64_t groups, deform_groups;
  int64_t stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;

  D2_DEFORM_HOST_DEVICE int64_t taps() const { return kernel_h * kernel_w; }
  D2_DEFORM_HOST_DEVICE int64_t cells() const { return height * width; }
  D2_DEFORM_HOST_DEVICE int64_t pixels() const { return out_height * out_width; }
  D2_DEFORM_HOST_DEVICE int64_t group_in() const { return in_channels / groups; }
  D2_DEFORM_HOST_DEVICE int64_t group_out() const { return out_channels / groups; }
  D2_DEFORM_HOST_DEVICE int64_t deform_channels() const { return in_channels / deform_groups; }
  D2_DEFORM_HOST_DEVICE bool depthwise() const { return group_in() == 1 && group_out() == 1; }
};

inline int64_t conv_length(
    int64_t length, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
  const int64_t room = length + 2 * pad - dilation * (kernel - 1) - 1;
  return room < 0 ? 0 : room / stride + 1;
}

// Reads the shapes; throws where a kernel would read outside a tensor (the Python functions explain more kindly).
inline ConvShape conv_shape(
    const Tensor& input,
    const Tensor& offset,
    const Tensor& weight,
    const std::optional<Tensor>& mask,
    int64_t stride_h,
    int64_t stride_w,
    int64_t pad_h,
    int64_t pad_w,
    int64_t dilation_h,
    int64_t dilation_w) {
  STD_TORCH_CHECK(input.dim() == 4, "input: expected (N, C, H, W)");
  STD_TORCH_CHECK(offset.dim() == 4, "offset: expected (N, 2*G*kh*kw, Ho, Wo)");
  STD_TORCH_CHECK(weight.dim() == 4, "weight: expected (out, in/groups, kh, kw)");
  for (int64_t step : {stride_h, stride_w, dilation_h, dilation_w}) {
    STD_TORCH_CHECK(step > 0 && step < 1 << 30, "stride, dilation: expected 1 to 2**30 - 1");
  }
  for (int64_t pad : {pad_h, pad_w}) {
    STD_TORCH_CHECK(pad >= 0 && pad < 1 << 30, "padding: expected 0 to 2**30 - 1");
  }
  STD_TORCH_CHECK(
      input.size(1) > 0 && input.size(2) > 0 && input.size(3) > 0, "input: the map is empty");
  ConvShape s{};
  s.batch = input.size(0);
  s.in_channels = input.size(1);
  s.height = input.size(2);
  s.width = input.size(3);
  s.out_channels = weight.size(0);
  s.kernel_h = weight.size(2);
  s.kernel_w = weight.size(3);
  s.stride_h = stride_h;
  s.stride_w = stride_w;
  s.pad_h = pad_h;
  s.pad_w = pad_w;
  s.dilation_h = dilation_h;
  s.dilation_w = dilation_w;
  STD_TORCH_CHECK(s.taps() > 0 && s.out_channels > 0 && weight.size(1) > 0, "weight: is empty");
  STD_TORCH_CHECK(
      s.in_channels % weight.size(1) == 0, "weight: size(1) must divide the input channels");
  s.groups = s.in_channels / weight.size(1);
  STD_TORCH_CHECK(
      s.out_channels % s.groups == 0, "weight: size(0) must be a multiple of the groups");
  STD_TORCH_CHECK(
      offset.size(1) > 0 && offset.size(1) % (2 * s.taps()) == 0,
      "offset: size(1) must be a multiple of 2*kh*kw");
  s.deform_groups = offset.size(1) / (2 * s.taps());
  STD_TORCH_CHECK(
      s.in_channels % s.deform_groups == 0,
      "offset: its deformable groups must divide the input channels");
  s.out_height = conv_length(s.height, s.kernel_h, stride_h, pad_h, dilation_h);
  s.out_width = conv_length(s.width, s.kernel_w, stride_w, pad_w, dilation_w);
  STD_TORCH_CHECK(
      s.out_height > 0 && s.out_width > 0, "input: too small for this kernel, no output is left");
  STD_TORCH_CHECK(
      offset.size(0) == s.batch && offset.size(2) == s.out_height && offset.size(3) == s.out_width,
      "offset: expected one pair per output pixel");
  if (mask.has_value()) {
    STD_TORCH_CHECK(
        mask->dim() == 4 && mask->size(0) == s.batch &&
            mask->size(1) == s.deform_groups * s.taps() && mask->size(2) == s.out_height &&
            mask->size(3) == s.out_width,
        "mask: expected one value per deformable group, tap and output pixel");
  }
  return s;
}

}  // namespace d2_deform
