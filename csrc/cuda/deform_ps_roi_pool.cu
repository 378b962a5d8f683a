// Deformable position-sensitive RoI pooling: a thread does one output channel of one bin.
//
// Every bin reads a map of its own, so that neighbouring threads share no memory whatever the layout; the map is read where
// it lies, with its strides. Backward as in deform_roi_pool.cu.
#include "bin_samples.h"

namespace d2_deform::cuda {
namespace {

// Channel of the score map that bin `bin` of output channel c reads.
struct Channels {
  PoolShape shape;

  D2_DEFORM_HOST_DEVICE int64_t position(int64_t bin) const {
    const int64_t gh = group_cell(bin / shape.pooled_w, shape.pooled_h, shape.group_size);
    const int64_t gw = group_cell(bin % shape.pooled_w, shape.pooled_w, shape.group_size);
    return gh * shape.group_size + gw;
  }

  D2_DEFORM_HOST_DEVICE int64_t grid() const { return shape.group_size * shape.group_size; }

  D2_DEFORM_HOST_DEVICE int64_t channel(int64_t c, int64_t bin) const {
    return c * grid() + position(bin);
  }
};

// A map (N, C, H, W) with any strides.
template <typename S>
struct Strided {
  Array<const S> array;
  int64_t image, channel, row, column;

  explicit Strided(const Tensor& map)
      : array{static_cast<const S*>(map.data_ptr()), 1},
        image(map.stride(0)),
        channel(map.stride(1)),
        row(map.stride(2)),
        column(map.stride(3)) {
    for (int64_t d = 0; d < 4; ++d) array.size += (map.size(d) - 1) * map.stride(d);
    if (map.numel() == 0) array.size = 0;
  }

  D2_DEFORM_HOST_DEVICE S at(int64_t n, int64_t c, int64_t y, int64_t x) const {
    return array[n * image + c * channel + y * row + x * column];
  }
};

// Which output element (R, C, Ph, Pw) a thread does.
struct OutputPlaces {
  Divider<uint64_t> by_bins, by_channels;
  Divider<uint32_t> by_group;

  explicit OutputPlaces(const PoolShape& s)
      : by_bins(s.bins()), by_channels(s.out_channels), by_group(s.group_channels()) {}

  struct Place {
    int64_t roi, channel, offset_group, bin;
  };

  D2_DEFORM_HOST_DEVICE Place place(int64_t element) const {
    uint64_t bin = static_cast<uint64_t>(element);
    uint64_t channel = by_bins.split(bin);
    const int64_t roi = static_cast<int64_t>(by_channels.split(channel));
    const int64_t offset_group = by_group.quotient(static_cast<uint32_t>(channel));
    return {roi, static_cast<int64_t>(channel), offset_group, static_cast<int64_t>(bin)};
  }
};

template <typename S, typename T>
struct PSRoIPool {
  Bins<T> bins;
  OutputPlaces places;
  Strided<S> input;
  Array<S> output;  // (R, C, Ph, Pw)

  D2_DEFORM_HOST_DEVICE void operator()(int64_t i) const {
    const auto place = places.place(i);
    const Bin<T> bin = bins.at(place.roi, place.offset_group, place.bin);
    const int64_t channel = Channels{bins.shape}.channel(place.channel, place.bin);
    T sum = T(0);
    bin.for_each_cell([&](int64_t y, int64_t x, T weight, T, T) {
      sum += weight * static_cast<T>(input.at(bin.image, channel, y, x));
    });
    output[i] = static_cast<S>(sum);
  }
};

template <typename S, typename T>
struct PSRoIPoolScatter {
  Bins<T> bins;
  OutputPlaces places;
  Array<const S> grad_output;  // (R, C, Ph, Pw)
  Array<T> grad_input;         // (N, C * group_size**2, H, W)

  D2_DEFORM_HOST_DEVICE void operator()(int64_t i) const {
    const PoolShape& s = bins.shape;
    const auto place = places.place(i);
    const Bin<T> bin = bins.at(place.roi, place.offset_group, place.bin);
    const int64_t channel = Channels{s}.channel(place.channel, place.bin);
    const T gradient = static_cast<T>(grad_output[i]);
    bin.for_each_cell([&](int64_t y, int64_t x, T weight, T, T) {
      const T part[1] = {weight * gradient};
      const int64_t plane = bin.image * s.in_channels + channel;
      grad_input.atomic_add((plane * s.height + y) * s.width + x, part);
    });
  }
};

// The lanes of one bin and offset group share its channels; sums: along x, along y.
template <typename S, typename T>
struct PSRoIPoolOffsetGradient {
  using Result = Sums<T, 2>;

  Bins<T> bins;
  BinNumbers numbers;
  Array<const S> grad_output;  // (R, C, Ph, Pw)
  Strided<S> input;
  Array<T> grad_offset;  // (R, 2K, Ph, Pw)

