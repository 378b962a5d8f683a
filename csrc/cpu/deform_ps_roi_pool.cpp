// Deformable position-sensitive RoI pooling on the CPU, channels-first inside: classes have their own offsets, so each
// reads a small patch of its own plane.
//
// A thread owns one offset group's planes for one cell of the grid, and with them the gradients of the offsets that move
// those bins, so that nothing is added to from two sides.
#include "roi_pool.h"

namespace d2_deform::cpu {
namespace {

// The bins that cell (gh, gw) of the grid serves.
std::vector<int64_t> bins_of(const PoolShape& s, int64_t gh, int64_t gw) {
  std::vector<int64_t> bins;
  for (int64_t bin = 0; bin < s.bins(); ++bin) {
    if (group_cell(bin / s.pooled_w, s.pooled_h, s.group_size) == gh &&
        group_cell(bin % s.pooled_w, s.pooled_w, s.group_size) == gw) {
      bins.push_back(bin);
    }
  }
  return bins;
}

// Calls visit(roi, r, k, bin, plane, cells) for every box r, offset group k and bin, where plane(c) is the first element of
// the map that output channel c reads. One thread makes all calls of a group and grid cell, box after box: their maps stay
// in its cache, and nobody else has them.
template <typename T, typename F>
void for_each_bin(
    const PoolShape& s, const RoIRule& rule, const T* rois, const T* offset, const F& visit) {
  const int64_t grid = s.group_size * s.group_size;
  torch::stable::parallel_for(0, s.offset_groups * grid, 1, [&](int64_t begin, int64_t end) {
    BinCells<T> cells(s, rule);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t k = i / grid;
      const int64_t position = i % grid;
      const std::vector<int64_t> served =
          bins_of(s, position / s.group_size, position % s.group_size);
      for (int64_t r = 0; r < s.rois; ++r) {
        const RoI<T> roi = make_roi(rois + 5 * r, s.batch, rule);
        if (roi.batch < 0) continue;
        const auto plane = [&](int64_t c) {
          return (roi.batch * s.in_channels + c * grid + position) * s.cells();
        };
        for (const int64_t bin : served) {
          const T* shift = offset ? offset + s.offset_row(r, k) + bin : nullptr;
          cells.find(s, roi, rule, bin / s.pooled_w, bin % s.pooled_w, shift);
          visit(roi, r, k, bin, plane, cells);
        }
      }
    }
  });
}

template <typename T>
void forward(
    const PoolShape& s,
    const RoIRule& rule,
    const T* input,  // (N, C, H, W)
    const T* rois,
    const T* offset,
    T* output) {  // (R, out_channels, Ph, Pw), zeros
  for_each_bin(
      s,
      rule,
      rois,
      offset,
      [&](const RoI<T>&,
          int64_t r,
          int64_t k,
          int64_t bin,
          const auto& plane,
          const BinCells<T>& cells) {
        for (int64_t c = k * s.group_channels(); c < (k + 1) * s.group_channels(); ++c) {
          const T* map = input + plane(c);
          T sum = 0;
          for (int a = 0; a < cells.y_size; ++a) {
            const T* row = map + cells.y[a].cell * s.width;
            T along = 0;
            for (int b = 0; b < cells.x_size; ++b) {
              along += cells.x[b].weight * row[cells.x[b].cell];
            }
            sum += cells.y[a].weight * along;
          }
          output[(r * s.out_channels + c) * s.bins() + bin] = sum * cells.scale;
        }
      });
}

template <typename T>
void backward(
    const PoolShape& s,
    const RoIRule& rule,
    const T* grad_output,  // (R, out_channels, Ph, Pw)
    const T* input,        // (N, C, H, W)
    const T* rois,
    const T* offset,
    T* grad_input,     // (N, C, H, W), zeros; or null
    T* grad_offset) {  // (R, 2K, Ph, Pw), zeros; or null
  for_each_bin(
      s,
      rule,
      rois,
      offset,
      [&](const RoI<T>& roi,
          int64_t r,
          int64_t k,
          int64_t bin,
          const auto& plane,
          BinCells<T>& cells) {
        cells.multiply(s, 0, 1);
        const int64_t size = cells.size();
        std::fill_n(cells.dots.data(), size, T(0));
        for (int64_t c = k * s.group_channels(); c < (k + 1) * s.group_channels(); ++c) {
          const T gradient = grad_output[(r * s.out_channels + c) * s.bins() + bin];
          if (grad_input) {
            T* grad_map = grad_input + plane(c);
            for (int64_t j = 0; j < size; ++j) {
              grad_map[cells.row[j]] += cells.weight[j] * gradient;
            }
          }
          if (grad_offset) {
            const T* map = input + plane(c);
            for (int64_t j = 0; j < size; ++j) cells.dots[j] += gradient * map[cells.row[j]];
          }
        }
        if (grad_offset) {
          T* out = grad_offset + s.offset_row(r, k) + bin;
          cells.derivatives(roi, rule, out, out + s.bins());
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
  if (s.rois == 0) return empty_as(input, sizes, input.scalar_type(), format);
  return dispatch_types(input.scalar_type(), [&](auto types) {
    using T = typename decltype(types)::Compute;
    const Tensor planes = laid_out<T>(input, MemoryFormat::Contiguous);
    const Tensor boxes = dense<T>(rois);
    const std::optional<Tensor> shifts = dense_or_none<T>(offset);
    const Tensor output = torch::stable::new_zeros(planes, sizes);
    forward(
        s,
        rule,
        static_cast<const T*>(planes.data_ptr()),
        static_cast<const T*>(boxes.data_ptr()),
        data_or_null<T>(shifts),
        static_cast<T*>(output.data_ptr()));
    return result_as(output, input, format);
  });
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
  STD_TORCH_CHECK(grad_output.dim() == 4, "grad_output: expected (R, C, Ph, Pw)");
  const PoolShape s = pool_shape(
      input, rois, offset, grad_output.size(2), grad_output.size(3), group_size, sampling_ratio);
  STD_TORCH_CHECK(
      grad_output.size(0) == s.rois && grad_output.size(1) == s.out_channels,
      "grad_output: expected the shape of the output");
  STD_TORCH_CHECK(
      !need_offset || offset.has_value(), "offset: its gradient is asked for, but it is absent");
  const RoIRule rule{spatial_scale, gamma, sampling_ratio, aligned};
  return dispatch_types(input.scalar_type(), [&](auto types) {
    using T = typename decltype(types)::Compute;
    const Tensor gradient = dense<T>(grad_output);
    const Tensor planes = laid_out<T>(input, MemoryFormat::Contiguous);
    const Tensor boxes = dense<T>(rois);
    const std::optional<Tensor> shifts = dense_or_none<T>(offset);
    const Tensor grad_input =
        need_input ? torch::stable::new_zeros(planes, planes.sizes()) : not_asked(input);
    const Tensor grad_offset =
        need_offset ? torch::stable::new_zeros(*shifts, shifts->sizes()) : not_asked(rois);
    backward(
        s,
        rule,
        static_cast<const T*>(gradient.data_ptr()),
        static_cast<const T*>(planes.data_ptr()),
        static_cast<const T*>(boxes.data_ptr()),
        data_or_null<T>(shifts),
        need_input ? static_cast<T*>(grad_input.data_ptr()) : nullptr,
        need_offset ? static_cast<T*>(grad_offset.data_ptr()) : nullptr);
    return std::make_tuple(
        need_input ? result_as(grad_input, input, suggested_format(input)) : grad_input,
        need_offset ? torch::stable::to(grad_offset, offset->scalar_type()) : grad_offset);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(d2_deform, CPU, m) {
  m.impl("deform_ps_roi_pool", TORCH_BOX(&deform_ps_roi_pool));
  m.impl("deform_ps_roi_pool_backward", TORCH_BOX(&deform_ps_roi_pool_backward));
}

}  // namespace d2_deform::cpu
