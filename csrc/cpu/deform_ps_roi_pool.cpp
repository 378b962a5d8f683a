// Deformable position-sensitive RoI pooling on the CPU, plane by plane: classes have their own offsets, so each reads a
// small patch of its own plane.
//
// A thread owns the planes of an offset group for some positions of the grid, and with them the gradients of the offsets
// that move their bins, so that nothing is added to from two sides. A plane stays in its cache while all boxes pool from it.
#include <cmath>
#include <tuple>
#include <type_traits>

#include "pack_kernels.h"
#include "pages.h"
#include "ps_rows.h"
#include "ps_runs.h"
#include "roi_pool.h"
#include "rows.h"

namespace d2_deform::cpu {
namespace {

constexpr int64_t kPlanes = 64;           // of a run, at most
constexpr int64_t kPlaneBytes = 3 << 20;  // of those, at most, unless a single one has more
constexpr int64_t kBlockCells = 16;
constexpr int64_t kTileBins = 512;
constexpr int64_t kTileBytes = 1 << 18;  // one value for each of its bins and boxes

// The boxes of every picture: in packs, alike ones together, and one by one those that are too large for a pack.
template <typename T>
struct Boxes {
  std::vector<RoI<T>> roi;
  std::vector<Pack<T>> packs;
  std::vector<int64_t> place;  // which box lies in each place of the packs; -1: none
  std::vector<int64_t> large;
  std::vector<int64_t> unknown;                  // those of no picture
  std::vector<int64_t> first_pack, first_large;  // of every picture, and where the last one's end

  Boxes(const PoolShape& s, const RoIRule& rule, const T* rois);
};

template <typename T>
Boxes<T>::Boxes(const PoolShape& s, const RoIRule& rule, const T* rois) {
  const bool any_pack = rule.samples <= kPackSamples && std::max(s.height, s.width) < 1 << 30;
  struct Entry {
    int64_t batch;
    bool large;
    T cells_y, cells_x;
    int64_t index;
  };
  std::vector<Entry> entries;
  for (int64_t r = 0; r < s.rois; ++r) {
    roi.push_back(make_roi(rois + 5 * r, s.batch, rule));
    if (roi[r].batch < 0) {
      unknown.push_back(r);
      continue;
    }
    const T cells_y = cells_of_bin(roi[r].height, s.pooled_h, s.height, rule);
    const T cells_x = cells_of_bin(roi[r].width, s.pooled_w, s.width, rule);
    const bool packed = any_pack && cells_y <= T(kPackCells) && cells_x <= T(kPackCells);
    entries.push_back({roi[r].batch, !packed, cells_y, cells_x, r});
  }
  std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) {
    return std::tie(a.batch, a.large, a.cells_y, a.cells_x, a.index) <
           std::tie(b.batch, b.large, b.cells_y, b.cells_x, b.index);
  });
  auto entry = entries.begin();
  for (int64_t n = 0; n < s.batch; ++n) {
    first_pack.push_back(static_cast<int64_t>(packs.size()));
    first_large.push_back(static_cast<int64_t>(large.size()));
    for (; entry != entries.end() && entry->batch == n && !entry->large; ++entry) {
      if (place.size() == packs.size() * kPackBoxes) {
        packs.emplace_back();
        for (PackAxis<T>* axis : {&packs.back().y, &packs.back().x}) {
          std::fill_n(axis->start, kPackBoxes, T(NAN));
          std::fill_n(axis->length, kPackBoxes, T(NAN));
          std::fill_n(axis->bin_length, kPackBoxes, T(NAN));
          std::fill_n(axis->step, kPackBoxes, T(NAN));
        }
      }
      const int64_t i = static_cast<int64_t>(place.size()) % kPackBoxes;
      const auto set = [&](PackAxis<T>& axis, T start, T length, int64_t bins, T cells) {
        axis.cells = std::max(axis.cells, static_cast<int64_t>(cells));
        axis.start[i] = start;
        axis.length[i] = length;
        axis.bin_length[i] = length / static_cast<T>(bins);
        axis.step[i] = axis.bin_length[i] / static_cast<T>(rule.samples);
      };
      const RoI<T>& box = roi[entry->index];
      set(packs.back().y, box.y, box.height, s.pooled_h, entry->cells_y);
      set(packs.back().x, box.x, box.width, s.pooled_w, entry->cells_x);
      place.push_back(entry->index);
    }
    place.resize(packs.size() * kPackBoxes, -1);
    for (; entry != entries.end() && entry->batch == n; ++entry) large.push_back(entry->index);
  }
  first_pack.push_back(static_cast<int64_t>(packs.size()));
  first_large.push_back(static_cast<int64_t>(large.size()));
}

