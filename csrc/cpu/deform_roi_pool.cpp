// Deformable RoI pooling on the CPU, channels-last inside, one picture at a time.
//
// A bin is a weighted sum of whole rows of channels (roi_geometry.h: one weight per cell, however many samples).
// Forward: a thread owns RoIs. Backward: a thread owns channels, so that nothing is added to from two sides.
// A picture too large for the working memory is pooled some channels at a time, its bins' cells found anew for them.
#include "pages.h"
#include "roi_pool.h"
#include "rows.h"

namespace d2_deform::cpu {
namespace {

constexpr int64_t kSliceChannels = 64;  // whose share of the offsets' gradient is one sum
constexpr int64_t kSlicesAtOnce = 2;    // of one thread, for which a bin's cells are found once
constexpr int64_t kLeastChannels = 16;  // laid out at a time: a vector, a cache line
constexpr int64_t kForwardBytes = 5'000'000;   // of a picture laid out, for all threads
constexpr int64_t kBackwardBytes = 3'500'000;  // of a map, and of its gradient, for each thread

// How many channels of a picture are laid out at a time in the forward pass.
template <typename T>
int64_t channels_at_once(const PoolShape& s) {
  const int64_t fitting = kForwardBytes / (s.cells() * static_cast<int64_t>(sizeof(T)));
  if (fitting >= s.in_channels) return s.in_channels;
  const int64_t most = std::max(kLeastChannels, fitting - fitting % kLeastChannels);
  const int64_t parts = (s.in_channels + most - 1) / most;
  return round_up((s.in_channels + parts - 1) / parts, kLeastChannels);
}

struct Channels {
  int64_t first, count;
};

// Some channels of one picture, from their rows.
template <typename S, typename T>
void forward_channels(
    const PoolShape& s,
    const RoIRule& rule,
    const Channels& channels,
    const std::vector<int64_t>& boxes,
    const T* rois,
    const T* offset,
    const T* rows,  // (cells, channels.count)
    const Tensor& output) {
  const Kernels<T>& kernel = kernels<T>();
  const int64_t all = static_cast<int64_t>(boxes.size());
  torch::stable::parallel_for(0, all, 1, [&](int64_t begin, int64_t end) {
    BinCells<T> cells(s, rule);
    Buffer<T> bins(s.bins() * channels.count);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t r = boxes[i];
      const RoI<T> roi = make_roi(rois + 5 * r, s.batch, rule);
      for (int64_t bin = 0; bin < s.bins(); ++bin) {
        for (int64_t c = 0; c < channels.count;) {  // the channels of one offset group
          const int64_t k = (channels.first + c) / s.group_channels();
          const int64_t c_end =
              std::min(channels.count, (k + 1) * s.group_channels() - channels.first);
          const T* shift = offset ? offset + s.offset_row(r, k) + bin : nullptr;
          cells.find(s, roi, rule, bin, shift);
          cells.multiply(s, c, channels.count);
          kernel.weighted_sum(
              cells.size(),
              c_end - c,
              rows,
              cells.row.data(),
              cells.weight.data(),
              bins.data() + bin * channels.count + c);
          c = c_end;
        }
      }
      store_rows(
          picture<S>(output, r).slice(channels.first, channels.count),
          0,
          s.bins(),
          bins.data(),
          channels.count);
    }
  });
}

template <typename S, typename T>
void forward(
    const PoolShape& s,
    const RoIRule& rule,
    const Tensor& input,
    const T* rois,
    const T* offset,
    const Tensor& output) {
  const std::vector<std::vector<int64_t>> boxes = boxes_of_pictures(s, rule, rois);
  const bool in_place = has_rows<S, T>(input);
  const int64_t most = in_place ? s.in_channels : channels_at_once<T>(s);
  Buffer<T> staged(in_place ? 0 : s.cells() * most);
  for (int64_t n = 0; n < s.batch; ++n) {
    if (boxes[n].empty()) continue;
    for (int64_t first = 0; first < s.in_channels; first += most) {
      const int64_t count = std::min(most, s.in_channels - first);
      const Picture<S> map = picture<S>(input, n).slice(first, count);
      if (!in_place) load_picture(map, staged.data());
      forward_channels<S>(
          s,
          rule,
          {first, count},
          boxes[n],
          rois,
          offset,
          in_place ? reinterpret_cast<const T*>(map.data) : staged.data(),
          output);
    }
  }
  const Buffer<T> nothing(boxes[s.batch].empty() ? 0 : s.bins() * s.out_channels, T(0));
  for (const int64_t r : boxes[s.batch]) {
    store_rows(picture<S>(output, r), 0, s.bins(), nothing.data(), s.out_channels);
  }
}

// Channels [first, first + count), all of offset group k.
struct ChannelSpan {
  int64_t k, first, count;
};

std::vector<ChannelSpan> channel_spans(const PoolShape& s, int64_t most) {
  std::vector<ChannelSpan> spans;
  for (int64_t k = 0; k < s.offset_groups; ++k) {
    const int64_t end = (k + 1) * s.group_channels();
    for (int64_t c = k * s.group_channels(); c < end; c += most) {
      spans.push_back({k, c, std::min(most, end - c)});
    }
  }
  return spans;
}

// How many channels of a picture a thread lays out at a time in the backward pass: all of a span, or a power of two.
template <typename T>
int64_t slice_at_once(const PoolShape& s) {
  int64_t channels = kSliceChannels * kSlicesAtOnce;
  while (channels > kLeastChannels &&
         channels * s.cells() * static_cast<int64_t>(sizeof(T)) > kBackwardBytes) {
    channels /= 2;
  }
  return channels;
}

// Channels [first, first + count) of a span of one picture: adds to grad_rows (or null), and to the share that each slice of
// the span has in the offsets' gradient (or null).
template <typename S, typename T>
void backward_channels(
    const PoolShape& s,
    const RoIRule& rule,
    const ChannelSpan& span,
    const Channels& channels,
    const std::vector<int64_t>& boxes,
    const Tensor& grad_output,
    const T* rois,
    const T* offset,
    const T* rows,  // (cells, channels.count)
    T* grad_rows,   // (cells, channels.count)
    T* partial) {   // (slices of the span, boxes, 2, bins)
  BinCells<T> cells(s, rule);
  Buffer<T> gradients(s.bins() * channels.count);
  const int64_t all = static_cast<int64_t>(boxes.size());
  for (int64_t i = 0; i < all; ++i) {
    const int64_t r = boxes[i];
    const RoI<T> roi = make_roi(rois + 5 * r, s.batch, rule);
    const Picture<S> pooled = picture<S>(grad_output, r).slice(channels.first, channels.count);
    load_rows(pooled, 0, s.bins(), gradients.data(), channels.count);
    for (int64_t bin = 0; bin < s.bins(); ++bin) {
      const T* shift = offset ? offset + s.offset_row(r, span.k) + bin : nullptr;
      cells.find(s, roi, rule, bin, shift);
      cells.multiply(s, 0, channels.count);
      for (int64_t c = 0; c < channels.count; c += kSliceChannels) {
        cells.backward(
            std::min(kSliceChannels, channels.count - c),
            gradients.data() + bin * channels.count + c,
            partial ? rows + c : nullptr,
            grad_rows ? grad_rows + c : nullptr);
        if (partial == nullptr) continue;
        const int64_t slice = (channels.first - span.first + c) / kSliceChannels;
        T* share = partial + (slice * all + i) * 2 * s.bins() + bin;
        T dx, dy;
        cells.derivatives(roi, rule, &dx, &dy);
        share[0] += dx;
        share[s.bins()] += dy;
      }
    }
  }
}

template <typename S, typename T>
void backward(
    const PoolShape& s,
    const RoIRule& rule,
    const Tensor& grad_output,
    const Tensor& input,
    const T* rois,
    const T* offset,
    const Tensor* grad_input,
    T* grad_offset) {  // (R, 2K, Ph, Pw), zeros; or null
  if (grad_input == nullptr && grad_offset == nullptr) return;
  const std::vector<std::vector<int64_t>> boxes = boxes_of_pictures(s, rule, rois);
  const std::vector<ChannelSpan> spans = channel_spans(s, kSliceChannels * kSlicesAtOnce);
  const int64_t count = static_cast<int64_t>(spans.size());
  const int64_t most = std::min(s.in_channels, slice_at_once<T>(s));
  for (int64_t n = 0; n < s.batch; ++n) {
    if (boxes[n].empty() && grad_input == nullptr) continue;
    const int64_t share = static_cast<int64_t>(boxes[n].size()) * 2 * s.bins();  // of one slice
    Buffer<T> partial(grad_offset ? count * kSlicesAtOnce * share : 0, T(0));
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      Buffer<T> rows(grad_offset ? s.cells() * most : 0);
      Buffer<T> grad_rows(grad_input ? s.cells() * most : 0);
      for (int64_t i = begin; i < end; ++i) {
        const ChannelSpan& span = spans[i];
        for (int64_t c = 0; c < span.count; c += most) {
          const Channels channels{span.first + c, std::min(most, span.count - c)};
          const auto part = [&](const Tensor& maps) {
            return picture<S>(maps, n).slice(channels.first, channels.count);
          };
          if (grad_offset && !boxes[n].empty()) {
            load_rows(part(input), 0, s.cells(), rows.data(), channels.count);
          }
          if (grad_input) std::fill_n(grad_rows.data(), s.cells() * channels.count, T(0));
          backward_channels<S>(
              s,
              rule,
              span,
              channels,
              boxes[n],
              grad_output,
              rois,
              offset,
              rows.data(),
              grad_input ? grad_rows.data() : nullptr,
              grad_offset ? partial.data() + i * kSlicesAtOnce * share : nullptr);
          if (grad_input) {
            store_rows(part(*grad_input), 0, s.cells(), grad_rows.data(), channels.count);
          }
        }
      }
    });
    if (grad_offset == nullptr) continue;
    // The slices' shares, in their order.
    const int64_t all = static_cast<int64_t>(boxes[n].size());
    torch::stable::parallel_for(0, all, 1, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) {
        for (int64_t i = 0; i < count * kSlicesAtOnce; ++i) {
          const T* in = partial.data() + i * share + j * 2 * s.bins();
          T* out = grad_offset + s.offset_row(boxes[n][j], spans[i / kSlicesAtOnce].k);
          for (int64_t b = 0; b < 2 * s.bins(); ++b) out[b] += in[b];
        }
      }
    });
  }
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
  const std::vector<int64_t> sizes{s.rois, s.out_channels, pooled_h, pooled_w};
  const Tensor output =
      in_large_pages(empty_as(input, sizes, input.scalar_type(), suggested_format(input)));
  if (s.rois == 0) return output;
  dispatch_types(input.scalar_type(), [&](auto types) {
    using S = typename decltype(types)::Storage;
    using T = typename decltype(types)::Compute;
    const Tensor boxes = dense<T>(rois);
    const std::optional<Tensor> shifts = dense_or_none<T>(offset);
    forward<S>(
        s, rule, input, static_cast<const T*>(boxes.data_ptr()), data_or_null<T>(shifts), output);
  });
  return output;
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
  const PoolShape s =
      pool_shape_of_gradient(grad_output, input, rois, offset, 1, sampling_ratio, need_offset);
  const RoIRule rule{spatial_scale, gamma, sampling_ratio, aligned};
  return dispatch_types(input.scalar_type(), [&](auto types) {
    using S = typename decltype(types)::Storage;
    using T = typename decltype(types)::Compute;
    const Tensor boxes = dense<T>(rois);
    const std::optional<Tensor> shifts = dense_or_none<T>(offset);
    const std::vector<int64_t> sizes{s.batch, s.in_channels, s.height, s.width};
    const Tensor grad_input =
        need_input
            ? in_large_pages(empty_as(input, sizes, input.scalar_type(), suggested_format(input)))
            : not_asked(input);
    const Tensor grad_offset =
        need_offset ? torch::stable::new_zeros(*shifts, shifts->sizes()) : not_asked(rois);
    backward<S>(
        s,
        rule,
        grad_output,
        input,
        static_cast<const T*>(boxes.data_ptr()),
        data_or_null<T>(shifts),
        need_input ? &grad_input : nullptr,
        need_offset ? static_cast<T*>(grad_offset.data_ptr()) : nullptr);
    return std::make_tuple(
        grad_input,
        need_offset ? torch::stable::to(grad_offset, offset->scalar_type()) : grad_offset);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(d2_deform, CPU, m) {
  m.impl("deform_roi_pool", TORCH_BOX(&deform_roi_pool));
  m.impl("deform_roi_pool_backward", TORCH_BOX(&deform_roi_pool_backward));
}

}  // namespace d2_deform::cpu
