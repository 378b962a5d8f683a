// Deformable RoI pooling on the CPU, channels-last inside.
//
// A bin is a weighted sum of whole rows of channels (roi_geometry.h: one weight per cell, however many samples).
// Forward: a thread owns RoIs. Backward: a thread owns channels, so that nothing is added to from two sides.
#include "kernels.h"
#include "roi_pool.h"

namespace d2_deform::cpu {
namespace {

constexpr int64_t kSliceChannels = 64;

template <typename T>
void forward(
    const PoolShape& s,
    const RoIRule& rule,
    const T* input,  // (N, H, W, C)
    const T* rois,
    const T* offset,
    T* output) {  // (R, Ph, Pw, C)
  const Kernels<T>& kernel = kernels<T>();
  torch::stable::parallel_for(0, s.rois, 1, [&](int64_t begin, int64_t end) {
    BinCells<T> cells(s, rule);
    for (int64_t r = begin; r < end; ++r) {
      const RoI<T> roi = make_roi(rois + 5 * r, s.batch, rule);
      for (int64_t bin = 0; bin < s.bins(); ++bin) {
        T* out = output + (r * s.bins() + bin) * s.out_channels;
        for (int64_t k = 0; k < s.offset_groups; ++k) {
          const int64_t first = k * s.group_channels();
          if (roi.batch < 0) {
            std::fill_n(out + first, s.group_channels(), T(0));
            continue;
          }
          const T* shift = offset ? offset + s.offset_row(r, k) + bin : nullptr;
          cells.find(s, roi, rule, bin / s.pooled_w, bin % s.pooled_w, shift);
          cells.multiply(s, roi.batch * s.cells() * s.in_channels + first, s.in_channels);
          kernel.weighted_sum(
              cells.size(),
              s.group_channels(),
              input,
              cells.row.data(),
              cells.weight.data(),
              out + first);
        }
      }
    }
  });
}

template <typename T>
void backward(
    const PoolShape& s,
    const RoIRule& rule,
    const T* grad_output,  // (R, Ph, Pw, C)
    const T* input,        // (N, H, W, C)
    const T* rois,
    const T* offset,
    T* grad_input,     // (N, H, W, C), zeros; or null
    T* grad_offset) {  // (R, 2K, Ph, Pw); or null
  const Kernels<T>& kernel = kernels<T>();
  const int64_t per_group = (s.group_channels() + kSliceChannels - 1) / kSliceChannels;
  const int64_t slices = s.offset_groups * per_group;
  // Each slice's share of the offsets' gradient, (slices, R, 2, bins), summed in the slices' order afterwards.
  std::vector<T> partial(grad_offset ? slices * s.rois * 2 * s.bins() : 0);
  torch::stable::parallel_for(0, slices, 1, [&](int64_t begin, int64_t end) {
    BinCells<T> cells(s, rule);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t k = i / per_group;
      const int64_t first = k * s.group_channels() + i % per_group * kSliceChannels;
      const int64_t count = std::min(kSliceChannels, (k + 1) * s.group_channels() - first);
      for (int64_t r = 0; r < s.rois; ++r) {
        const RoI<T> roi = make_roi(rois + 5 * r, s.batch, rule);
        if (roi.batch < 0) continue;
        for (int64_t bin = 0; bin < s.bins(); ++bin) {
          const T* shift = offset ? offset + s.offset_row(r, k) + bin : nullptr;
          cells.find(s, roi, rule, bin / s.pooled_w, bin % s.pooled_w, shift);
          cells.multiply(s, roi.batch * s.cells() * s.in_channels + first, s.in_channels);
          const T* gradient = grad_output + (r * s.bins() + bin) * s.out_channels + first;
          if (grad_input) {
            kernel.weighted_scatter(
                cells.size(), count, gradient, cells.row.data(), cells.weight.data(), grad_input);
          }
          if (grad_offset) {
            kernel.dot_rows(
                cells.size(), count, input, cells.row.data(), gradient, cells.dots.data());
            T* share = partial.data() + (i * s.rois + r) * 2 * s.bins() + bin;
            cells.derivatives(roi, rule, share, share + s.bins());
          }
        }
      }
    }
  });
  if (grad_offset == nullptr) return;
  torch::stable::parallel_for(0, s.rois, 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      for (int64_t k = 0; k < s.offset_groups; ++k) {
        T* out = grad_offset + s.offset_row(r, k);
        std::fill_n(out, 2 * s.bins(), T(0));
        for (int64_t i = k * per_group; i < (k + 1) * per_group; ++i) {
          const T* share = partial.data() + (i * s.rois + r) * 2 * s.bins();
          for (int64_t b = 0; b < 2 * s.bins(); ++b) out[b] += share[b];
        }
      }
    }
  });
}