// Of a run.
template <typename T>
int64_t planes_at_once(const PoolShape& s) {
  const int64_t fitting = kPlaneBytes / (s.cells() * static_cast<int64_t>(sizeof(T)));
  return std::max<int64_t>(1, std::min(kPlanes, fitting));
}

// Some planes of one picture as type T: where they lie, or laid out one after the other.
template <typename S, typename T>
class Planes {
 public:
  explicit Planes(const PoolShape& s) : shape_(s) {}

  // Whether the kernels can work on the map itself.
  static bool in_place(const Picture<S>& map) {
    return std::is_same_v<S, T> && map.has_planes() && map.width >= kRowCells;
  }

  void read(const Picture<S>& map) {
    point_at(map);
    if (in_place(map)) return;
    const int64_t size = size_;
    T* data = data_;
    if constexpr (std::is_same_v<S, T>) {
      if (map.has_rows()) {
        for_each_block([&](int64_t cell, int64_t cells) {
          const T* rows = map.data + cell * map.column_stride;
          kernels<T>().transpose(cells, map.channels, rows, map.column_stride, data + cell, size);
        });
        return;
      }
    }
    for_each_element(map, 0, shape_.cells(), [=](int64_t cell, int64_t c, const S& element) {
      data[c * size + cell] = static_cast<T>(element);
    });
  }

  void zero(const Picture<S>& map) {
    point_at(map);
    for (int64_t c = 0; c < map.channels; ++c) std::fill_n(data_ + c * size_, shape_.cells(), T(0));
  }

  void write(const Picture<S>& map) const {
    if (in_place(map)) return;
    const int64_t size = size_;
    const T* data = data_;
    if constexpr (std::is_same_v<S, T>) {
      if (map.has_rows()) {
        for_each_block([&](int64_t cell, int64_t cells) {
          T* rows = map.data + cell * map.column_stride;
          kernels<T>().transpose(map.channels, cells, data + cell, size, rows, map.column_stride);
        });
        return;
      }
    }
    for_each_element(map, 0, shape_.cells(), [=](int64_t cell, int64_t c, S& element) {
      element = static_cast<S>(data[c * size + cell]);
    });
  }

  // Plane i + 1, or null after the last one.
  const T* next(int64_t i) const { return i + 1 < count_ ? plane(i + 1) : nullptr; }

  T* plane(int64_t i) const { return data_ + i * size_; }

 private:
  // Calls f(first cell, cells) for all cells of a map, as many at a time as a processor keeps addresses of pages: the rows of
  // a channels-last map with many classes lie on pages of their own, each of them to be visited once.
  template <typename F>
  void for_each_block(const F& f) const {
    const int64_t blocks = std::max<int64_t>(1, shape_.cells() / kBlockCells);
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t first = i * shape_.cells() / blocks;
      f(first, (i + 1) * shape_.cells() / blocks - first);
    }
  }

  void point_at(const Picture<S>& map) {
    count_ = map.channels;
    if (in_place(map)) {
      data_ = reinterpret_cast<T*>(map.data);
      size_ = map.channel_stride;
      return;
    }
    size_ = shape_.cells() + kRowCells;
    if (!room_ || room_->size() < map.channels * size_) room_.emplace(map.channels * size_);
    data_ = room_->data();
  }

  const PoolShape& shape_;
  std::optional<Buffer<T>> room_;
  T* data_ = nullptr;
  int64_t count_ = 0;
  int64_t size_ = 0;  // elements from one plane to the next
};

