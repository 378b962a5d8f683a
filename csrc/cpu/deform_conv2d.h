// What the forward and the backward pass of deformable convolution share: runs of channels, the sampling plan.
#pragma once

#include "../conv_shape.h"
#include "rows.h"

namespace d2_deform::cpu {

// Throws where a map has too many cells: their numbers are 32 bits wide (kernels.h, Index), and so is a sum of two.
inline void check_cells(const ConvShape& s) {
  STD_TORCH_CHECK(
      s.height <= (int64_t(1) << 30) / s.width, "input: a map has more than 2**30 cells");
}

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
class SamplingPlan {
 public:
  // most: the longest run.
  explicit SamplingPlan(int64_t most)
      : length_(round_up(most, 64)),
        indices_(4 * length_),
        values_(6 * length_),
        base_y_(most),
        base_x_(most) {
    for (int64_t j = 0; j < 4; ++j) {
      arrays.index[j] = indices_.data() + j * length_;
      arrays.weight[j] = values_.data() + j * length_;
    }
    arrays.ly = values_.data() + 4 * length_;
    arrays.lx = values_.data() + 5 * length_;
  }

  // Output pixels [first, first + count), counted along the rows, are those of the next calls of make().
  void choose_pixels(const ConvShape& s, int64_t first, int64_t count) {
    first_ = first;
    count_ = count;
    int64_t h = first / s.out_width;
    int64_t w = first % s.out_width;
    for (int64_t i = 0; i < count; ++i) {
      base_y_.data()[i] = h * s.stride_h;
      base_x_.data()[i] = w * s.stride_w;
      if (++w == s.out_width) {
        w = 0;
        ++h;
      }
    }
  }

  // offset: (2*G*taps, Ho*Wo) of one picture, mask: (G*taps, Ho*Wo) or null. first_cell: the cell of the map that has
  // index 0; missing: index of a cell outside the map.
  void make(
      const ConvShape& s,
      const T* offset,
      const T* mask,
      int64_t deform_group,
      int64_t tap,
      int64_t first_cell,
      int64_t missing) {
    const int64_t row = deform_group * s.taps() + tap;
    const T* dy = offset + 2 * row * s.pixels() + first_;
    const PlanInputs<T> inputs{
        base_y_.data(),
        base_x_.data(),
        tap / s.kernel_w * s.dilation_h - s.pad_h,
        tap % s.kernel_w * s.dilation_w - s.pad_w,
        dy,
        dy + s.pixels(),
        mask ? mask + row * s.pixels() + first_ : nullptr,
        s.height,
        s.width,
        static_cast<Index<T>>(first_cell),
        static_cast<Index<T>>(missing)};
    kernels<T>().plan(inputs, count_, arrays);
    mask_ = inputs.mask;
  }

  // The mask of sample i, 1 where there is none.
  T mask(int64_t i) const { return mask_ ? mask_[i] : T(1); }

  PlanArrays<T> arrays;

 private:
  int64_t length_;
  Buffer<Index<T>> indices_;
  Buffer<T> values_;
  Buffer<int64_t> base_y_, base_x_;
  int64_t first_ = 0, count_ = 0;
  const T* mask_ = nullptr;
};

}  // namespace d2_deform::cpu
