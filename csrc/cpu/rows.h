// Between one picture of a feature map, with any strides, and dense rows: one row of channels for each cell.
#pragma once

#include <algorithm>

#include "../tensors.h"
#include "buffer.h"
#include "kernels.h"

namespace d2_deform::cpu {

// One picture of a feature map: channels x height x width with any strides, counted in elements.
template <typename S>
struct Picture {
  S* data;
  int64_t channels, height, width;
  int64_t channel_stride, row_stride, column_stride;

  // Channels [first, first + count) alone.
  Picture slice(int64_t first, int64_t count) const {
    Picture part = *this;
    part.data += first * channel_stride;
    part.channels = count;
    return part;
  }

  // Whether each channel is a dense plane, so that its cells follow each other.
  bool has_planes() const { return column_stride == 1 && row_stride == width; }
  // Whether each cell is a dense row of channels, as far from the last cell's as every other.
  bool has_rows() const { return channel_stride == 1 && row_stride == width * column_stride; }
};

template <typename S>
Picture<S> picture(const Tensor& tensor, int64_t n) {
  return {
      static_cast<S*>(tensor.data_ptr()) + n * tensor.stride(0),
      tensor.size(1),
      tensor.size(2),
      tensor.size(3),
      tensor.stride(1),
      tensor.stride(2),
      tensor.stride(3)};
}

// Calls f(cell, channel, element) for every element of cells [begin, end): sixteen channels at a time, so that both
// the channels-first side and the channels-last side move whole cache lines.
template <typename S, typename F>
inline void for_each_element(const Picture<S>& map, int64_t begin, int64_t end, const F& f) {
  constexpr int64_t kBlock = 16;
  for (int64_t first = begin; first < end;) {
    const int64_t h = first / map.width;
    const int64_t last = std::min(end, (h + 1) * map.width);
    S* row = map.data + h * map.row_stride - h * map.width * map.column_stride;
    for (int64_t c0 = 0; c0 < map.channels; c0 += kBlock) {
      const int64_t c1 = std::min(map.channels, c0 + kBlock);
      for (int64_t cell = first; cell < last; ++cell) {
        for (int64_t c = c0; c < c1; ++c) {
          f(cell, c, row[c * map.channel_stride + cell * map.column_stride]);
        }
      }
    }
    first = last;
  }
}

// Cells [begin, end), counted along the rows of the map -> rows[(cell - begin) * row_length + channel]. Channels beyond
// the map's, up to row_length, are left alone.
template <typename S, typename T>
void load_rows(const Picture<S>& map, int64_t begin, int64_t end, T* rows, int64_t row_length) {
  if constexpr (std::is_same_v<S, T>) {
    if (map.has_planes()) {
      kernels<T>().transpose(
          map.channels, end - begin, map.data + begin, map.channel_stride, rows, row_length);
      return;
    }
    if (map.has_rows()) {
      for (int64_t cell = begin; cell < end; ++cell) {
        const T* row = map.data + cell * map.column_stride;
        std::copy_n(row, map.channels, rows + (cell - begin) * row_length);
      }
      return;
    }
  }
  for_each_element(map, begin, end, [=](int64_t cell, int64_t c, const S& element) {
    rows[(cell - begin) * row_length + c] = static_cast<T>(element);
  });
}

// The way back.
template <typename S, typename T>
void store_rows(
    const Picture<S>& map, int64_t begin, int64_t end, const T* rows, int64_t row_length) {
  if constexpr (std::is_same_v<S, T>) {
    if (map.has_planes()) {
      kernels<T>().transpose(
          end - begin, map.channels, rows, row_length, map.data + begin, map.channel_stride);
      return;
    }
    if (map.has_rows()) {
      for (int64_t cell = begin; cell < end; ++cell) {
        const T* row = rows + (cell - begin) * row_length;
        std::copy_n(row, map.channels, map.data + cell * map.column_stride);
      }
      return;
    }
  }
  for_each_element(map, begin, end, [=](int64_t cell, int64_t c, S& element) {
    element = static_cast<S>(rows[(cell - begin) * row_length + c]);
  });
}

// Whether every picture of (N, C, H, W) is one dense row of channels for each cell already, of the kernels' type.
template <typename S, typename T>
bool has_rows(const Tensor& input) {
  return std::is_same_v<S, T> && input.stride(1) == 1 && input.stride(3) == input.size(1) &&
         input.stride(2) == input.size(3) * input.size(1);
}

// Rows [top, bottom) of one picture -> rows[cell][channel], by all threads.
template <typename S, typename T>
void load_picture_rows(const Picture<S>& map, int64_t top, int64_t bottom, T* rows) {
  torch::stable::parallel_for(top, bottom, 4, [&](int64_t begin, int64_t end) {
    load_rows(
        map,
        begin * map.width,
        end * map.width,
        rows + (begin - top) * map.width * map.channels,
        map.channels);
  });
}

// One picture -> rows[cell][channel], by all threads.
template <typename S, typename T>
void load_picture(const Picture<S>& map, T* rows) {
  load_picture_rows(map, 0, map.height, rows);
}

// Pictures [first, first + count) -> rows[picture][cell][channel], by all threads.
template <typename S, typename T>
void load_pictures(const Tensor& input, int64_t first, int64_t count, T* rows) {
  const int64_t height = input.size(2);
  const int64_t width = input.size(3);
  const int64_t channels = input.size(1);
  torch::stable::parallel_for(0, count * height, 4, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end;) {
      const int64_t n = row / height;
      const int64_t last = std::min(end, (n + 1) * height);
      const int64_t cell = (row - n * height) * width;
      load_rows(
          picture<S>(input, first + n),
          cell,
          cell + (last - row) * width,
          rows + (n * height * width + cell) * channels,
          channels);
      row = last;
    }
  });
}

}  // namespace d2_deform::cpu