// Some bins and packs, whose values lie as (packs, bins, kPackBoxes) where the kernels read and write them.
struct Tile {
  int64_t first_bin, bins;  // of the run's
  int64_t first_pack, packs;

  int64_t size() const { return packs * bins * kPackBoxes; }
};

// Calls f(tile) for tiles that cover all bins of a run and all packs of picture n.
template <typename T, typename F>
void for_each_tile(const Boxes<T>& boxes, const Run& run, int64_t n, const F& f) {
  const int64_t all = static_cast<int64_t>(run.bins.size());
  for (int64_t first = 0; first < all; first += kTileBins) {
    const int64_t bins = std::min(kTileBins, all - first);
    const int64_t pack_bytes = bins * kPackBoxes * static_cast<int64_t>(sizeof(T));
    const int64_t most = std::max<int64_t>(1, kTileBytes / pack_bytes);
    for (int64_t q = boxes.first_pack[n]; q < boxes.first_pack[n + 1]; q += most) {
      f(Tile{first, bins, q, std::min(most, boxes.first_pack[n + 1] - q)});
    }
  }
}

// Whether the elements follow each other.
inline bool consecutive(const int64_t* element, int64_t count) {
  for (int64_t j = 1; j < count; ++j) {
    if (element[j] != element[0] + j) return false;
  }
  return true;
}

// Begins to bring what the boxes of a pack have of some bins into the cache: rows of different boxes lie on different pages.
template <bool kWrite, typename T, typename F>
void fetch_rows(
    const Boxes<T>& boxes, int64_t pack, const int64_t* element, int64_t bins, const F& row) {
  if (pack >= static_cast<int64_t>(boxes.packs.size())) return;
  const int64_t* place = boxes.place.data() + pack * kPackBoxes;
  for (int64_t i = 0; i < kPackBoxes && place[i] >= 0; ++i) {
    const auto* p = row(place[i]);
    constexpr int64_t kLine = 64 / sizeof(*p);
    for (int64_t j = element[0]; j < element[bins - 1]; j += kLine)
      __builtin_prefetch(p + j, kWrite);
    __builtin_prefetch(p + element[bins - 1], kWrite);
  }
}

// values = source(box)[element[bin]] for the bins and boxes of a tile; anything where there is no box.
template <typename S, typename T, typename F>
void load_tile(
    const Boxes<T>& boxes,
    const Tile& tile,
    const int64_t* element,
    const F& source,
    std::vector<T>& values) {
  values.resize(std::max<size_t>(values.size(), tile.size()));
  const bool dense = consecutive(element, tile.bins);
  Buffer<T> rows(kPackBoxes * tile.bins);
  for (int64_t q = 0; q < tile.packs; ++q) {
    if (dense) fetch_rows<false>(boxes, tile.first_pack + q + 1, element, tile.bins, source);
    const int64_t* place = boxes.place.data() + (tile.first_pack + q) * kPackBoxes;
    for (int64_t i = 0; i < kPackBoxes && place[i] >= 0; ++i) {
      const S* from = source(place[i]);
      T* row = rows.data() + i * tile.bins;
      if (dense) {
        for (int64_t j = 0; j < tile.bins; ++j) row[j] = static_cast<T>(from[element[0] + j]);
      } else {
        for (int64_t j = 0; j < tile.bins; ++j) row[j] = static_cast<T>(from[element[j]]);
      }
    }
    T* to = values.data() + q * tile.bins * kPackBoxes;
    kernels<T>().transpose(kPackBoxes, tile.bins, rows.data(), tile.bins, to, kPackBoxes);
  }
}

