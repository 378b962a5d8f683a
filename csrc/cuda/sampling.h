// Where the taps of a deformable convolution sample: what all its kernels look up.
#pragma once

#include "../conv_shape.h"
#include "array.h"
#include "divider.h"

namespace d2_deform::cuda {

// One tap of one deformable group at one output pixel.
template <typename T>
struct TapSample {
  int64_t image;
  BilinearSample<T> where;
  T mask;

  // Weights of the four cells, times the mask.
  D2_DEFORM_HOST_DEVICE void weights(T (&weight)[4]) const {
    bilinear_weights(where.ly, where.lx, weight);
    for (T& w : weight) w *= mask;
  }
};

// Output pixels are numbered through the whole batch: image * pixels of a picture + pixel.
template <typename T>
struct Sampling {
  ConvShape shape;
  Array<const T> offset;  // (N, 2*G*taps, Ho, Wo)
  Array<const T> mask;    // (N, G*taps, Ho, Wo) or none
  Divider<uint64_t> by_pixels, by_width;
  Divider<uint32_t> by_kernel_w;

  Sampling(const ConvShape& s, const Tensor& offset, const std::optional<Tensor>& mask)
      : shape(s),
        offset(array_of<const T>(offset)),
        mask(array_or_none<const T>(mask)),
        by_pixels(s.pixels()),
        by_width(s.out_width),
        by_kernel_w(s.kernel_w) {}

  // Element of the mask; of the offset's y it is the one of plane 2 * plane, of its x that of the next plane.
  D2_DEFORM_HOST_DEVICE int64_t plane(int64_t image, int64_t deform_group, int64_t tap) const {
    return (image * shape.deform_groups + deform_group) * shape.taps() + tap;
  }

  D2_DEFORM_HOST_DEVICE TapSample<T> at(int64_t pixel, int64_t deform_group, int64_t tap) const {
    uint64_t within = static_cast<uint64_t>(pixel);
    const int64_t image = static_cast<int64_t>(by_pixels.split(within));
    const int64_t here = static_cast<int64_t>(within);
    const int64_t row = static_cast<int64_t>(by_width.split(within));
    const int64_t column = static_cast<int64_t>(within);
    uint32_t tap_column = static_cast<uint32_t>(tap);
    const int64_t tap_row = by_kernel_w.split(tap_column);

    const int64_t p = plane(image, deform_group, tap);
    const int64_t whole_y = row * shape.stride_h - shape.pad_h + tap_row * shape.dilation_h;
    const int64_t whole_x = column * shape.stride_w - shape.pad_w + tap_column * shape.dilation_w;
    const T y = static_cast<T>(whole_y) + offset[2 * p * shape.pixels() + here];
    const T x = static_cast<T>(whole_x) + offset[(2 * p + 1) * shape.pixels() + here];
    return {
        image,
        bilinear_sample(y, x, shape.height, shape.width),
        mask.exists() ? mask[p * shape.pixels() + here] : T(1)};
  }

  // The pixel's number within its picture.
  D2_DEFORM_HOST_DEVICE int64_t pixel_in_picture(int64_t pixel) const {
    uint64_t within = static_cast<uint64_t>(pixel);
    by_pixels.split(within);
    return static_cast<int64_t>(within);
  }
};

// Taps of a chunk's pixels in one row: [pixel of the chunk][deformable group][tap].
struct TapPlace {
  int64_t pixel, deform_group, tap;
};

struct TapNumbers {
  Divider<uint64_t> by_taps, by_deform_groups;

  explicit TapNumbers(const ConvShape& s) : by_taps(s.taps()), by_deform_groups(s.deform_groups) {}

  D2_DEFORM_HOST_DEVICE TapPlace place(int64_t number) const {
    uint64_t tap = static_cast<uint64_t>(number);
    uint64_t deform_group = by_taps.split(tap);
    const int64_t pixel = static_cast<int64_t>(by_deform_groups.split(deform_group));
    return {pixel, static_cast<int64_t>(deform_group), static_cast<int64_t>(tap)};
  }
};

}  // namespace d2_deform::cuda
