// Cuts a picture's output rows into bands, so that only what one band samples need be laid out at a time.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <vector>

#include "../conv_shape.h"

namespace d2_deform::cpu {

// Output rows [first, last), whose samples read no other rows of the map than [top, bottom).
struct Band {
  int64_t first, last, top, bottom;

  int64_t rows() const { return last - first; }
  int64_t map_rows() const { return bottom - top; }
};

inline Band whole_picture(const ConvShape& s) {
  return {0, s.out_height, 0, s.height};
}

// D2_DEFORM_CPU_BAND_ROWS, for tests: output rows of every band of every picture, however small it is. 0 where not set.
inline int64_t forced_band_rows() {
  static const int64_t rows = [] {
    const char* value = std::getenv("D2_DEFORM_CPU_BAND_ROWS");
    return value == nullptr ? int64_t(0) : std::max<int64_t>(std::atoll(value), 0);
  }();
  return rows;
}

// The rows of the map that one row of output pixels samples, as a band. offset: (2*G*taps, Ho*Wo) of the picture.
template <typename T>
Band sampled_rows(const ConvShape& s, const T* offset, int64_t row) {
  Band band{row, row + 1, s.height, 0};
  const T height = static_cast<T>(s.height);
  for (int64_t g = 0; g < s.deform_groups; ++g) {
    for (int64_t t = 0; t < s.taps(); ++t) {
      const T* dy = offset + 2 * (g * s.taps() + t) * s.pixels() + row * s.out_width;
      // The sampling plan's sum, so that both round alike.
      const T base = static_cast<T>(row * s.stride_h + t / s.kernel_w * s.dilation_h - s.pad_h);
      T low = height;
      T high = T(-1);
      for (int64_t w = 0; w < s.out_width; ++w) {
        const T y = base + dy[w];
        if (!(y > T(-1) && y < height)) continue;  // outside the map, or not a number
        low = std::min(low, y);
        high = std::max(high, y);
      }
      if (high < low) continue;
      band.top = std::min(band.top, std::max<int64_t>(static_cast<int64_t>(std::floor(low)), 0));
      band.bottom =
          std::max(band.bottom, std::min(static_cast<int64_t>(std::floor(high)) + 2, s.height));
    }
  }
  return band;
}

// Output rows of a band; and how many rows of the map it may sample.
struct BandLimits {
  int64_t rows, map_rows;
};

// Limits from what there is room for: output rows, map rows that a band's pixels stand on, and map rows that it samples. Of
// these it has at most eight times as many: each of them is laid out anew for it.
inline BandLimits band_limits(const ConvShape& s, int64_t rows, int64_t stood_on, int64_t sampled) {
  if (forced_band_rows() > 0) return {std::min(forced_band_rows(), s.out_height), s.height};
  const int64_t step = std::min(s.stride_h, s.height);
  rows = std::clamp<int64_t>(std::min(rows, stood_on / step), 1, s.out_height);
  return {rows, std::min({sampled, 8 * step * rows, s.height})};
}

// The output rows in bands; as one, which may read the whole map, where a band would read more of it than it may.
template <typename T>
std::vector<Band> cut_bands(const ConvShape& s, const T* offset, const BandLimits& limits) {
  std::vector<Band> of_rows(s.out_height);
  torch::stable::parallel_for(0, s.out_height, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) of_rows[row] = sampled_rows(s, offset, row);
  });
  std::vector<Band> bands;
  for (int64_t first = 0; first < s.out_height; first += limits.rows) {
    Band band{first, std::min(first + limits.rows, s.out_height), s.height, 0};
    for (int64_t row = band.first; row < band.last; ++row) {
      band.top = std::min(band.top, of_rows[row].top);
      band.bottom = std::max(band.bottom, of_rows[row].bottom);
    }
    if (band.bottom < band.top) band.top = band.bottom = 0;  // nothing of the map is read
    if (band.map_rows() > limits.map_rows) return {whole_picture(s)};
    bands.push_back(band);
  }
  if (bands.size() == 1) return {whole_picture(s)};
  return bands;
}

inline int64_t most_map_rows(const std::vector<Band>& bands) {
  int64_t rows = 0;
  for (const Band& band : bands) rows = std::max(rows, band.map_rows());
  return rows;
}

}  // namespace d2_deform::cpu