// The way back: target(box)[element[bin]] = value, or added to it.
template <typename S, typename T, typename F>
void store_tile(
    const Boxes<T>& boxes,
    const Tile& tile,
    const int64_t* element,
    const std::vector<T>& values,
    bool add,
    const F& target) {
  const bool dense = !add && consecutive(element, tile.bins);
  Buffer<T> rows(kPackBoxes * tile.bins);
  for (int64_t q = 0; q < tile.packs; ++q) {
    if (dense) fetch_rows<true>(boxes, tile.first_pack + q + 1, element, tile.bins, target);
    const T* from = values.data() + q * tile.bins * kPackBoxes;
    kernels<T>().transpose(tile.bins, kPackBoxes, from, kPackBoxes, rows.data(), tile.bins);
    const int64_t* place = boxes.place.data() + (tile.first_pack + q) * kPackBoxes;
    for (int64_t i = 0; i < kPackBoxes && place[i] >= 0; ++i) {
      S* to = target(place[i]);
      const T* row = rows.data() + i * tile.bins;
      if (dense) {
        for (int64_t j = 0; j < tile.bins; ++j) to[element[0] + j] = static_cast<S>(row[j]);
        continue;
      }
      for (int64_t j = 0; j < tile.bins; ++j) {
        S& out = to[element[j]];
        out = static_cast<S>(add ? static_cast<T>(out) + row[j] : row[j]);
      }
    }
  }
}

template <typename T>
PackBin<T> pack_bin(const PoolShape& s, const RoIRule& rule, int64_t bin, const T* next) {
  return {
      bin / s.pooled_w,
      bin % s.pooled_w,
      rule.samples,
      static_cast<T>(rule.gamma),
      rule.aligned,
      s.height,
      s.width,
      next};
}

// Where a run's bins lie in a row of bins.
std::vector<int64_t> elements(const Run& run) {
  std::vector<int64_t> element;
  for (const ServedBin& served : run.bins) element.push_back(served.bin);
  return element;
}

template <typename S, typename T>
void forward(
    const PoolShape& s,
    const RoIRule& rule,
    const Tensor& input,  // (N, C, H, W)
    const Boxes<T>& boxes,
    const T* offset,
    S* output) {  // (R, out_channels, Ph, Pw)
  const PackKernels<T>& kernel = pack_kernels<T>();
  const int64_t grid = s.group_size * s.group_size;
  const auto out_row = [&](int64_t r, int64_t c) {
    return output + (r * s.out_channels + c) * s.bins();
  };
  for (int64_t r : boxes.unknown) std::fill_n(out_row(r, 0), s.out_channels * s.bins(), S(0));
  for_each_run(s, planes_at_once<T>(s), [&] {
    return [&,
            planes = Planes<S, T>(s),
            cells = BinCells<T>(s, rule),
            shift_x = std::vector<T>(),
            shift_y = std::vector<T>(),
            values = std::vector<T>()](const Run& run) mutable {
      const std::vector<int64_t> element = elements(run);
      const auto pool_channel = [&](int64_t c, int64_t n) {
        planes.read(picture<S>(input, n).slice(c * grid + run.begin, run.positions()));
        for_each_tile(boxes, run, n, [&](const Tile& tile) {
          const int64_t* bins = element.data() + tile.first_bin;
          if (offset) {
            const auto row = [&](int64_t r) { return offset + s.offset_row(r, run.k); };
            load_tile<T>(boxes, tile, bins, row, shift_x);
            load_tile<T>(boxes, tile, bins, [&](int64_t r) { return row(r) + s.bins(); }, shift_y);
          }
          values.resize(std::max<size_t>(values.size(), tile.size()));
          for (int64_t j = 0; j < tile.bins; ++j) {
            const int64_t at = j * kPackBoxes;
            const int64_t plane = run.bins[tile.first_bin + j].position;
            kernel.forward(
                pack_bin<T>(s, rule, bins[j], planes.next(plane)),
                tile.packs,
                boxes.packs.data() + tile.first_pack,
                tile.bins * kPackBoxes,
                offset ? shift_x.data() + at : nullptr,
                offset ? shift_y.data() + at : nullptr,
                planes.plane(plane),
                values.data() + at);
          }
          store_tile<S>(boxes, tile, bins, values, false, [&](int64_t r) { return out_row(r, c); });
        });
        for (int64_t i = boxes.first_large[n]; i < boxes.first_large[n + 1]; ++i) {
          const int64_t r = boxes.large[i];
          for (const ServedBin& served : run.bins) {
            const T* shift = offset ? offset + s.offset_row(r, run.k) + served.bin : nullptr;
            cells.find(s, boxes.roi[r], rule, served.bin, shift);
            cells.multiply(s, 0, 1);
            const T* plane = planes.plane(served.position);
            T sum = 0;
            for (int64_t j = 0; j < cells.size(); ++j) sum += cells.weight[j] * plane[cells.row[j]];
            out_row(r, c)[served.bin] = static_cast<S>(sum);
          }
        }
      };
      for (int64_t c = run.k * s.group_channels(); c < (run.k + 1) * s.group_channels(); ++c) {
        for (int64_t n = 0; n < s.batch; ++n) {
          if (boxes.first_pack[n] < boxes.first_pack[n + 1] ||
              boxes.first_large[n] < boxes.first_large[n + 1]) {
            pool_channel(c, n);
          }
        }
      }
    };
  });
}

