// Position-sensitive pooling of classes that share their offsets: a bin samples the same cells for all of them, so the planes
// of one position are laid out as rows of classes, and a bin is a weighted sum of rows, as in RoI pooling.
#pragma once

#include "ps_runs.h"
#include "roi_pool.h"
#include "rows.h"

namespace d2_deform::cpu {

constexpr int64_t kSharingClasses = 8;    // fewer are pooled plane by plane
constexpr int64_t kRowClasses = 32;       // of a row, at most
constexpr int64_t kRowBytes = 4'000'000;  // of a run's rows, at most

// How classes that share their offsets are laid out: rows of `width`, for `positions` positions at a time; 0: not at all, as
// they are too few or the map is too large.
struct RowLayout {
  int64_t width, positions;

  RowLayout(const PoolShape& s, bool channels_last, int64_t element_bytes) {
    // Whole vectors of every instruction set.
    width = std::min(kRowClasses, round_up(s.group_channels(), 16));
    positions = 0;
    if (s.group_channels() < kSharingClasses) return;
    int64_t fitting = kRowBytes / (s.cells() * width * element_bytes);
    if (fitting == 0) {
      width = 16;
      fitting = kRowBytes / (s.cells() * width * element_bytes);
    }
    // Neighbours in a cache line of a channels-last map are read together.
    positions = std::min<int64_t>(fitting, channels_last ? 32 : 1);
  }
};

// Classes [first, first + count) of a run's offset group.
struct Classes {
  int64_t first, count;
};

// Calls f(classes) for all classes of a run's offset group, in their order.
template <typename F>
void for_each_classes(const PoolShape& s, const Run& run, int64_t width, const F& f) {
  const int64_t end = (run.k + 1) * s.group_channels();
  for (int64_t c = run.k * s.group_channels(); c < end; c += width) {
    f(Classes{c, std::min(width, end - c)});
  }
}

// One picture's rows for a run and some classes, (position, cell, width) of type T; beyond the classes they hold 0.
template <typename S, typename T>
class ClassRows {
 public:
  ClassRows(const PoolShape& s, const RowLayout& layout)
      : grid_(s.group_size * s.group_size), cells_(s.cells()), width_(layout.width) {}

  void read(const Picture<S>& map, const Run& run, const Classes& classes) {
    make_room(run);
    if (classes.count != written_) room_->fill(T(0));
    written_ = classes.count;
    if (!map.has_rows()) {
      for (int64_t p = 0; p < run.positions(); ++p) {
        load_rows(plane_of_classes(map, run.begin + p, classes), 0, cells_, rows(p), width_);
      }
      return;
    }
    for (int64_t cell = 0; cell < cells_; ++cell) {
      const S* in = map.data + cell * map.column_stride + classes.first * grid_ + run.begin;
      T* out = rows(0) + cell * width_;
      fetch_next(in, cell, map.column_stride, classes, run);
      if constexpr (std::is_same_v<S, T>) {
        kernels<T>().transpose(classes.count, run.positions(), in, grid_, out, cells_ * width_);
      } else {
        for (int64_t c = 0; c < classes.count; ++c) {
          for (int64_t p = 0; p < run.positions(); ++p) {
            out[p * cells_ * width_ + c] = static_cast<T>(in[c * grid_ + p]);
          }
        }
      }
    }
  }

  void zero(const Run& run) {
    make_room(run);
    std::fill_n(room_->data(), run.positions() * cells_ * width_, T(0));
  }

  void write(const Picture<S>& map, const Run& run, const Classes& classes) {
    if (!map.has_rows()) {
      for (int64_t p = 0; p < run.positions(); ++p) {
        store_rows(plane_of_classes(map, run.begin + p, classes), 0, cells_, rows(p), width_);
      }
      return;
    }
    for (int64_t cell = 0; cell < cells_; ++cell) {
      S* out = map.data + cell * map.column_stride + classes.first * grid_ + run.begin;
      const T* in = rows(0) + cell * width_;
      fetch_next(out, cell, map.column_stride, classes, run);
      if constexpr (std::is_same_v<S, T>) {
        kernels<T>().transpose(run.positions(), classes.count, in, cells_ * width_, out, grid_);
      } else {
        for (int64_t c = 0; c < classes.count; ++c) {
          for (int64_t p = 0; p < run.positions(); ++p) {
            out[c * grid_ + p] = static_cast<S>(in[p * cells_ * width_ + c]);
          }
        }
      }
    }
  }

  T* rows(int64_t position) { return room_->data() + position * cells_ * width_; }

 private:
  void make_room(const Run& run) {
    const int64_t size = run.positions() * cells_ * width_;
    if (room_ && room_->size() >= size) return;
    room_.emplace(size);
    written_ = -1;
  }

  // Begins to bring the next cell's elements of a channels-last map into the cache.
  template <typename E>
  void fetch_next(
      E* now, int64_t cell, int64_t stride, const Classes& classes, const Run& run) const {
    if (cell + 1 == cells_) return;
    for (int64_t c = 0; c < classes.count; ++c) {
      E* piece = now + stride + c * grid_;
      __builtin_prefetch(piece, !std::is_const_v<E>);
      __builtin_prefetch(piece + run.positions() - 1, !std::is_const_v<E>);
    }
  }

  // The classes' planes of one position as a picture of their own.
  Picture<S> plane_of_classes(Picture<S> map, int64_t position, const Classes& classes) const {
    map.data += (classes.first * grid_ + position) * map.channel_stride;
    map.channels = classes.count;
    map.channel_stride *= grid_;
    return map;
  }

