// Where a deformable convolution samples: host and device code.
//
// Coordinates are feature-map cells, y before x; cell (0, 0) has its centre at y = x = 0.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define D2_DEFORM_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define D2_DEFORM_HOST_DEVICE inline
#endif

namespace d2_deform {

// The four cells around a point and how much each counts.
//
// index[4]: cell number y * width + x of top-left, top-right, bottom-left, bottom-right; -1 where the cell lies
// outside the map and counts as 0. ly, lx: distance of the point from the top-left cell, in [0, 1]. inside: whether
// the point counts at all, i.e. -1 < y < height and -1 < x < width (Detectron2's and torchvision's border).
template <typename T>
struct BilinearSample {
  int64_t index[4];
  T ly;
  T lx;
  bool inside;
};

// The sample at (y, x). A NaN or infinite coordinate fails the range test and so is outside.
template <typename T>
D2_DEFORM_HOST_DEVICE BilinearSample<T> bilinear_sample(T y, T x, int64_t height, int64_t width) {
  BilinearSample<T> sample{{-1, -1, -1, -1}, T(0), T(0), false};
  if (!(y > T(-1) && y < static_cast<T>(height) && x > T(-1) && x < static_cast<T>(width))) {
    return sample;
  }
  sample.inside = true;
  // y > -1: truncating y + 1 is its floor. Floor and fraction give the right-hand derivative at whole numbers.
  int64_t top = static_cast<int64_t>(y + T(1)) - 1;
  int64_t left = static_cast<int64_t>(x + T(1)) - 1;
  sample.ly = y - static_cast<T>(top);
  sample.lx = x - static_cast<T>(left);
  if (sample.ly < T(0)) {  // y + 1 was rounded up to a whole number
    --top;
    sample.ly = y - static_cast<T>(top);
  }
  if (sample.lx < T(0)) {
    --left;
    sample.lx = x - static_cast<T>(left);
  }
  const int64_t bottom = top + 1;
  const int64_t right = left + 1;
  const int64_t cell = top * width + left;
  if (top >= 0 && left >= 0) sample.index[0] = cell;
  if (top >= 0 && right < width) sample.index[1] = cell + 1;
  if (bottom < height && left >= 0) sample.index[2] = cell + width;
  if (bottom < height && right < width) sample.index[3] = cell + width + 1;
  return sample;
}

// Bilinear weights of the four cells. ly, lx: of the sample.
template <typename T>
D2_DEFORM_HOST_DEVICE void bilinear_weights(T ly, T lx, T weight[4]) {
  const T hy = T(1) - ly;
  const T hx = T(1) - lx;
  weight[0] = hy * hx;
  weight[1] = hy * lx;
  weight[2] = ly * hx;
  weight[3] = ly * lx;
}

// Derivatives of the sampled value with respect to y and x, given the four cells' values (0 where outside).
template <typename T>
D2_DEFORM_HOST_DEVICE void bilinear_derivatives(T ly, T lx, const T value[4], T* dy, T* dx) {
  *dy = (T(1) - lx) * (value[2] - value[0]) + lx * (value[3] - value[1]);
  *dx = (T(1) - ly) * (value[1] - value[0]) + ly * (value[3] - value[2]);
}

}  // namespace d2_deform
