// The gradient of a map without atomics, bit-reproducible: every cell sums the samples that read it.
//
// A sample reads up to four cells; its key is the number of the first one, top left. The samples of a chunk are sorted by
// key (a stable sort: equal keys stay in the samples' order), and a thread sums, for some channels of one cell, the four
// runs of samples in which the cell is top left, top right, bottom left and bottom right.
//
// A `Source` says what the samples are:
//   KeyGrid grid                                    where samples may lie
//   int64_t key(int64_t sample)                     grid.count() if it reads nothing
//   bool weight(int64_t sample, int a, int b, T*)   of the cell a rows below and b columns right of the first; false: not read
//   void gradient(int64_t sample, int64_t channel, T (&out)[N])
//   void add(int64_t map, int64_t cell, int64_t channel, const T (&sum)[N])   of the map's own channels
#pragma once

#include "array.h"
#include "aten.h"
#include "divider.h"

namespace d2_deform::cuda {

// Maps that share nothing, each with height x width cells. A first cell may lie `before` rows above and columns left of
// the map: 1 where cells outside the map count as 0, else 0.
struct KeyGrid {
  int64_t maps, height, width, before;

  D2_DEFORM_HOST_DEVICE int64_t rows() const { return height + before; }
  D2_DEFORM_HOST_DEVICE int64_t columns() const { return width + before; }
  D2_DEFORM_HOST_DEVICE int64_t count() const { return maps * rows() * columns(); }
  D2_DEFORM_HOST_DEVICE int64_t key(int64_t map, int64_t row, int64_t column) const {
    return (map * rows() + row + before) * columns() + column + before;
  }
};

template <typename Source>
struct SampleKeys {
  Source source;
  Array<int64_t> keys;

  D2_DEFORM_HOST_DEVICE void operator()(int64_t sample) const { keys[sample] = source.key(sample); }
};

// starts[key]: the first of the sorted keys that is not below `key`.
struct SegmentStarts {
  Array<const int64_t> sorted;
  Array<int64_t> starts;

  D2_DEFORM_HOST_DEVICE void operator()(int64_t key) const {
    int64_t low = 0, high = sorted.size;
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (sorted[middle] < key) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    starts[key] = low;
  }
};

template <typename Source, typename T, int N>
struct InverseGather {
  Source source;
  int64_t channels;  // of one map
  Divider<uint64_t> by_packs, by_width, by_height;
  Array<const int64_t> order;   // samples, sorted by key
  Array<const int64_t> starts;  // for each key

  D2_DEFORM_HOST_DEVICE void operator()(int64_t i) const {
    uint64_t rest = static_cast<uint64_t>(i), pack = rest;
    rest = by_packs.split(pack);
    uint64_t x = rest;
    rest = by_width.split(x);
    uint64_t y = rest;
    const int64_t map = static_cast<int64_t>(by_height.split(y));
    const int64_t channel = static_cast<int64_t>(pack) * N;
    T sum[N] = {};
    for (int corner = 0; corner < 4; ++corner) {
      const int a = corner / 2, b = corner % 2;
      const int64_t row = static_cast<int64_t>(y) - a, column = static_cast<int64_t>(x) - b;
      if (row + source.grid.before < 0 || column + source.grid.before < 0) continue;
      const int64_t key = source.grid.key(map, row, column);
      for (int64_t j = starts[key]; j < starts[key + 1]; ++j) {
        const int64_t sample = order[j];
        T weight, gradient[N];
        if (!source.weight(sample, a, b, &weight)) continue;
        source.gradient(sample, channel, gradient);
        for (int n = 0; n < N; ++n) sum[n] += weight * gradient[n];
      }
    }
    source.add(
        map, static_cast<int64_t>(y) * source.grid.width + static_cast<int64_t>(x), channel, sum);
  }
};

// Adds the gradients of `samples` samples, of maps with `channels` channels each, N at a time. like: a tensor on the device.
template <typename T, int N, typename Source>
void inverse_gather(
    const Launcher& launcher,
    const Source& source,
    int64_t samples,
    int64_t channels,
    const Tensor& like) {
  const Tensor keys = empty_rows(like, {samples}, ScalarType::Long);
  launcher.for_each("SampleKeys", samples, SampleKeys<Source>{source, array_of<int64_t>(keys)});
  const auto [sorted, order] = stable_sort(keys);
  const KeyGrid& grid = source.grid;
  const Tensor starts = empty_rows(like, {grid.count() + 1}, ScalarType::Long);
  launcher.for_each(
      "SegmentStarts",
      grid.count() + 1,
      SegmentStarts{array_of<const int64_t>(sorted), array_of<int64_t>(starts)});
  launcher.for_each(
      "InverseGather",
      grid.maps * grid.height * grid.width * (channels / N),
      InverseGather<Source, T, N>{
          source,
          channels,
          Divider<uint64_t>(channels / N),
          Divider<uint64_t>(grid.width),
          Divider<uint64_t>(grid.height),
          array_of<const int64_t>(order),
          array_of<const int64_t>(starts)});
}

}  // namespace d2_deform::cuda
