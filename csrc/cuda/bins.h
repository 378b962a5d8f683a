// Where the bins of deformable (PS-)RoI pooling sample: what all its kernels look up.
//
// A bin's samples form a grid (roi_geometry.h), and neighbouring samples of an axis often lie between the same two cells.
// Such a run is read as two cells with one weight each, so that a small bin reads 4 cells where its 16 samples read 64.
#pragma once

#include "../pool_shape.h"
#include "../roi_geometry.h"
#include "array.h"
#include "divider.h"

namespace d2_deform::cuda {

// Samples of one axis that lie between `cell` and the next one.
//
// moving: how many of them move with the shift; if there is none, the next cell is not read, it may not exist.
template <typename T>
struct AxisRun {
  int64_t cell;
  T weight[2];
  T moving;

  D2_DEFORM_HOST_DEVICE int cells() const { return moving > T(0) ? 2 : 1; }
  // Derivative of weight[which] with respect to the shift.
  D2_DEFORM_HOST_DEVICE T derivative(int which) const { return which == 0 ? -moving : moving; }
};

// The run that begins at sample i or, where that one is skipped, later; false if there is none. i becomes its end.
template <typename T>
D2_DEFORM_HOST_DEVICE bool next_run(const BinAxis<T>& axis, int64_t& i, AxisRun<T>& run) {
  bool begun = false;
  for (; i < axis.samples; ++i) {
    const AxisSample<T> sample = axis_sample(axis, i);
    if (!sample.inside) {
      if (begun) return true;
      continue;
    }
    if (begun && sample.cell != run.cell) return true;
    if (!begun) run = {sample.cell, {T(0), T(0)}, T(0)};
    begun = true;
    run.weight[0] += T(1) - sample.fraction;
    if (sample.still) continue;
    run.weight[1] += sample.fraction;
    run.moving += T(1);
  }
  return begun;
}

// How many samples of the axis count.
template <typename T>
D2_DEFORM_HOST_DEVICE int64_t samples_inside(const BinAxis<T>& axis) {
  int64_t count = 0;
  for (int64_t i = 0; i < axis.samples; ++i) count += axis_sample(axis, i).inside;
  return count;
}

// One bin of one offset group.
template <typename T>
struct Bin {
  int64_t image;  // -1: it reads nothing
  BinAxis<T> y, x;
  T scale;         // 1 / number of samples that count
  T per_y, per_x;  // cells that a shift of 1 moves the bin, times scale

  // Calls visit(y, x, weight, derivative by the y shift, by the x shift) for every cell read; some come twice.
  template <typename Visit>
  D2_DEFORM_HOST_DEVICE void for_each_cell(const Visit& visit) const {
    if (image < 0) return;
    AxisRun<T> row, column;
    for (int64_t i = 0; next_run(y, i, row);) {
      for (int64_t j = 0; next_run(x, j, column);) {
        // Constant bounds, so that the weights stay in registers.
        for (int a = 0; a < 2; ++a) {
          for (int b = 0; b < 2; ++b) {
            if (a >= row.cells() || b >= column.cells()) continue;
            visit(
                row.cell + a,
                column.cell + b,
                row.weight[a] * column.weight[b] * scale,
                row.derivative(a) * column.weight[b] * per_y,
                row.weight[a] * column.derivative(b) * per_x);
          }
        }
      }
    }
  }
};

template <typename T>
struct Bins {
  PoolShape shape;
  RoIRule rule;
  Array<const T> rois;    // (R, 5)
  Array<const T> offset;  // (R, 2K, Ph, Pw) or none
  Divider<uint64_t> by_width;

  Bins(
      const PoolShape& s,
      const RoIRule& rule,
      const Tensor& rois,
      const std::optional<Tensor>& offset)
      : shape(s),
        rule(rule),
        rois(array_of<const T>(rois)),
        offset(array_or_none<const T>(offset)),
        by_width(s.pooled_w) {}

  D2_DEFORM_HOST_DEVICE Bin<T> at(int64_t roi, int64_t offset_group, int64_t bin) const {
    T row[5];
    for (int i = 0; i < 5; ++i) row[i] = rois[5 * roi + i];
    const RoI<T> box = make_roi(row, shape.batch, rule);
    uint64_t pw = static_cast<uint64_t>(bin);
    const int64_t ph = static_cast<int64_t>(by_width.split(pw));
    T shift_x = T(0), shift_y = T(0);
    if (offset.exists()) {
      const int64_t element = shape.offset_row(roi, offset_group) + bin;
      shift_x = offset[element];
      shift_y = offset[element + shape.bins()];
    }
    Bin<T> found;
    found.image = box.batch;
    found.y = bin_axis(box.y, box.height, ph, shape.pooled_h, shift_y, shape.height, rule);
    found.x = bin_axis(
        box.x, box.width, static_cast<int64_t>(pw), shape.pooled_w, shift_x, shape.width, rule);
    const int64_t count = samples_inside(found.y) * samples_inside(found.x);
    if (count == 0) found.image = -1;
    found.scale = count > 0 ? T(1) / static_cast<T>(count) : T(0);
    found.per_y = found.scale * static_cast<T>(rule.gamma) * box.height;
    found.per_x = found.scale * static_cast<T>(rule.gamma) * box.width;
    return found;
  }
};

// Bins of all boxes and offset groups in one row: [box][bin][offset group].
struct BinPlace {
  int64_t roi, bin, offset_group;
};

struct BinNumbers {
  Divider<uint64_t> by_offset_groups, by_bins;

  explicit BinNumbers(const PoolShape& s) : by_offset_groups(s.offset_groups), by_bins(s.bins()) {}

  D2_DEFORM_HOST_DEVICE BinPlace place(int64_t number) const {
    uint64_t offset_group = static_cast<uint64_t>(number);
    uint64_t bin = by_offset_groups.split(offset_group);
    const int64_t roi = static_cast<int64_t>(by_bins.split(bin));
    return {roi, static_cast<int64_t>(bin), static_cast<int64_t>(offset_group)};
  }
};

}  // namespace d2_deform::cuda
