// Where deformable (PS-)RoI pooling samples: host and device code.
//
// A bin's samples form a regular grid, and the tests and weights of the two axes are independent of each other. So a
// bin is described by one list per axis - which rows (columns) of the map it reads and with what weight - and its value
// is sum_y sum_x weight_y * weight_x * map[y][x] / (count_y * count_x).
#pragma once

#include <cmath>

#include "geometry.h"

namespace d2_deform {

// How boxes turn into samples; see d2_deform.ops.deform_roi_pool for the two conventions.
struct RoIRule {
  double spatial_scale;
  double gamma;
  int64_t samples;  // per bin and axis
  bool aligned;     // Detectron2's continuous coordinates; otherwise the official release's
};

// A box in feature-map cells. batch = -1: its picture does not exist.
template <typename T>
struct RoI {
  int64_t batch;
  T x, y, width, height;
};

// Start and length of one axis of a box. Lengths below 0.1 cell, and those of NaN boxes, become 0.1.
template <typename T>
D2_DEFORM_HOST_DEVICE void roi_axis(T low, T high, const RoIRule& rule, T* start, T* length) {
  const T scale = static_cast<T>(rule.spatial_scale);
  T end;
  if (rule.aligned) {
    *start = low * scale - T(0.5);
    end = high * scale - T(0.5);
  } else {
    *start = std::round(low) * scale - T(0.5);
    end = (std::round(high) + T(1)) * scale - T(0.5);
  }
  *length = end - *start;
  if (!(*length >= T(0.1))) *length = T(0.1);
}

// Row of rois (batch index, x1, y1, x2, y2 in input-image pixels) -> box in cells.
template <typename T>
D2_DEFORM_HOST_DEVICE RoI<T> make_roi(const T* row, int64_t num_images, const RoIRule& rule) {
  RoI<T> roi;
  const bool known = row[0] >= T(0) && row[0] < static_cast<T>(num_images);
  roi.batch = known ? static_cast<int64_t>(row[0]) : -1;
  roi_axis(row[1], row[3], rule, &roi.x, &roi.width);
  roi_axis(row[2], row[4], rule, &roi.y, &roi.height);
  return roi;
}

// One axis of a bin: its samples lie at first + i * step for i in [0, samples).
template <typename T>
struct BinAxis {
  T first, step;
  int64_t samples, extent;  // extent: cells of the map along the axis
  bool aligned;
};

// The axis of bin `bin` of `bins`. shift: the bin's offset, in units of the box's length before gamma.
template <typename T>
D2_DEFORM_HOST_DEVICE BinAxis<T> bin_axis(
    T start, T length, int64_t bin, int64_t bins, T shift, int64_t extent, const RoIRule& rule) {
  const T bin_length = length / static_cast<T>(bins);
  const T step = bin_length / static_cast<T>(rule.samples);
  const T first = start + static_cast<T>(bin) * bin_length +
                  shift * static_cast<T>(rule.gamma) * length +
                  (rule.aligned ? T(0.5) * step : T(0));
  return {first, step, rule.samples, extent, rule.aligned};
}

// One sample along an axis: it reads `cell` and, unless it is still, the next one, which counts by `fraction`.
//
// inside: whether it lies inside [-0.5, extent - 0.5]; others are skipped. still: it does not move with the shift.
template <typename T>
struct AxisSample {
  int64_t cell;
  T fraction;
  bool inside, still;
};

template <typename T>
D2_DEFORM_HOST_DEVICE AxisSample<T> axis_sample(const BinAxis<T>& axis, int64_t i) {
  const T position = axis.first + static_cast<T>(i) * axis.step;
  if (!(position >= T(-0.5) && position <= static_cast<T>(axis.extent) - T(0.5))) {
    return {0, T(0), false, true};
  }
  const T last = static_cast<T>(axis.extent - 1);
  const T clamped = position < T(0) ? T(0) : (position > last ? last : position);
  // Beyond 2^24 cells a float no longer holds every number, and `last` may have been rounded up.
  const int64_t below = static_cast<int64_t>(clamped);
  const int64_t cell = below < axis.extent ? below : axis.extent - 1;
  const T fraction = clamped - static_cast<T>(cell);
  // A clamped sample does not move with the shift. At a whole number the release's ceil equals its floor, so its
  // derivative is 0; ours is the right-hand one, as everywhere else.
  const bool still =
      cell >= axis.extent - 1 || position < T(0) || (!axis.aligned && fraction == T(0));
  return {cell, fraction, true, still};
}

// One row or column that a bin reads: its number, its weight, and the weight's derivative with respect to the shift.
template <typename T>
struct AxisCell {
  int64_t cell;
  T weight;
  T derivative;
};

template <typename T>
D2_DEFORM_HOST_DEVICE void add_cell(
    AxisCell<T>* cells, int* size, int64_t cell, T weight, T derivative) {
  // Samples come in rising order, so a cell seen before is one of the last two.
  for (int i = *size - 1; i >= 0 && i >= *size - 2; --i) {
    if (cells[i].cell == cell) {
      cells[i].weight += weight;
      cells[i].derivative += derivative;
      return;
    }
  }
  cells[(*size)++] = {cell, weight, derivative};
}

// The cells that an axis reads, in rising order.
//
// cells: room for min(2 * samples, extent) entries; size: how many were written. Returns how many samples lie inside.
template <typename T>
D2_DEFORM_HOST_DEVICE int axis_cells(const BinAxis<T>& axis, AxisCell<T>* cells, int* size) {
  int count = 0;
  *size = 0;
  for (int64_t i = 0; i < axis.samples; ++i) {
    const AxisSample<T> sample = axis_sample(axis, i);
    if (!sample.inside) continue;
    ++count;
    add_cell(cells, size, sample.cell, T(1) - sample.fraction, sample.still ? T(0) : T(-1));
    if (!sample.still) add_cell(cells, size, sample.cell + 1, sample.fraction, T(1));
  }
  return count;
}

// The cell of the position-sensitive grid that serves a bin.
D2_DEFORM_HOST_DEVICE int64_t group_cell(int64_t bin, int64_t bins, int64_t group_size) {
  return bin * group_size / bins;
}

}  // namespace d2_deform
