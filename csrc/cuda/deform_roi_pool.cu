// Deformable RoI pooling, channels-last inside: a thread does some neighbouring channels of one bin.
//
// Backward, the map's gradient comes by atomic sums or, where results must be reproducible, every cell sums the samples
// that read it in their order (bin_samples.h); the lanes of a bin share its channels for the offsets' gradient.
#include "bin_samples.h"

namespace d2_deform::cuda {
namespace {

// Which bin and channels a thread does: elements of rows (R * bins, C).
struct ChannelPlaces {
  Divider<uint64_t> by_channels, by_bins;
  Divider<uint32_t> by_group;

  explicit ChannelPlaces(const PoolShape& s)
      : by_channels(s.out_channels), by_bins(s.bins()), by_group(s.group_channels()) {}

  struct Place {
    int64_t roi, bin, offset_group, channel;
  };

  D2_DEFORM_HOST_DEVICE Place place(int64_t element) const {
    uint64_t channel = static_cast<uint64_t>(element);
    uint64_t bin = by_channels.split(channel);
    const int64_t roi = static_cast<int64_t>(by_bins.split(bin));
    const int64_t offset_group = by_group.quotient(static_cast<uint32_t>(channel));
    return {roi, static_cast<int64_t>(bin), offset_group, static_cast<int64_t>(channel)};
  }
};

// Element of the map (N, H, W, C) where a cell's channels begin.
D2_DEFORM_HOST_DEVICE int64_t cell_row(const PoolShape& s, int64_t image, int64_t y, int64_t x) {
  return ((image * s.height + y) * s.width + x) * s.in_channels;
}

template <typename S, typename T, int N>
struct RoIPool {
  Bins<T> bins;
  ChannelPlaces places;
  Array<const S> input;  // (N, H, W, C)
  Array<S> output;       // (R, Ph, Pw, C)

  D2_DEFORM_HOST_DEVICE void operator()(int64_t i) const {
    const auto place = places.place(i * N);
    const Bin<T> bin = bins.at(place.roi, place.offset_group, place.bin);
    T sum[N] = {};
    bin.for_each_cell([&](int64_t y, int64_t x, T weight, T, T) {
      T value[N];
      input.load(cell_row(bins.shape, bin.image, y, x) + place.channel, value);
      for (int j = 0; j < N; ++j) sum[j] += weight * value[j];
    });
    output.store(i * N, sum);
  }
};

template <typename S, typename T, int N>
struct RoIPoolScatter {
  Bins<T> bins;
  ChannelPlaces places;
  Array<const S> grad_output;  // (R, Ph, Pw, C)
  Array<T> grad_input;         // (N, H, W, C)

  D2_DEFORM_HOST_DEVICE void operator()(int64_t i) const {
    const auto place = places.place(i * N);
    const Bin<T> bin = bins.at(place.roi, place.offset_group, place.bin);
    T gradient[N];
    grad_output.load(i * N, gradient);
    bin.for_each_cell([&](int64_t y, int64_t x, T weight, T, T) {
      T part[N];
      for (int j = 0; j < N; ++j) part[j] = weight * gradient[j];
      grad_input.atomic_add(cell_row(bins.shape, bin.image, y, x) + place.channel, part);
    });
  }
};

// The lanes of one bin and offset group share its channels; sums: along x, along y.
template <typename S, typename T, int N>
struct RoIPoolOffsetGradient {
  using Result = Sums<T, 2>;

  Bins<T> bins;
  BinNumbers numbers;
  Array<const S> grad_output;  // (R, Ph, Pw, C)
  Array<const S> input;        // (N, H, W, C)
  Array<T> grad_offset;        // (R, 2K, Ph, Pw)

  D2_DEFORM_HOST_DEVICE Result share(int64_t i, int lane, int lanes) const {
    const PoolShape& s = bins.shape;
    const BinPlace p = numbers.place(i);
    const Bin<T> bin = bins.at(p.roi, p.offset_group, p.bin);
    const int64_t first = p.offset_group * s.group_channels();
    const int64_t row = (p.roi * s.bins() + p.bin) * s.out_channels;
    Result along{};
    for (int64_t c = first + lane * N; c < first + s.group_channels(); c += lanes * N) {
      T gradient[N];
      grad_output.load(row + c, gradient);
      bin.for_each_cell([&](int64_t y, int64_t x, T, T by_y, T by_x) {
        T value[N], dot = T(0);
        input.load(cell_row(s, bin.image, y, x) + c, value);
        for (int j = 0; j < N; ++j) dot += gradient[j] * value[j];
        along.value[0] += by_x * dot;
        along.value[1] += by_y * dot;
      });
    }
    return along;
  }

  D2_DEFORM_HOST_DEVICE void finish(int64_t i, const Result& along) const {
    const BinPlace p = numbers.place(i);
    const int64_t element = bins.shape.offset_row(p.roi, p.offset_group) + p.bin;
    grad_offset[element] = along.value[0];
    grad_offset[element + bins.shape.bins()] = along.value[1];
  }
};

// For inverse_gather.h: the channels of an offset group of a picture are a map of their own.
template <typename S, typename T, int N>
struct RoIPoolSource : BinSamples<T> {
  Array<const S> grad_output;  // (R, Ph, Pw, C)
  Array<T> grad_input;         // (N, H, W, C)

  D2_DEFORM_HOST_DEVICE int64_t key(int64_t number) const {
    const BinSample<T> sample = this->sample(number);
    return this->key_in(
        sample.image * this->bins.shape.offset_groups + sample.offset_group, sample);
  }

