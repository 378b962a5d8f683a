// How threads share position-sensitive pooling: each owns some positions of the grid, for one offset group, and with them
// the planes of the map that lie there and the offsets that move their bins. So nothing is added to from two sides.
#pragma once

#include <algorithm>
#include <vector>

#include "../pool_shape.h"
#include "../roi_geometry.h"

namespace d2_deform::cpu {

// A bin and, counted from the first of its run, the position whose planes it reads.
struct ServedBin {
  int64_t position, bin;
};

// Neighbouring positions [begin, end) of the grid, for offset group k.
struct Run {
  int64_t k, begin, end;
  std::vector<ServedBin> bins;

  int64_t positions() const { return end - begin; }
};

// Calls f() once in every thread for a function visit(run), which it calls for the thread's runs: of `most` positions at most,
// and as long as each other.
template <typename F>
void for_each_run(const PoolShape& s, int64_t most, const F& f) {
  const int64_t grid = s.group_size * s.group_size;
  std::vector<std::vector<int64_t>> bins(grid);
  for (int64_t bin = 0; bin < s.bins(); ++bin) {
    const int64_t row = group_cell(bin / s.pooled_w, s.pooled_h, s.group_size);
    bins[row * s.group_size + group_cell(bin % s.pooled_w, s.pooled_w, s.group_size)].push_back(
        bin);
  }
  torch::stable::parallel_for(0, s.offset_groups * grid, 1, [&](int64_t first, int64_t last) {
    auto visit = f();
    for (int64_t i = first; i < last;) {
      Run run{i / grid, i % grid, 0, {}};
      const int64_t rest = std::min(grid - run.begin, last - i);
      run.end = run.begin + rest / ((rest + most - 1) / most);
      for (int64_t p = run.begin; p < run.end; ++p) {
        for (int64_t bin : bins[p]) run.bins.push_back({p - run.begin, bin});
      }
      visit(run);
      i += run.positions();
    }
  });
}

}  // namespace d2_deform::cpu
