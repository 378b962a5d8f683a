// The samples of deformable (PS-)RoI pooling one by one, for gradients without atomics (inverse_gather.h).
#pragma once

#include "bins.h"
#include "inverse_gather.h"

namespace d2_deform::cuda {

// Samples sorted at a time; a sample takes 32 bytes.
constexpr int64_t kMostSortedSamples = 1 << 21;

template <typename T>
struct BinSample {
  int64_t image;  // -1: it reads nothing
  int64_t offset_group;
  AxisSample<T> y, x;
  T scale;
};

// Samples are numbered [box][bin][offset group][sample along y][along x]. Chunks hold whole bins.
template <typename T>
struct BinSamples {
  Bins<T> bins;
  KeyGrid grid;
  int64_t first_bin;  // of the chunk, as BinNumbers counts them
  BinNumbers numbers;
  Divider<uint64_t> by_samples;

  BinSamples(const Bins<T>& bins, const KeyGrid& grid, int64_t first_bin)
      : bins(bins),
        grid(grid),
        first_bin(first_bin),
        numbers(bins.shape),
        by_samples(bins.rule.samples) {}

  D2_DEFORM_HOST_DEVICE BinPlace bin_place(int64_t number) const {
    const uint64_t row = by_samples.quotient(static_cast<uint64_t>(number));
    return numbers.place(first_bin + static_cast<int64_t>(by_samples.quotient(row)));
  }

  D2_DEFORM_HOST_DEVICE BinSample<T> sample(int64_t number) const {
    uint64_t j = static_cast<uint64_t>(number);
    uint64_t i = by_samples.split(j);
    by_samples.split(i);
    const BinPlace p = bin_place(number);
    const Bin<T> bin = bins.at(p.roi, p.offset_group, p.bin);
    BinSample<T> found{
        bin.image,
        p.offset_group,
        axis_sample(bin.y, static_cast<int64_t>(i)),
        axis_sample(bin.x, static_cast<int64_t>(j)),
        bin.scale};
    if (!found.y.inside || !found.x.inside) found.image = -1;
    return found;
  }

  // The sample's key where it reads map `map`.
  D2_DEFORM_HOST_DEVICE int64_t key_in(int64_t map, const BinSample<T>& sample) const {
    return sample.image < 0 ? grid.count() : grid.key(map, sample.y.cell, sample.x.cell);
  }

  D2_DEFORM_HOST_DEVICE bool weight(int64_t number, int a, int b, T* weight) const {
    const BinSample<T> s = sample(number);
    if ((a == 1 && s.y.still) || (b == 1 && s.x.still)) return false;
    *weight = (a == 1 ? s.y.fraction : T(1) - s.y.fraction) *
              (b == 1 ? s.x.fraction : T(1) - s.x.fraction) * s.scale;
    return true;
  }
};

// Calls f(first bin, number of samples) for chunks of whole bins.
template <typename F>
void for_each_sample_chunk(const PoolShape& s, const RoIRule& rule, const F& f) {
  const int64_t bins = s.rois * s.bins() * s.offset_groups;
  const int64_t each = rule.samples * rule.samples;
  const int64_t chunk = std::max<int64_t>(1, kMostSortedSamples / each);
  for (int64_t first = 0; first < bins; first += chunk) {
    f(first, std::min(chunk, bins - first) * each);
  }
}

}  // namespace d2_deform::cuda
