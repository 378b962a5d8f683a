// Position-sensitive pooling of classes that share their offsets: a bin samples the same cells for all of them, so the planes
// of one position are laid out as rows of classes, and a bin is a weighted sum of rows, as in RoI pooling.
#pragma once

#include "ps_runs.h"
#include "roi_pool.h"
#include "rows.h"

namespace d2_deform::cpu {

constexpr int64_t kSharingClasses = 8;            // fewer are pooled plane by plane
constexpr int64_t kRowClasses = 32;               // of a row, at most
constexpr int64_t kForwardRowBytes = 4'000'000;   // of a run's rows, at most
constexpr int64_t kBackwardRowBytes = 3'500'000;  // and as many of their gradient's

// How classes that share their offsets are laid out: rows of `width`, for `positions` positions and `lines` lines of the map
// at a time; no position: not at all, as they are too few or the map is too large.
struct RowLayout {
  int64_t width, positions, lines;

  RowLayout(
      const PoolShape& s,
      bool channels_last,
      int64_t lines,
      int64_t element_bytes,
      int64_t most_bytes)
      : lines(lines) {
    // Whole vectors of every instruction set.
    width = std::min(kRowClasses, round_up(s.group_channels(), 16));
    positions = 0;
    if (s.group_channels() < kSharingClasses) return;
    int64_t fitting = most_bytes / (lines * s.width * width * element_bytes);
    if (fitting == 0) {
      width = 16;
      fitting = most_bytes / (lines * s.width * width * element_bytes);
    }
    // Neighbours in a cache line of a channels-last map are read together.
    positions = std::min<int64_t>(fitting, channels_last ? 32 : 1);
  }
};

// Lines [first, first + count) of a map.
struct Lines {
  int64_t first, count;
};

// Calls f(lines) for lines [first, end), cut where their places among `room` lines do not follow each other.
template <typename F>
void for_each_lines(int64_t first, int64_t end, int64_t room, const F& f) {
  for (int64_t line = first; line < end;) {
    const int64_t count = std::min(end - line, room - line % room);
    f(Lines{line, count});
    line += count;
  }
}

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

// One picture's rows for a run and some classes, (position, cell, width) of type T; beyond the classes they hold 0. Of the map
// there is room for `lines` lines: line y takes the place of line y - lines.
template <typename S, typename T>
class ClassRows {
 public:
  ClassRows(const PoolShape& s, const RowLayout& layout)
      : grid_(s.group_size * s.group_size),
        map_width_(s.width),
        lines_(layout.lines),
        width_(layout.width) {}

  void begin(const Run& run, const Classes& classes) {
    const int64_t size = run.positions() * cells() * width_;
    if (!room_ || room_->size() < size) room_.emplace(size), classes_ = -1;
    if (classes.count != classes_) room_->fill(T(0));
    classes_ = classes.count;
  }

  void read(const Picture<S>& map, const Run& run, const Classes& classes, const Lines& lines) {
    const int64_t first = lines.first * map_width_;
    const int64_t count = lines.count * map_width_;
    if (!map.has_rows()) {
      for (int64_t p = 0; p < run.positions(); ++p) {
        const Picture<S> planes = plane_of_classes(map, run.begin + p, classes);
        load_rows(planes, first, first + count, rows(p) + place(lines), width_);
      }
      return;
    }
    for (int64_t i = 0; i < count; ++i) {
      const S* in = cell_of(map, first + i, run, classes);
      T* out = rows(0) + place(lines) + i * width_;
      if (i + 1 < count) fetch(in + map.column_stride, classes, run);
      if constexpr (std::is_same_v<S, T>) {
        kernels<T>().transpose(classes.count, run.positions(), in, grid_, out, cells() * width_);
      } else {
        for (int64_t c = 0; c < classes.count; ++c) {
          for (int64_t p = 0; p < run.positions(); ++p) {
            out[p * cells() * width_ + c] = static_cast<T>(in[c * grid_ + p]);
          }
        }
      }
    }
  }

