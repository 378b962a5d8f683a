// The columns of a whole batch may be gigabytes; those of a chunk of output pixels stay in the level-2 cache.
#pragma once

#include <algorithm>
#include <cstdlib>

#include "columns.h"

namespace d2_deform::cuda {

// Of the columns: less than the level-2 cache of an A100 (40 MB) and an H100 (50 MB), which must hold the map's rows, too.
constexpr int64_t kWorkspaceBytes = 32 << 20;
// A float32 sum over more pixels loses digits; the chunks' sums are added afterwards.
constexpr int64_t kMostPixels = 1 << 15;

// The workspace in bytes; the environment variable D2_DEFORM_CUDA_WORKSPACE overrides it, for measurements and tests.
inline int64_t workspace_bytes() {
  const char* given = std::getenv("D2_DEFORM_CUDA_WORKSPACE");
  const int64_t bytes = given ? std::atoll(given) : kWorkspaceBytes;
  return std::clamp<int64_t>(bytes, 1, int64_t(1) << 30);
}

// How many output pixels each chunk has, the last may have fewer.
inline int64_t chunk_pixels(const ConvShape& s, const ColumnLayout& layout, int64_t element_bytes) {
  const int64_t row = layout.row_size();
  STD_TORCH_CHECK(row < int64_t(1) << 30, "weight: expected C * kh * kw below 2**30");
  const int64_t total = s.batch * s.pixels();
  if (total == 0) return 0;
  const int64_t room =
      std::clamp<int64_t>(workspace_bytes() / (row * element_bytes), 1, kMostPixels);
  const int64_t chunks = (total + room - 1) / room;
  return (total + chunks - 1) / chunks;
}

// Calls f(first pixel, number of pixels) chunk by chunk.
template <typename F>
void for_each_chunk(int64_t total, int64_t chunk, const F& f) {
  for (int64_t first = 0; first < total; first += chunk) f(first, std::min(chunk, total - first));
}

template <typename S>
bool channels_fit_packs(const ConvShape& s) {
  const int64_t group = s.depthwise() ? s.in_channels : s.group_in();
  return group % pack_size<S>() == 0 && s.deform_channels() % pack_size<S>() == 0;
}

}  // namespace d2_deform::cuda
