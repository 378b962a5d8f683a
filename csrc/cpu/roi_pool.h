// What deformable RoI pooling and its position-sensitive kind share on the CPU: the boxes of a picture, a bin's cells.
#pragma once

#include <cmath>
#include <limits>

#include "../pool_shape.h"
#include "../roi_geometry.h"
#include "../tensors.h"
#include "kernels.h"

namespace d2_deform::cpu {

// The boxes of every picture, in their order; last, those of pictures that do not exist.
template <typename T>
std::vector<std::vector<int64_t>> boxes_of_pictures(
    const PoolShape& s, const RoIRule& rule, const T* rois) {
  std::vector<std::vector<int64_t>> boxes(s.batch + 1);
  for (int64_t r = 0; r < s.rois; ++r) {
    const int64_t n = make_roi(rois + 5 * r, s.batch, rule).batch;
    boxes[n < 0 ? s.batch : n].push_back(r);
  }
  return boxes;
}

// How many cells a bin can read along an axis, from the first to the last; never too small.
template <typename T>
T cells_of_bin(T length, int64_t bins, int64_t extent, const RoIRule& rule) {
  const T step = length / static_cast<T>(bins) / static_cast<T>(rule.samples);
  // What may be lost by rounding: positions within a map and bins of some cells.
  const T error = T(4) * std::numeric_limits<T>::epsilon() * static_cast<T>(extent + 64);
  // From the cell of the first sample to the neighbour of the last one's.
  const T cells = std::floor(step * static_cast<T>(rule.samples - 1) + error) + T(3);
  return cells < static_cast<T>(extent) ? cells : static_cast<T>(extent);
}

// bin_axis, the same bits wherever it is called: a compiler may fuse a product and a sum in one place and not in another.
template <typename T>
__attribute__((noinline)) BinAxis<T> same_bin_axis(
    T start, T length, int64_t bin, int64_t bins, T shift, int64_t extent, const RoIRule& rule) {
  return bin_axis(start, length, bin, bins, shift, extent, rule);
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
      const PoolShape& s, const RoI<T>& roi, const RoIRule& rule, int64_t bin, const T* offset) {
    const int64_t ph = bin / s.pooled_w;
    const int64_t pw = bin % s.pooled_w;
    const T shift_x = offset ? offset[0] : T(0);
    const T shift_y = offset ? offset[s.bins()] : T(0);
    const BinAxis<T> y_axis =
        same_bin_axis(roi.y, roi.height, ph, s.pooled_h, shift_y, s.height, rule);
    const BinAxis<T> x_axis = bin_axis(roi.x, roi.width, pw, s.pooled_w, shift_x, s.width, rule);
    const int count_y = axis_cells(y_axis, y.data(), &y_size);
    const int count_x = axis_cells(x_axis, x.data(), &x_size);
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

  // One gradient, of `length` channels: to the rows of grad_rows, times their weights, and its products with those of rows to
  // dots. Both begin where row counts from, and either may be null.
  void backward(int64_t length, const T* gradient, const T* rows, T* grad_rows) {
    const Kernels<T>& kernel = kernels<T>();
    if (rows && grad_rows) {
      kernel.scatter_and_dot_rows(
          size(), length, rows, row.data(), weight.data(), gradient, grad_rows, dots.data());
    } else if (grad_rows) {
      kernel.weighted_scatter(size(), length, gradient, row.data(), weight.data(), grad_rows);
    } else {
      kernel.dot_rows(size(), length, rows, row.data(), gradient, dots.data());
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

}  // namespace d2_deform::cpu
