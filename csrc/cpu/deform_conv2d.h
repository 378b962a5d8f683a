// What the forward and the backward pass of deformable convolution share: runs of channels, the sampling plan.
#pragma once

#include "../conv_shape.h"
#include "../geometry.h"
#include "tensors.h"

namespace d2_deform::cpu {

// A run of consecutive input channels that share both their group and their deformable group.
struct ChannelRun {
  int64_t first, count, group, deform_group;
};

// All input channels as runs of at most `most`. In a depthwise convolution groups do not part them.
inline std::vector<ChannelRun> channel_runs(const ConvShape& s, int64_t most) {
  std::vector<ChannelRun> runs;
  for (int64_t c = 0; c < s.in_channels;) {
    const int64_t deform_group = c / s.deform_channels();
    const int64_t group = c / s.group_in();
    int64_t end = std::min((deform_group + 1) * s.deform_channels(), c + most);
    if (!s.depthwise()) end = std::min(end, (group + 1) * s.group_in());
    runs.push_back({c, end - c, group, deform_group});
    c = end;
  }
  return runs;
}

// Where one tap of one deformable group samples for a run of output pixels: computed once, used by all its channels.
template <typename T>
struct SamplingPlan {
  std::vector<BilinearSample<T>> samples;
  std::vector<int64_t> index;  // 4 per pixel: cell, or `missing` where there is none
  std::vector<T> weight;       // 4 per pixel, times the mask; 0 where there is no cell
  std::vector<T> mask;

  explicit SamplingPlan(int64_t pixels)
      : samples(pixels), index(4 * pixels), weight(4 * pixels), mask(pixels) {}

  // offset: (2*G*taps, Ho*Wo) of one picture, mask_data: (G*taps, Ho*Wo) or null.
  void make(
      const ConvShape& s,
      const T* offset,
      const T* mask_data,
      int64_t deform_group,
      int64_t tap,
      int64_t first,
      int64_t count,
      int64_t missing) {
    const int64_t row = deform_group * s.taps() + tap;
    const T* dy = offset + 2 * row * s.pixels() + first;
    const T* dx = dy + s.pixels();
    const int64_t tap_y = tap / s.kernel_w * s.dilation_h - s.pad_h;
    const int64_t tap_x = tap % s.kernel_w * s.dilation_w - s.pad_w;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t pixel = first + i;
      const T y = static_cast<T>(pixel / s.out_width * s.stride_h + tap_y) + dy[i];
      const T x = static_cast<T>(pixel % s.out_width * s.stride_w + tap_x) + dx[i];
      samples[i] = bilinear_sample(y, x, s.height, s.width);
      mask[i] = mask_data ? mask_data[row * s.pixels() + pixel] : T(1);
      T w[4];
      bilinear_weights(samples[i], w);
      for (int j = 0; j < 4; ++j) {
        const bool exists = samples[i].index[j] >= 0;
        index[4 * i + j] = exists ? samples[i].index[j] : missing;
        weight[4 * i + j] = exists ? w[j] * mask[i] : T(0);
      }
    }
  }
};

}  // namespace d2_deform::cpu