template <typename S, typename T>
void backward(
    const PoolShape& s,
    const RoIRule& rule,
    const Tensor& grad_output,  // (R, out_channels, Ph, Pw)
    const Tensor& input,        // (N, C, H, W)
    const Boxes<T>& boxes,
    const T* offset,
    const Tensor* grad_input,  // (N, C, H, W); or null
    T* grad_offset) {          // (R, 2K, Ph, Pw); or null
  const PackKernels<T>& kernel = pack_kernels<T>();
  const int64_t grid = s.group_size * s.group_size;
  const S* gradient = static_cast<const S*>(grad_output.data_ptr());
  const auto gradient_element = [&](int64_t bin) {
    return bin / s.pooled_w * grad_output.stride(2) + bin % s.pooled_w * grad_output.stride(3);
  };
  if (grad_offset) {
    for (int64_t r : boxes.unknown) {
      std::fill_n(grad_offset + s.offset_row(r, 0), 2 * s.offset_groups * s.bins(), T(0));
    }
  }
  for_each_run(s, planes_at_once<T>(s), [&] {
    return [&,
            planes = Planes<S, T>(s),
            grad_planes = Planes<S, T>(s),
            cells = BinCells<T>(s, rule),
            shift_x = std::vector<T>(),
            shift_y = std::vector<T>(),
            grad_x = std::vector<T>(),
            grad_y = std::vector<T>(),
            values = std::vector<T>()](const Run& run) mutable {
      const std::vector<int64_t> element = elements(run);
      std::vector<int64_t> of_gradient;
      for (int64_t bin : element) of_gradient.push_back(gradient_element(bin));
      const auto offset_row = [&](int64_t r) { return s.offset_row(r, run.k); };

      const auto pool_channel = [&](int64_t c, int64_t n) {
        const bool add = c > run.k * s.group_channels();
        const auto gradient_row = [&](int64_t r) {
          return gradient + r * grad_output.stride(0) + c * grad_output.stride(1);
        };
        if (grad_offset) {
          planes.read(picture<S>(input, n).slice(c * grid + run.begin, run.positions()));
        }
        for_each_tile(boxes, run, n, [&](const Tile& tile) {
          const int64_t* bins = element.data() + tile.first_bin;
          if (offset) {
            load_tile<T>(
                boxes, tile, bins, [&](int64_t r) { return offset + offset_row(r); }, shift_x);
            load_tile<T>(
                boxes,
                tile,
                bins,
                [&](int64_t r) { return offset + offset_row(r) + s.bins(); },
                shift_y);
          }
          load_tile<S>(boxes, tile, of_gradient.data() + tile.first_bin, gradient_row, values);
          if (grad_offset) {
            grad_x.resize(std::max<size_t>(grad_x.size(), tile.size()));
            grad_y.resize(grad_x.size());
          }
          for (int64_t j = 0; j < tile.bins; ++j) {
            const int64_t at = j * kPackBoxes;
            const int64_t plane = run.bins[tile.first_bin + j].position;
            kernel.backward(
                pack_bin<T>(s, rule, bins[j], grad_offset ? planes.next(plane) : nullptr),
                tile.packs,
                boxes.packs.data() + tile.first_pack,
                tile.bins * kPackBoxes,
                offset ? shift_x.data() + at : nullptr,
                offset ? shift_y.data() + at : nullptr,
                values.data() + at,
                grad_offset ? planes.plane(plane) : nullptr,
                grad_input ? grad_planes.plane(plane) : nullptr,
                grad_offset ? grad_x.data() + at : nullptr,
                grad_offset ? grad_y.data() + at : nullptr);
          }
          if (grad_offset) {
            store_tile<T>(boxes, tile, bins, grad_x, add, [&](int64_t r) {
              return grad_offset + offset_row(r);
            });
            store_tile<T>(boxes, tile, bins, grad_y, add, [&](int64_t r) {
              return grad_offset + offset_row(r) + s.bins();
            });
          }
        });
        for (int64_t i = boxes.first_large[n]; i < boxes.first_large[n + 1]; ++i) {
          const int64_t r = boxes.large[i];
          for (const ServedBin& served : run.bins) {
            const T* shift = offset ? offset + offset_row(r) + served.bin : nullptr;
            cells.find(s, boxes.roi[r], rule, served.bin, shift);
            cells.multiply(s, 0, 1);
            const T value = static_cast<T>(gradient_row(r)[gradient_element(served.bin)]);
            if (grad_input) {
              T* grad_plane = grad_planes.plane(served.position);
              for (int64_t j = 0; j < cells.size(); ++j) {
                grad_plane[cells.row[j]] += cells.weight[j] * value;
              }
            }
            if (grad_offset) {
              const T* plane = planes.plane(served.position);
              for (int64_t j = 0; j < cells.size(); ++j) {
                cells.dots[j] = value * plane[cells.row[j]];
              }
              T dx, dy;
              cells.derivatives(boxes.roi[r], rule, &dx, &dy);
              T* out = grad_offset + offset_row(r) + served.bin;
              out[0] = add ? out[0] + dx : dx;
              out[s.bins()] = add ? out[s.bins()] + dy : dy;
            }
          }
        }
      };
      for (int64_t c = run.k * s.group_channels(); c < (run.k + 1) * s.group_channels(); ++c) {
        for (int64_t n = 0; n < s.batch; ++n) {
          if (!grad_input) {
            pool_channel(c, n);
            continue;
          }
          const Picture<S> grad_maps =
              picture<S>(*grad_input, n).slice(c * grid + run.begin, run.positions());
          grad_planes.zero(grad_maps);
          pool_channel(c, n);
          grad_planes.write(grad_maps);
        }
      }
    };
  });
}