  void zero(const Run& run, const Lines& lines) {
    for (int64_t p = 0; p < run.positions(); ++p) {
      std::fill_n(rows(p) + place(lines), lines.count * map_width_ * width_, T(0));
    }
  }

  void write(const Picture<S>& map, const Run& run, const Classes& classes, const Lines& lines) {
    const int64_t first = lines.first * map_width_;
    const int64_t count = lines.count * map_width_;
    if (!map.has_rows()) {
      for (int64_t p = 0; p < run.positions(); ++p) {
        const Picture<S> planes = plane_of_classes(map, run.begin + p, classes);
        store_rows(planes, first, first + count, rows(p) + place(lines), width_);
      }
      return;
    }
    for (int64_t i = 0; i < count; ++i) {
      S* out = cell_of(map, first + i, run, classes);
      const T* in = rows(0) + place(lines) + i * width_;
      if (i + 1 < count) fetch(out + map.column_stride, classes, run);
      if constexpr (std::is_same_v<S, T>) {
        kernels<T>().transpose(run.positions(), classes.count, in, cells() * width_, out, grid_);
      } else {
        for (int64_t c = 0; c < classes.count; ++c) {
          for (int64_t p = 0; p < run.positions(); ++p) {
            out[c * grid_ + p] = static_cast<S>(in[p * cells() * width_ + c]);
          }
        }
      }
    }
  }

  // A position's rows, whose cells are counted from line 0, or from any line whose place is the first.
  T* rows(int64_t position) { return room_->data() + position * cells() * width_; }

 private:
  int64_t cells() const { return lines_ * map_width_; }
  int64_t place(const Lines& lines) const { return lines.first % lines_ * map_width_ * width_; }

  S* cell_of(const Picture<S>& map, int64_t cell, const Run& run, const Classes& classes) const {
    return map.data + cell * map.column_stride + classes.first * grid_ + run.begin;
  }

