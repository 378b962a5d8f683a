// What deformable RoI pooling and its position-sensitive kind share on the CPU: shapes, their check, a bin's cells.
#pragma once

#include "../roi_geometry.h"
#include "tensors.h"

namespace d2_deform::cpu {

constexpr int64_t kMostSamples = 1 << 16;  // per bin and axis

// Sizes of one call. offset_groups: K, the output channels that share an offset are out_channels / K.
struct PoolShape {
  int64_t batch, in_channels, height, width;
  int64_t rois, pooled_h, pooled_w, group_size, out_channels, offset_groups;

  int64_t cells() const { return height * width; }
  int64_t bins() const { return pooled_h * pooled_w; }
  int64_t group_channels() const { return out_channels / offset_groups; }
  // Row of the offset tensor (R, 2K, Ph, Pw) that holds x shifts; the y shifts follow it.
  int64_t offset_row(int64_t roi, int64_t offset_group) const {
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

// The cells that one bin reads, as lists per axis and as their product.
template <typename T>
struct BinCells {
  std::vector<AxisCell<T>> y, x;
  int y_size = 0, x_size = 0;
  T scale = 0;               // 1 / number of samples kept; 0 if there is none
  std::vector<int64_t> row;  // of the product: where each cell's channels begin
  std::vector<T> weight;     // of the product, times scale
  std::vector<T> dots;       // of the product: <gradient, cell>, for derivatives()

  BinCells(const PoolShape& s, const RoIRule& rule)
      : y(std::min(2 * rule.samples, s.height)),
        x(std::min(2 * rule.samples, s.width)),
        row(y.size() * x.size()),
        weight(row.size()),
        dots(row.size()) {}

  int64_t size() const { return static_cast<int64_t>(y_size) * x_size; }

  // offset: x shift of this bin, its y shift s.bins() further; null = rigid.
  void find(
      const PoolShape& s,
      const RoI<T>& roi,
      const RoIRule& rule,
      int64_t ph,
      int64_t pw,
      const T* offset) {
    const T shift_x = offset ? offset[0] : T(0);
    const T shift_y = offset ? offset[s.bins()] : T(0);
    const int count_y =
        axis_cells(roi.y, roi.height, ph, s.pooled_h, shift_y, s.height, rule, y.data(), &y_size);
    const int count_x =
        axis_cells(roi.x, roi.width, pw, s.pooled_w, shift_x, s.width, rule, x.data(), &x_size);
    if (count_y == 0 || count_x == 0) y_size = x_size = 0;
    scale = size() > 0 ? T(1) / (static_cast<T>(count_y) * static_cast<T>(count_x)) : T(0);
  }

  // Fills row and weight. stride: elements from one cell to the next; base: element of cell 0.
  void multiply(const PoolShape& s, int64_t base, int64_t stride) {
    int64_t i = 0;
    for (int a = 0; a < y_size; ++a) {
      for (int b = 0; b < x_size; ++b, ++i) {
        row[i] = base + (y[a].cell * s.width + x[b].cell) * stride;
        weight[i] = y[a].weight * x[b].weight * scale;
      }
    }
  }

  // Derivatives of the bin's loss with respect to its x and y shift.
  void derivatives(const RoI<T>& roi, const RoIRule& rule, T* dx, T* dy) const {
    T along_x = 0, along_y = 0;
    for (int a = 0; a < y_size; ++a) {
      for (int b = 0; b < x_size; ++b) {
        const T dot = dots[a * x_size + b];
        along_x += y[a].weight * x[b].derivative * dot;
        along_y += y[a].derivative * x[b].weight * dot;
      }
    }
    const T gamma = static_cast<T>(rule.gamma);
    *dx = size() > 0 ? along_x * scale * gamma * roi.width : T(0);
    *dy = size() > 0 ? along_y * scale * gamma * roi.height : T(0);
  }
};

// The input as type T in one memory format, a copy only where it is not so already.
template <typename T>
Tensor laid_out(const Tensor& input, MemoryFormat format) {
  return torch::stable::contiguous(torch::stable::to(input, scalar_type_of<T>()), format);
}

// A result computed in type T, as `like`'s type and memory format.
inline Tensor result_as(const Tensor& result, const Tensor& like, MemoryFormat format) {
  return torch::stable::contiguous(torch::stable::to(result, like.scalar_type()), format);
}

}  // namespace d2_deform::cpu