// (R, C, Ph, Pw) -> (R, Ph, Pw, C) in place.
template <typename S>
void put_channels_last(const PoolShape& s, S* output) {
  const int64_t size = s.out_channels * s.bins();
  torch::stable::parallel_for(0, s.rois, 1, [&](int64_t begin, int64_t end) {
    std::vector<S> box(size);
    for (int64_t r = begin; r < end; ++r) {
      std::copy_n(output + r * size, size, box.data());
      for (int64_t bin = 0; bin < s.bins(); ++bin) {
        for (int64_t c = 0; c < s.out_channels; ++c) {
          output[r * size + bin * s.out_channels + c] = box[c * s.bins() + bin];
        }
      }
    }
  });
}

Tensor deform_ps_roi_pool(
    const Tensor& input,
    const Tensor& rois,
    const std::optional<Tensor>& offset,
    int64_t pooled_h,
    int64_t pooled_w,
    int64_t group_size,
    double spatial_scale,
    int64_t sampling_ratio,
    double gamma,
    bool aligned) {
  const PoolShape s =
      pool_shape(input, rois, offset, pooled_h, pooled_w, group_size, sampling_ratio);
  const RoIRule rule{spatial_scale, gamma, sampling_ratio, aligned};
  const MemoryFormat format = suggested_format(input);
  const std::vector<int64_t> sizes{s.rois, s.out_channels, pooled_h, pooled_w};
  const Tensor output = in_large_pages(empty_as(input, sizes, input.scalar_type(), format));
  if (s.rois == 0) return output;
  dispatch_types(input.scalar_type(), [&](auto types) {
    using S = typename decltype(types)::Storage;
    using T = typename decltype(types)::Compute;
    const Tensor rows = dense<T>(rois);
    const std::optional<Tensor> shifts = dense_or_none<T>(offset);
    const T* corners = static_cast<const T*>(rows.data_ptr());
    const bool last = format == MemoryFormat::ChannelsLast;
    const RowLayout layout(s, last, s.height, sizeof(T), kForwardRowBytes);
    if (layout.positions > 0) {
      forward_rows<S>(s, rule, layout, input, corners, data_or_null<T>(shifts), output);
      return;
    }
    const Boxes<T> boxes(s, rule, corners);
    S* out = static_cast<S*>(output.data_ptr());
    forward<S, T>(s, rule, input, boxes, data_or_null<T>(shifts), out);
    if (format == MemoryFormat::ChannelsLast) put_channels_last(s, out);
  });
  return output;
}