  int64_t grid_, cells_, width_;
  std::optional<Buffer<T>> room_;
  int64_t written_ = -1;  // classes of the last read()
};

// The classes of one bin, of a tensor (R, out_channels, Ph, Pw).
template <typename S>
S* bin_classes(const Tensor& pooled, const PoolShape& s, int64_t r, int64_t first, int64_t bin) {
  const Picture<S> box = picture<S>(pooled, r).slice(first, 1);
  return box.data + bin / s.pooled_w * box.row_stride + bin % s.pooled_w * box.column_stride;
}

template <typename S, typename T>
void forward_rows(
    const PoolShape& s,
    const RoIRule& rule,
    const RowLayout& layout,
    const Tensor& input,
    const T* rois,
    const T* offset,
    const Tensor& output) {
  const Kernels<T>& kernel = kernels<T>();
  const std::vector<std::vector<int64_t>> boxes = boxes_of_pictures(s, rule, rois);
  for (const int64_t r : boxes[s.batch]) {
    for (int64_t bin = 0; bin < s.bins(); ++bin) {
      S* out = bin_classes<S>(output, s, r, 0, bin);
      for (int64_t c = 0; c < s.out_channels; ++c) out[c * output.stride(1)] = S(0);
    }
  }
  for_each_run(s, layout.positions, [&] {
    return [&,
            maps = ClassRows<S, T>(s, layout),
            cells = BinCells<T>(s, rule),
            values = std::vector<T>(layout.width)](const Run& run) mutable {
      for_each_classes(s, run, layout.width, [&](const Classes& classes) {
        for (int64_t n = 0; n < s.batch; ++n) {
          if (boxes[n].empty()) continue;
          maps.read(picture<S>(input, n), run, classes);
          for (const ServedBin& served : run.bins) {
            for (const int64_t r : boxes[n]) {
              const T* shift = offset ? offset + s.offset_row(r, run.k) + served.bin : nullptr;
              cells.find(s, make_roi(rois + 5 * r, s.batch, rule), rule, served.bin, shift);
              cells.multiply(s, 0, layout.width);
              kernel.weighted_sum(
                  cells.size(),
                  layout.width,
                  maps.rows(served.position),
                  cells.row.data(),
                  cells.weight.data(),
                  values.data());
              S* out = bin_classes<S>(output, s, r, classes.first, served.bin);
              const int64_t stride = output.stride(1);
              for (int64_t c = 0; c < classes.count; ++c) {
                out[c * stride] = static_cast<S>(values[c]);
              }
            }
          }
        }
      });
    };
  });
}

template <typename S, typename T>
void backward_rows(
    const PoolShape& s,
    const RoIRule& rule,
    const RowLayout& layout,
    const Tensor& grad_output,
    const Tensor& input,
    const T* rois,
    const T* offset,
    const Tensor* grad_input,  // or null
    T* grad_offset) {          // (R, 2K, Ph, Pw); or null
  const std::vector<std::vector<int64_t>> boxes = boxes_of_pictures(s, rule, rois);
  if (grad_offset) {
    for (const int64_t r : boxes[s.batch]) {
      std::fill_n(grad_offset + s.offset_row(r, 0), 2 * s.offset_groups * s.bins(), T(0));
    }
  }
  for_each_run(s, layout.positions, [&] {
    return [&,
            maps = ClassRows<S, T>(s, layout),
            grad_maps = ClassRows<S, T>(s, layout),
            cells = BinCells<T>(s, rule),
            gradient = std::vector<T>(layout.width)](const Run& run) mutable {
      const auto pool_bin = [&](const Classes& classes, const ServedBin& served, int64_t r) {
        const RoI<T> roi = make_roi(rois + 5 * r, s.batch, rule);
        const T* shift = offset ? offset + s.offset_row(r, run.k) + served.bin : nullptr;
        cells.find(s, roi, rule, served.bin, shift);
        cells.multiply(s, 0, layout.width);
        const S* in = bin_classes<S>(grad_output, s, r, classes.first, served.bin);
        const int64_t stride = grad_output.stride(1);
        for (int64_t c = 0; c < classes.count; ++c) gradient[c] = static_cast<T>(in[c * stride]);
        std::fill(gradient.begin() + classes.count, gradient.end(), T(0));
        cells.backward(
            layout.width,
            gradient.data(),
            grad_offset ? maps.rows(served.position) : nullptr,
            grad_input ? grad_maps.rows(served.position) : nullptr);
        if (grad_offset == nullptr) return;
        T dx, dy;
        cells.derivatives(roi, rule, &dx, &dy);
        T* out = grad_offset + s.offset_row(r, run.k) + served.bin;
        const bool add = classes.first > run.k * s.group_channels();
        out[0] = add ? out[0] + dx : dx;
        out[s.bins()] = add ? out[s.bins()] + dy : dy;
      };
      for_each_classes(s, run, layout.width, [&](const Classes& classes) {
        for (int64_t n = 0; n < s.batch; ++n) {
          if (boxes[n].empty() && grad_input == nullptr) continue;
          if (grad_offset && !boxes[n].empty()) maps.read(picture<S>(input, n), run, classes);
          if (grad_input) grad_maps.zero(run);
          for (const ServedBin& served : run.bins) {
            for (const int64_t r : boxes[n]) pool_bin(classes, served, r);
          }
          if (grad_input) grad_maps.write(picture<S>(*grad_input, n), run, classes);
        }
      });
    };
  });
}

}  // namespace d2_deform::cpu
