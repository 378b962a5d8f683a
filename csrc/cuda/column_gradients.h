// From the gradient of the columns to the gradients of what they were sampled from: map, offsets, mask.
#pragma once

#include "columns.h"
#include "inverse_gather.h"

namespace d2_deform::cuda {

// Offset and mask gradients: the lanes of one pixel, deformable group and tap share its channels, read each of the four
// cells once, and sum the dot products <gradient of the column, cell>.
template <typename S, typename T, int N>
struct OffsetGradient {
  using Result = Sums<T, 4>;

  Sampling<T> sampling;
  ColumnLayout layout;
  TapNumbers numbers;
  int64_t first_pixel;
  Array<const S> input;         // (N, H, W, C)
  Array<const S> grad_columns;  // of the chunk
  Array<T> grad_offset;         // (N, 2*G*taps, Ho, Wo), or none
  Array<T> grad_mask;           // (N, G*taps, Ho, Wo), or none

  D2_DEFORM_HOST_DEVICE Result share(int64_t i, int lane, int lanes) const {
    const ConvShape& s = sampling.shape;
    const TapPlace p = numbers.place(i);
    const TapSample<T> sample = sampling.at(first_pixel + p.pixel, p.deform_group, p.tap);
    Result dots{};
    if (!sample.where.inside) return dots;
    const int64_t first = p.deform_group * s.deform_channels();
    for (int64_t c = lane * N; c < s.deform_channels(); c += lanes * N) {
      T gradient[N];
      grad_columns.load(layout.element(p.pixel, p.tap, first + c), gradient);
      for (int corner = 0; corner < 4; ++corner) {
        const int64_t cell = sample.where.index[corner];
        if (cell < 0) continue;
        T neighbour[N];
        input.load((sample.image * s.cells() + cell) * s.in_channels + first + c, neighbour);
        for (int j = 0; j < N; ++j) dots.value[corner] += gradient[j] * neighbour[j];
      }
    }
    return dots;
  }

  D2_DEFORM_HOST_DEVICE void finish(int64_t i, const Result& dots) const {
    const TapPlace p = numbers.place(i);
    const int64_t pixel = first_pixel + p.pixel;
    const TapSample<T> sample = sampling.at(pixel, p.deform_group, p.tap);
    T dy = T(0), dx = T(0), dmask = T(0);
    if (sample.where.inside) {
      T weight[4];
      bilinear_weights(sample.where.ly, sample.where.lx, weight);
      for (int corner = 0; corner < 4; ++corner) dmask += weight[corner] * dots.value[corner];
      bilinear_derivatives(sample.where.ly, sample.where.lx, dots.value, &dy, &dx);
      dy *= sample.mask;
      dx *= sample.mask;
    }
    const int64_t plane = sampling.plane(sample.image, p.deform_group, p.tap);
    const int64_t size = sampling.shape.pixels(), here = sampling.pixel_in_picture(pixel);
    if (grad_offset.exists()) {
      grad_offset[2 * plane * size + here] = dy;
      grad_offset[(2 * plane + 1) * size + here] = dx;
    }
    if (grad_mask.exists()) grad_mask[plane * size + here] = dmask;
  }
};

// The map's gradient by atomic sums: a thread scatters N channels of one pixel and tap to up to four cells.
template <typename S, typename T, int N>
struct ScatterInputGradient {
  Sampling<T> sampling;
  ColumnLayout layout;
  int64_t first_pixel;
  Array<const S> grad_columns;  // of the chunk
  Array<T> grad_input;          // (N, H, W, C)

  D2_DEFORM_HOST_DEVICE void operator()(int64_t i) const {
    const ConvShape& s = sampling.shape;
    const ColumnPlace place = layout.place(i * N);
    const TapSample<T> sample =
        sampling.at(first_pixel + place.pixel, place.deform_group, place.tap);
    if (!sample.where.inside) return;
    T weight[4], gradient[N];
    sample.weights(weight);
    grad_columns.load(i * N, gradient);
    for (int corner = 0; corner < 4; ++corner) {
      const int64_t cell = sample.where.index[corner];
      if (cell < 0) continue;
      T part[N];
      for (int j = 0; j < N; ++j) part[j] = weight[corner] * gradient[j];
      grad_input.atomic_add(
          (sample.image * s.cells() + cell) * s.in_channels + place.channel, part);
    }
  }
};

// The same without atomics (inverse_gather.h): samples are numbered [pixel of the chunk][deformable group][tap], and each
// deformable group of a picture is a map of its own.
template <typename S, typename T, int N>
struct ColumnSource {
  Sampling<T> sampling;
  ColumnLayout layout;
  TapNumbers numbers;
  Divider<uint64_t> by_width;
  int64_t first_pixel, first_image;
  KeyGrid grid;
  Array<const S> grad_columns;  // of the chunk
  Array<T> grad_input;          // (N, H, W, C)

  D2_DEFORM_HOST_DEVICE TapSample<T> sample_of(const TapPlace& p) const {
    return sampling.at(first_pixel + p.pixel, p.deform_group, p.tap);
  }

  D2_DEFORM_HOST_DEVICE int64_t key(int64_t number) const {
    const TapPlace p = numbers.place(number);
    const TapSample<T> sample = sample_of(p);
    const int64_t map =
        (sample.image - first_image) * sampling.shape.deform_groups + p.deform_group;
    for (int corner = 0; corner < 4; ++corner) {
      if (sample.where.index[corner] < 0) continue;
      uint64_t x = static_cast<uint64_t>(sample.where.index[corner]);
      const int64_t y = static_cast<int64_t>(by_width.split(x));
      return grid.key(map, y - corner / 2, static_cast<int64_t>(x) - corner % 2);
    }
    return grid.count();
  }

  D2_DEFORM_HOST_DEVICE bool weight(int64_t number, int a, int b, T* weight) const {
    T weights[4];
    sample_of(numbers.place(number)).weights(weights);
    *weight = weights[2 * a + b];
    return true;
  }

  D2_DEFORM_HOST_DEVICE void gradient(int64_t number, int64_t channel, T (&out)[N]) const {
    const TapPlace p = numbers.place(number);
    const int64_t first = p.deform_group * sampling.shape.deform_channels();
    grad_columns.load(layout.element(p.pixel, p.tap, first + channel), out);
  }

  D2_DEFORM_HOST_DEVICE void add(
      int64_t map, int64_t cell, int64_t channel, const T (&sum)[N]) const {
    const ConvShape& s = sampling.shape;
    uint64_t deform_group = static_cast<uint64_t>(map);
    const int64_t image =
        first_image + static_cast<int64_t>(numbers.by_deform_groups.split(deform_group));
    const int64_t first = (image * s.cells() + cell) * s.in_channels +
                          static_cast<int64_t>(deform_group) * s.deform_channels() + channel;
    T total[N];
    grad_input.load(first, total);
    for (int j = 0; j < N; ++j) total[j] += sum[j];
    grad_input.store(first, total);
  }
};

}  // namespace d2_deform::cuda