std::tuple<Tensor, Tensor> deform_ps_roi_pool_backward(
    const Tensor& grad_output,
    const Tensor& input,
    const Tensor& rois,
    const std::optional<Tensor>& offset,
    int64_t group_size,
    double spatial_scale,
    int64_t sampling_ratio,
    double gamma,
    bool aligned,
    bool need_input,
    bool need_offset,
    bool /*deterministic: always*/) {
  const PoolShape s = pool_shape_of_gradient(
      grad_output, input, rois, offset, group_size, sampling_ratio, need_offset);
  const RoIRule rule{spatial_scale, gamma, sampling_ratio, aligned};
  const MemoryFormat format = suggested_format(input);
  return dispatch_types(input.scalar_type(), [&](auto types) {
    using S = typename decltype(types)::Storage;
    using T = typename decltype(types)::Compute;
    const Tensor rows = dense<T>(rois);
    const std::optional<Tensor> shifts = dense_or_none<T>(offset);
    const T* corners = static_cast<const T*>(rows.data_ptr());
    const std::vector<int64_t> sizes{s.batch, s.in_channels, s.height, s.width};
    const Tensor grad_input =
        need_input ? in_large_pages(empty_as(input, sizes, input.scalar_type(), format))
                   : not_asked(input);
    const Tensor grad_offset =
        need_offset ? torch::stable::new_empty(*shifts, shifts->sizes()) : not_asked(rois);
    const Tensor* to_input = need_input ? &grad_input : nullptr;
    T* to_offset = need_offset ? static_cast<T*>(grad_offset.data_ptr()) : nullptr;
    if (!need_input && !need_offset) return std::make_tuple(grad_input, grad_offset);
    const bool last = format == MemoryFormat::ChannelsLast;
    const int64_t lines = last ? most_lines(s, rule, corners) : s.height;
    const RowLayout layout(s, last, lines, sizeof(T), kBackwardRowBytes);
    if (layout.positions > 0) {
      backward_rows<S>(
          s,
          rule,
          layout,
          grad_output,
          input,
          corners,
          data_or_null<T>(shifts),
          to_input,
          to_offset);
    } else {
      const Boxes<T> boxes(s, rule, corners);
      backward<S, T>(
          s, rule, grad_output, input, boxes, data_or_null<T>(shifts), to_input, to_offset);
    }
    return std::make_tuple(
        grad_input,
        need_offset ? torch::stable::to(grad_offset, offset->scalar_type()) : grad_offset);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(d2_deform, CPU, m) {
  m.impl("deform_ps_roi_pool", TORCH_BOX(&deform_ps_roi_pool));
  m.impl("deform_ps_roi_pool_backward", TORCH_BOX(&deform_ps_roi_pool_backward));
}

}  // namespace d2_deform::cpu