  D2_DEFORM_HOST_DEVICE Result share(int64_t i, int lane, int lanes) const {
    const PoolShape& s = bins.shape;
    const BinPlace p = numbers.place(i);
    const Bin<T> bin = bins.at(p.roi, p.offset_group, p.bin);
    const int64_t end = (p.offset_group + 1) * s.group_channels();
    Result along{};
    for (int64_t c = p.offset_group * s.group_channels() + lane; c < end; c += lanes) {
      const int64_t channel = Channels{s}.channel(c, p.bin);
      const T gradient =
          static_cast<T>(grad_output[(p.roi * s.out_channels + c) * s.bins() + p.bin]);
      bin.for_each_cell([&](int64_t y, int64_t x, T, T by_y, T by_x) {
        const T dot = gradient * static_cast<T>(input.at(bin.image, channel, y, x));
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

// For inverse_gather.h: the channels of an offset group of a picture that serve one cell of the grid are a map of their own.
template <typename S, typename T>
struct PSRoIPoolSource : BinSamples<T> {
  Array<const S> grad_output;  // (R, C, Ph, Pw)
  Array<T> grad_input;         // (N, C * group_size**2, H, W)

  D2_DEFORM_HOST_DEVICE int64_t key(int64_t number) const {
    const PoolShape& s = this->bins.shape;
    const BinSample<T> sample = this->sample(number);
    const Channels channels{s};
    const int64_t group = sample.image * s.offset_groups + sample.offset_group;
    const int64_t position = channels.position(this->bin_place(number).bin);
    return this->key_in(group * channels.grid() + position, sample);
  }

  D2_DEFORM_HOST_DEVICE void gradient(int64_t number, int64_t channel, T (&out)[1]) const {
    const PoolShape& s = this->bins.shape;
    const BinPlace p = this->bin_place(number);
    const int64_t c = p.offset_group * s.group_channels() + channel;
    out[0] = static_cast<T>(grad_output[(p.roi * s.out_channels + c) * s.bins() + p.bin]);
  }

  D2_DEFORM_HOST_DEVICE void add(
      int64_t map, int64_t cell, int64_t channel, const T (&sum)[1]) const {
    const PoolShape& s = this->bins.shape;
    const int64_t grid = Channels{s}.grid();
    const int64_t group = map / grid;  // of all pictures
    const int64_t c = group * s.group_channels() + channel;
    grad_input[(c * grid + map % grid) * s.cells() + cell] += sum[0];
  }
};

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
  check_device("rois", rois, input);
  check_device("offset", offset, input);
  const PoolShape s =
      pool_shape(input, rois, offset, pooled_h, pooled_w, group_size, sampling_ratio);
  const RoIRule rule{spatial_scale, gamma, sampling_ratio, aligned};
  const Launcher launcher(input);
  const ScalarType type = input.scalar_type();
  const Tensor output = empty_rows(input, {s.rois, s.out_channels, pooled_h, pooled_w}, type);
  dispatch_types(type, [&](auto types) {
    using S = typename decltype(types)::Storage;
    using T = typename decltype(types)::Compute;
    const Tensor boxes = dense<T>(rois);
    const std::optional<Tensor> shifts = dense_or_none<T>(offset);
    launcher.for_each(
        "PSRoIPool",
        output.numel(),
        PSRoIPool<S, T>{
            Bins<T>(s, rule, boxes, shifts),
            OutputPlaces(s),
            Strided<S>(input),
            array_of<S>(output)});
  });
  return torch::stable::contiguous(output, suggested_format(input));
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
    bool deterministic) {
  check_device("grad_output", grad_output, input);
  check_device("rois", rois, input);
  check_device("offset", offset, input);
  const PoolShape s = pool_shape_of_gradient(
      grad_output, input, rois, offset, group_size, sampling_ratio, need_offset);
  const RoIRule rule{spatial_scale, gamma, sampling_ratio, aligned};
  const Launcher launcher(input);
  return dispatch_types(input.scalar_type(), [&](auto types) {
    using S = typename decltype(types)::Storage;
    using T = typename decltype(types)::Compute;
    const Tensor boxes = dense<T>(rois);
    const std::optional<Tensor> shifts = dense_or_none<T>(offset);
    const Bins<T> bins(s, rule, boxes, shifts);
    const Tensor planes = torch::stable::contiguous(grad_output);
    const Array<const S> gradient = array_of<const S>(planes);
    const std::vector<int64_t> sizes{s.batch, s.in_channels, s.height, s.width};
    const Tensor grad_input =
        need_input ? zero_rows(input, sizes, scalar_type_of<T>()) : not_asked(input);
    const Tensor grad_offset =
        need_offset ? torch::stable::new_empty(*shifts, shifts->sizes()) : not_asked(rois);
    if (need_input && !deterministic) {
      launcher.for_each(
          "PSRoIPoolScatter",
          gradient.size,
          PSRoIPoolScatter<S, T>{bins, OutputPlaces(s), gradient, array_of<T>(grad_input)});
    }
    if (need_input && deterministic) {
      const int64_t maps = s.batch * s.offset_groups * group_size * group_size;
      for_each_sample_chunk(s, rule, [&](int64_t first, int64_t samples) {
        inverse_gather<T, 1>(
            launcher,
            PSRoIPoolSource<S, T>{
                {bins, KeyGrid{maps, s.height, s.width, 0}, first},
                gradient,
                array_of<T>(grad_input)},
            samples,
            s.group_channels(),
            input);
      });
    }
    if (need_offset) {
      launcher.for_each_sum(
          "PSRoIPoolOffsetGradient",
          s.rois * s.bins() * s.offset_groups,
          lanes_for(s.group_channels()),
          PSRoIPoolOffsetGradient<S, T>{
              bins, BinNumbers(s), gradient, Strided<S>(input), array_of<T>(grad_offset)});
    }
    return std::make_tuple(
        need_input ? result_as(grad_input, input, suggested_format(input)) : grad_input,
        need_offset ? torch::stable::to(grad_offset, offset->scalar_type()) : grad_offset);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(d2_deform, D2_DEFORM_CUDA_KEY, m) {
  m.impl("deform_ps_roi_pool", TORCH_BOX(&deform_ps_roi_pool));
  m.impl("deform_ps_roi_pool_backward", TORCH_BOX(&deform_ps_roi_pool_backward));
}

}  // namespace d2_deform::cuda