  D2_DEFORM_HOST_DEVICE void gradient(int64_t number, int64_t channel, T (&out)[N]) const {
    const PoolShape& s = this->bins.shape;
    const BinPlace p = this->bin_place(number);
    const int64_t first = p.offset_group * s.group_channels();
    grad_output.load((p.roi * s.bins() + p.bin) * s.out_channels + first + channel, out);
  }

  D2_DEFORM_HOST_DEVICE void add(
      int64_t map, int64_t cell, int64_t channel, const T (&sum)[N]) const {
    const PoolShape& s = this->bins.shape;
    uint64_t offset_group = static_cast<uint64_t>(map);
    const int64_t image = static_cast<int64_t>(this->numbers.by_offset_groups.split(offset_group));
    const int64_t first = (image * s.cells() + cell) * s.in_channels +
                          static_cast<int64_t>(offset_group) * s.group_channels() + channel;
    T total[N];
    grad_input.load(first, total);
    for (int j = 0; j < N; ++j) total[j] += sum[j];
    grad_input.store(first, total);
  }
};

template <typename S>
bool channels_fit_packs(const PoolShape& s) {
  return s.group_channels() % pack_size<S>() == 0;
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
  check_device("rois", rois, input);
  check_device("offset", offset, input);
  const PoolShape s = pool_shape(input, rois, offset, pooled_h, pooled_w, 1, sampling_ratio);
  const RoIRule rule{spatial_scale, gamma, sampling_ratio, aligned};
  const Launcher launcher(input);
  const ScalarType type = input.scalar_type();
  const Tensor output = empty_rows(input, {s.rois * s.bins(), s.out_channels}, type);
  dispatch_types(type, [&](auto types) {
    using S = typename decltype(types)::Storage;
    using T = typename decltype(types)::Compute;
    const Tensor rows = rows_of(input, type);
    const Tensor boxes = dense<T>(rois);
    const std::optional<Tensor> shifts = dense_or_none<T>(offset);
    const Array<const S> map = array_of<const S>(rows);
    dispatch_pack<S>(channels_fit_packs<S>(s) && aligned_to_packs(map), [&](auto pack) {
      constexpr int N = decltype(pack)::value;
      launcher.for_each(
          "RoIPool",
          output.numel() / N,
          RoIPool<S, T, N>{
              Bins<T>(s, rule, boxes, shifts), ChannelPlaces(s), map, array_of<S>(output)});
    });
  });
  return map_of(output, pooled_h, pooled_w, input);
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
    bool deterministic) {
  check_device("grad_output", grad_output, input);
  check_device("rois", rois, input);
  check_device("offset", offset, input);
  const PoolShape s =
      pool_shape_of_gradient(grad_output, input, rois, offset, 1, sampling_ratio, need_offset);
  const RoIRule rule{spatial_scale, gamma, sampling_ratio, aligned};
  const Launcher launcher(input);
  const ScalarType type = input.scalar_type();
  return dispatch_types(type, [&](auto types) {
    using S = typename decltype(types)::Storage;
    using T = typename decltype(types)::Compute;
    const Tensor boxes = dense<T>(rois);
    const std::optional<Tensor> shifts = dense_or_none<T>(offset);
    const Bins<T> bins(s, rule, boxes, shifts);
    const Tensor gradient_rows = rows_of(grad_output, type);
    const Tensor input_rows = rows_of(input, type);
    const Array<const S> gradient = array_of<const S>(gradient_rows);
    const Array<const S> map = array_of<const S>(input_rows);
    const Tensor grad_input =
        need_input ? zero_rows(input_rows, {input_rows.size(0), s.in_channels}, scalar_type_of<T>())
                   : not_asked(input);
    const Tensor grad_offset =
        need_offset ? torch::stable::new_empty(*shifts, shifts->sizes()) : not_asked(rois);
    const bool packs =
        channels_fit_packs<S>(s) && aligned_to_packs(map) && aligned_to_packs(gradient);
    dispatch_pack<S>(packs, [&](auto pack) {
      constexpr int N = decltype(pack)::value;
      if (need_input && !deterministic) {
        launcher.for_each(
            "RoIPoolScatter",
            gradient.size / N,
            RoIPoolScatter<S, T, N>{bins, ChannelPlaces(s), gradient, array_of<T>(grad_input)});
      }
      if (need_input && deterministic) {
        const KeyGrid grid{s.batch * s.offset_groups, s.height, s.width, 0};
        for_each_sample_chunk(s, rule, [&](int64_t first, int64_t samples) {
          inverse_gather<T, N>(
              launcher,
              RoIPoolSource<S, T, N>{{bins, grid, first}, gradient, array_of<T>(grad_input)},
              samples,
              s.group_channels(),
              input_rows);
        });
      }
      if (need_offset) {
        launcher.for_each_sum(
            "RoIPoolOffsetGradient",
            s.rois * s.bins() * s.offset_groups,
            lanes_for(s.group_channels() / N),
            RoIPoolOffsetGradient<S, T, N>{
                bins, BinNumbers(s), gradient, map, array_of<T>(grad_offset)});
      }
    });
    return std::make_tuple(
        need_input ? map_of(grad_input, s.height, s.width, input) : grad_input,
        need_offset ? torch::stable::to(grad_offset, offset->scalar_type()) : grad_offset);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(d2_deform, D2_DEFORM_CUDA_KEY, m) {
  m.impl("deform_roi_pool", TORCH_BOX(&deform_roi_pool));
  m.impl("deform_roi_pool_backward", TORCH_BOX(&deform_roi_pool_backward));
}

}  // namespace d2_deform::cuda