Tensor deform_roi_pool(
    const Tensor& input,
    const Tensor& rois,
    const std::optional<Tensor>& offset,
    int64_t pooled_h,
    int64_t pooled_w,
    double spatial_scale,
    int64_t sampling_ratio,
    double gamma,
    bool aligned) {
  const PoolShape s = pool_shape(input, rois, offset, pooled_h, pooled_w, 1, sampling_ratio);
  const RoIRule rule{spatial_scale, gamma, sampling_ratio, aligned};
  const MemoryFormat format = suggested_format(input);
  const std::vector<int64_t> sizes{s.rois, s.out_channels, pooled_h, pooled_w};
  if (s.rois == 0) return empty_as(input, sizes, input.scalar_type(), format);
  return dispatch_types(input.scalar_type(), [&](auto types) {
    using T = typename decltype(types)::Compute;
    const Tensor rows = laid_out<T>(input, MemoryFormat::ChannelsLast);
    const Tensor boxes = dense<T>(rois);
    const std::optional<Tensor> shifts = dense_or_none<T>(offset);
    const Tensor output = empty_as(input, sizes, scalar_type_of<T>(), MemoryFormat::ChannelsLast);
    forward(
        s,
        rule,
        static_cast<const T*>(rows.data_ptr()),
        static_cast<const T*>(boxes.data_ptr()),
        data_or_null<T>(shifts),
        static_cast<T*>(output.data_ptr()));
    return result_as(output, input, format);
  });
}

std::tuple<Tensor, Tensor> deform_roi_pool_backward(
    const Tensor& grad_output,
    const Tensor& input,
    const Tensor& rois,
    const std::optional<Tensor>& offset,
    double spatial_scale,
    int64_t sampling_ratio,
    double gamma,
    bool aligned,
    bool need_input,
    bool need_offset,
    bool /*deterministic: always*/) {
  STD_TORCH_CHECK(grad_output.dim() == 4, "grad_output: expected (R, C, Ph, Pw)");
  const PoolShape s =
      pool_shape(input, rois, offset, grad_output.size(2), grad_output.size(3), 1, sampling_ratio);
  STD_TORCH_CHECK(
      grad_output.size(0) == s.rois && grad_output.size(1) == s.out_channels,
      "grad_output: expected the shape of the output");
  STD_TORCH_CHECK(
      !need_offset || offset.has_value(), "offset: its gradient is asked for, but it is absent");
  const RoIRule rule{spatial_scale, gamma, sampling_ratio, aligned};
  return dispatch_types(input.scalar_type(), [&](auto types) {
    using T = typename decltype(types)::Compute;
    const MemoryFormat last = MemoryFormat::ChannelsLast;
    const Tensor gradient = laid_out<T>(grad_output, last);
    const Tensor rows = laid_out<T>(input, last);
    const Tensor boxes = dense<T>(rois);
    const std::optional<Tensor> shifts = dense_or_none<T>(offset);
    Tensor grad_input = not_asked(input);
    if (need_input) {
      grad_input =
          empty_as(input, {s.batch, s.in_channels, s.height, s.width}, scalar_type_of<T>(), last);
      torch::stable::zero_(grad_input);
    }
    const Tensor grad_offset =
        need_offset ? torch::stable::new_empty(*shifts, shifts->sizes()) : not_asked(rois);
    backward(
        s,
        rule,
        static_cast<const T*>(gradient.data_ptr()),
        static_cast<const T*>(rows.data_ptr()),
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
  m.impl("deform_roi_pool", TORCH_BOX(&deform_roi_pool));
  m.impl("deform_roi_pool_backward", TORCH_BOX(&deform_roi_pool_backward));
}

}  // namespace d2_deform::cpu