  // Begins to bring the elements of a cell of a channels-last map into the cache.
  template <typename E>
  void fetch(E* next, const Classes& classes, const Run& run) const {
    for (int64_t c = 0; c < classes.count; ++c) {
      E* piece = next + c * grid_;
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

  int64_t grid_, map_width_, lines_, width_;
  std::optional<Buffer<T>> room_;
  int64_t classes_ = -1;  // that the rows hold
};

// The classes of one bin, of a tensor (R, out_channels, Ph, Pw).
template <typename S>
S* bin_classes(const Tensor& pooled, const PoolShape& s, int64_t r, int64_t first, int64_t bin) {
  const Picture<S> box = picture<S>(pooled, r).slice(first, 1);
  return box.data + bin / s.pooled_w * box.row_stride + bin % s.pooled_w * box.column_stride;
}

// How many lines of the map a bin of any box can read, from the first to the last.
template <typename T>
int64_t most_lines(const PoolShape& s, const RoIRule& rule, const T* rois) {
  if (s.height >= 1 << 24) return s.height;  // beyond, a float does not hold every line's number
  T most = 1;
  for (int64_t r = 0; r < s.rois; ++r) {
    const T height = make_roi(rois + 5 * r, s.batch, rule).height;
    most = std::max(most, cells_of_bin(height, s.pooled_h, s.height, rule));
  }
  return static_cast<int64_t>(most);
}

// A bin of a run, by its number there, and a box; the first line of the map that may be read for them.
struct LineBin {
  int32_t line, served;
  int64_t box;
};

// The bins that a run serves for some boxes, in the order in which their lines are laid out.
template <typename T>
class BinsByLine {
 public:
  explicit BinsByLine(const PoolShape& s) : begin_(s.height + 1) {}

  // Sorts them by line; as they are, if all lines are laid out at once.
  void sort(
      const PoolShape& s,
      const RoIRule& rule,
      const RowLayout& layout,
      const Run& run,
      const std::vector<int64_t>& boxes,
      const T* rois,
      const T* offset) {
    lines_.clear();
    std::fill(begin_.begin(), begin_.end(), 0);
    const auto for_each_bin = [&](const auto& f) {
      for (std::size_t i = 0; i < run.bins.size(); ++i) {
        for (const int64_t r : boxes) f(static_cast<int32_t>(i), r);
      }
    };
    const T last = layout.lines < s.height ? static_cast<T>(s.height - 1) : T(0);
    for_each_bin([&](int32_t served, int64_t r) {
      const int64_t bin = run.bins[served].bin;
      const RoI<T> roi = make_roi(rois + 5 * r, s.batch, rule);
      const T shift = offset ? offset[s.offset_row(r, run.k) + s.bins() + bin] : T(0);
      const BinAxis<T> axis =
          same_bin_axis(roi.y, roi.height, bin / s.pooled_w, s.pooled_h, shift, s.height, rule);
      lines_.push_back(static_cast<int32_t>(axis.first > T(0) ? std::min(axis.first, last) : T(0)));
      ++begin_[lines_.back() + 1];
    });
    for (int64_t y = 0; y < s.height; ++y) begin_[y + 1] += begin_[y];
    sorted_.resize(lines_.size());
    auto line = lines_.begin();
    for_each_bin([&](int32_t served, int64_t r) {
      sorted_[begin_[*line]++] = {*line, served, r};
      ++line;
    });
  }

  const std::vector<LineBin>& sorted() const { return sorted_; }

 private:
  std::vector<int32_t> lines_;
  std::vector<LineBin> sorted_;
  std::vector<int64_t> begin_;
};

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
          maps.begin(run, classes);
          maps.read(picture<S>(input, n), run, classes, {0, s.height});
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
            bins = BinsByLine<T>(s),
            cells = BinCells<T>(s, rule),
            gradient = std::vector<T>(layout.width)](const Run& run) mutable {
      const auto pool_bin = [&](const Classes& classes, const ServedBin& served, int64_t r) {
        const RoI<T> roi = make_roi(rois + 5 * r, s.batch, rule);
        const T* shift = offset ? offset + s.offset_row(r, run.k) + served.bin : nullptr;
        cells.find(s, roi, rule, served.bin, shift);
        for (int a = 0; a < cells.y_size; ++a) cells.y[a].cell %= layout.lines;
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
      for (int64_t n = 0; n < s.batch; ++n) {
        if (boxes[n].empty() && grad_input == nullptr) continue;
        bins.sort(s, rule, layout, run, boxes[n], rois, offset);
        for_each_classes(s, run, layout.width, [&](const Classes& classes) {
          maps.begin(run, classes);
          grad_maps.begin(run, classes);
          // Lines [first, end) are laid out, those before them have been written.
          int64_t first = 0, end = 0;
          const auto write_before = [&](int64_t line) {
            const auto write = [&](const Lines& lines) {
              grad_maps.write(picture<S>(*grad_input, n), run, classes, lines);
            };
            if (grad_input) {
              for_each_lines(first, std::min(end, line), layout.lines, write);
              // No bin reads these.
              for_each_lines(std::max(first, end), line, layout.lines, [&](const Lines& lines) {
                grad_maps.zero(run, lines);
                write(lines);
              });
            }
            first = line;
          };
          const auto lay_out_from = [&](int64_t line) {
            write_before(line);
            const int64_t last = std::min(s.height, line + layout.lines);
            for_each_lines(std::max(end, line), last, layout.lines, [&](const Lines& lines) {
              if (grad_offset) maps.read(picture<S>(input, n), run, classes, lines);
              if (grad_input) grad_maps.zero(run, lines);
            });
            end = last;
          };
          for (const LineBin& bin : bins.sorted()) {
            if (bin.line > first || end == 0) lay_out_from(bin.line);
            pool_bin(classes, run.bins[bin.served], bin.box);
          }
          write_before(s.height);
        });
      }
    };
  });
}

}  // namespace d2_deform::cpu
