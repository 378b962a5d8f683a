// Deformable convolution, backward.
//
// A thread owns one panel of input channels at a time: its slices of the map, of the map's gradient and of the weight's
// gradient belong to nobody else. One pass over the samples of a tile reads each cell once and gives the sampled values
// (for the weight's gradient), the scatter (the map's) and the dot products (the offsets' and the mask's). So there are
// no atomics, nothing is gathered twice, and results are the same for any number of threads.
#include "../geometry.h"
#include "bands.h"
#include "deform_conv2d.h"

namespace d2_deform::cpu {
namespace {

constexpr int64_t kTile = 192;  // output pixels
// Tiles whose share of the weight's gradient is summed before it joins the total: a single long sum of float32 loses
// digits once the total dwarfs what is added.
constexpr int64_t kTilesPerSum = 8;

// A picture of which the output's gradient and the slices' shares of the offsets' take more than kPictureBytes, or its
// slice of the map and of its gradient more than kWindowBytes, is cut into bands; a band's shares take kBandBytes.
constexpr int64_t kPictureBytes = 10 << 20;
constexpr int64_t kBandBytes = 5 << 20;
constexpr int64_t kWindowBytes = 4 << 20;

// Which gradients are asked for.
struct Needs {
  bool input, offset, weight, bias, mask;

  bool samples() const { return input || offset || weight || mask; }
  bool offsets() const { return offset || mask; }
};

// Where the weights of one slice's channels for output o of its group begin in (out, in/groups, kh, kw): [channel][tap], without
// gaps. A depthwise slice has one "output", as each channel has its own.
inline int64_t weight_row(const ConvShape& s, const ChannelRun& slice, int64_t o) {
  if (s.depthwise()) return slice.first * s.taps();
  const int64_t row = slice.group * s.group_out() + o;
  return (row * s.group_in() + slice.first - slice.group * s.group_in()) * s.taps();
}

inline int64_t slice_outputs(const ConvShape& s) {
  return s.depthwise() ? 1 : s.group_out();
}

// weight -> the slice's layout, [tap][output][panel].
template <typename T>
void load_weight(
    const ConvShape& s, const ChannelRun& slice, int64_t panel, const T* weight, T* packed) {
  const int64_t outputs = slice_outputs(s);
  for (int64_t o = 0; o < outputs; ++o) {
    const T* row = weight + weight_row(s, slice, o);
    kernels<T>().transpose(
        slice.count, s.taps(), row, s.taps(), packed + o * panel, outputs * panel);
  }
}

// The way back, for the gradient: the first band's is stored, the others' are added. row: count * taps elements.
template <typename T>
void add_weight(
    const ConvShape& s,
    const ChannelRun& slice,
    int64_t panel,
    const T* packed,
    bool first,
    T* row,
    T* grad_weight) {
  const int64_t outputs = slice_outputs(s);
  for (int64_t o = 0; o < outputs; ++o) {
    T* out = grad_weight + weight_row(s, slice, o);
    kernels<T>().transpose(
        s.taps(), slice.count, packed + o * panel, outputs * panel, first ? out : row, s.taps());
    if (first) continue;
    for (int64_t i = 0; i < slice.count * s.taps(); ++i) out[i] += row[i];
  }
}

// What one thread works with: parts of one block of memory.
template <typename T>
struct BackwardWork {
  // The slice's channels of the cells that a band samples, and their gradient. One more than there are cells: where those
  // outside the map are read from (0) and written to.
  T *source, *grad_source;
  T* weight;                // of the slice
  T *grad_weight, *recent;  // its gradient, and the last tiles' share that it lacks
  T *grad_columns, *columns, *dots;
  int64_t map_size, weight_size;
  SamplingPlan<T> plan;

  // cells: of the largest band.
  static int64_t size(int64_t cells, int64_t panel, int64_t slice_weight) {
    return 2 * (cells + 1) * panel + 3 * slice_weight + kTile * (2 * panel + 4);
  }

  BackwardWork(T* memory, int64_t cells, int64_t panel, int64_t slice_weight)
      : map_size((cells + 1) * panel), weight_size(slice_weight), plan(kTile) {
    const auto take = [&memory](int64_t size) {
      T* taken = memory;
      memory += size;
      return taken;
    };
    source = take(map_size);
    grad_source = take(map_size);
    weight = take(weight_size);
    grad_weight = take(weight_size);
    recent = take(weight_size);
    grad_columns = take(kTile * panel);
    columns = take(kTile * panel);
    dots = take(kTile * 4);
    std::fill_n(recent, weight_size, T(0));
  }

  void add_recent() {
    for (int64_t i = 0; i < weight_size; ++i) grad_weight[i] += recent[i];
    std::fill_n(recent, weight_size, T(0));
  }
};

// What all slices of one band of a picture read.
template <typename T>
struct BandInputs {
  const T* grad_output;  // (the band's pixels, out_channels)
  const T* offset;       // of the picture
  const T* mask;         // likewise, or null
  int64_t first_pixel, pixels, first_cell, cells;
};

// Offset and mask gradients of one tap and tile from the dot products of its samples.
template <typename T>
void offset_gradients(
    const SamplingPlan<T>& plan,
    const T* dots,
    int64_t pixels,
    T* grad_y,
    T* grad_x,
    T* grad_mask) {
  for (int64_t q = 0; q < pixels; ++q, dots += 4) {
    const T ly = plan.arrays.ly[q];
    const T lx = plan.arrays.lx[q];
    if (ly < T(0)) {
      grad_y[q] = grad_x[q] = grad_mask[q] = T(0);
      continue;
    }
    T w[4], dy, dx;
    bilinear_weights(ly, lx, w);
    bilinear_derivatives(ly, lx, dots, &dy, &dx);
    grad_y[q] = dy * plan.mask(q);
    grad_x[q] = dx * plan.mask(q);
    grad_mask[q] = w[0] * dots[0] + w[1] * dots[1] + w[2] * dots[2] + w[3] * dots[3];
  }
}

// One slice of one band.
template <typename T>
void backward_slice(
    const ConvShape& s,
    const Needs& needs,
    const ChannelRun& slice,
    const BandInputs<T>& band,
    T* partial,  // (3 * taps, the band's pixels): this slice's share of the y, x and mask gradients
    BackwardWork<T>& work) {
  const Kernels<T>& kernel = kernels<T>();
  const int64_t panel = kernel.panel;
  const int64_t outputs = slice_outputs(s);
  const int64_t first_output = s.depthwise() ? slice.first : slice.group * s.group_out();
  for (int64_t pixel = 0; pixel < band.pixels; pixel += kTile) {
    const int64_t pixels = std::min(kTile, band.pixels - pixel);
    const T* grad_output = band.grad_output + pixel * s.out_channels + first_output;
    work.plan.choose_pixels(s, band.first_pixel + pixel, pixels);
    for (int64_t t = 0; t < s.taps(); ++t) {
      work.plan.make(
          s,
          band.offset,
          band.mask,
          slice.deform_group,
          t,
          band.first_cell,
          /*missing=*/band.cells);
      const T* tap_weight = work.weight + t * outputs * panel;
      T* grad_tap_weight = work.recent + t * outputs * panel;
      T* grad_columns = work.grad_columns;
      if (s.depthwise()) {
        std::fill_n(grad_columns, pixels * panel, T(0));
        kernel.multiply_add(
            pixels, slice.count, grad_output, s.out_channels, tap_weight, grad_columns, panel);
      } else {
        kernel.gemm(
            pixels,
            outputs,
            grad_output,
            s.out_channels,
            1,
            tap_weight,
            grad_columns,
            panel,
            /*accumulate=*/false,
            /*next_b=*/nullptr);
      }
      kernel.scatter(
          pixels,
          work.source,
          work.plan.arrays,
          grad_columns,
          work.grad_source,
          work.columns,
          work.dots);
      if (needs.weight && s.depthwise()) {
        kernel.multiply_reduce(
            pixels, slice.count, grad_output, s.out_channels, work.columns, panel, grad_tap_weight);
      } else if (needs.weight) {
        kernel.gemm(
            outputs,
            pixels,
            grad_output,
            1,
            s.out_channels,
            work.columns,
            grad_tap_weight,
            panel,
            /*accumulate=*/true,
            /*next_b=*/nullptr);
      }
      if (needs.offsets()) {
        T* grad_y = partial + 3 * t * band.pixels + pixel;
        T* grad_x = grad_y + band.pixels;
        T* grad_mask = grad_x + band.pixels;
        offset_gradients(work.plan, work.dots, pixels, grad_y, grad_x, grad_mask);
      }
    }
    if (needs.weight && (pixel / kTile + 1) % kTilesPerSum == 0) {
      work.add_recent();
    }
  }
  if (needs.weight) work.add_recent();
}

// Sums the slices' shares of one band's offset and mask gradients, in the order of the slices. grad_offset, grad_mask: of
// the picture.
template <typename T>
void reduce_partial(
    const ConvShape& s,
    const std::vector<ChannelRun>& slices,
    const BandInputs<T>& band,
    const T* partial,
    T* grad_offset,
    T* grad_mask) {
  const int64_t rows = s.deform_groups * s.taps();
  torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t t = row % s.taps();
      for (int64_t kind = 0; kind < 3; ++kind) {
        T* out = kind == 2 ? grad_mask : grad_offset;
        if (out == nullptr) continue;
        out += (kind == 2 ? row : 2 * row + kind) * s.pixels() + band.first_pixel;
        std::fill_n(out, band.pixels, T(0));
        for (size_t i = 0; i < slices.size(); ++i) {
          if (slices[i].deform_group != row / s.taps()) continue;
          const T* in = partial + (i * 3 * s.taps() + 3 * t + kind) * band.pixels;
          for (int64_t q = 0; q < band.pixels; ++q) out[q] += in[q];
        }
      }
    }
  });
}

// Adds some pixels to the bias's gradient; a thread owns output channels.
template <typename T>
void add_bias_gradient(
    const ConvShape& s, const T* grad_rows, int64_t pixels, std::vector<double>& grad_bias) {
  torch::stable::parallel_for(0, s.out_channels, 16, [&](int64_t begin, int64_t end) {
    for (int64_t q = 0; q < pixels; ++q) {
      for (int64_t o = begin; o < end; ++o) grad_bias[o] += grad_rows[q * s.out_channels + o];
    }
  });
}

struct Gradients {
  Tensor input, offset, weight, bias, mask;
};

// A gradient beside `like`; of a batch without pictures, zeros.
inline Tensor new_gradient(const ConvShape& s, const Tensor& like) {
  return s.batch > 0 ? torch::stable::new_empty(like, like.sizes())
                     : torch::stable::new_zeros(like, like.sizes());
}

template <typename S, typename T>
Gradients backward(
    const ConvShape& s,
    const Needs& needs,
    const Tensor& grad_output,
    const Tensor& input,
    const Tensor& offset,
    const Tensor& weight,
    const std::optional<Tensor>& mask) {
  constexpr int64_t kSize = sizeof(T);
  const int64_t panel = kernels<T>().panel;
  const std::vector<ChannelRun> slices = channel_runs(s, panel);
  const int64_t count = static_cast<int64_t>(slices.size());
  const int64_t workers = std::min<int64_t>(count, torch::stable::get_num_threads());
  const int64_t slice_weight = s.taps() * slice_outputs(s) * panel;

  const Tensor weight_t = dense<T>(weight);
  const T* weights = static_cast<const T*>(weight_t.data_ptr());
  const Tensor offset_t = dense<T>(offset);
  const T* offsets = static_cast<const T*>(offset_t.data_ptr());
  const std::optional<Tensor> mask_t = dense_or_none<T>(mask);
  const T* masks = data_or_null<T>(mask_t);
  const int64_t mask_size = s.deform_groups * s.taps() * s.pixels();

  // In T until all pictures are done, then cast to the tensors' own type.
  Tensor grad_input = not_asked(input);
  if (needs.input) {
    const std::vector<int64_t> sizes{s.batch, s.in_channels, s.height, s.width};
    grad_input = empty_as(input, sizes, input.scalar_type(), suggested_format(input));
  }
  const Tensor grad_weight = needs.weight ? new_gradient(s, weight_t) : not_asked(weight_t);
  const Tensor grad_offset = needs.offset ? new_gradient(s, offset_t) : not_asked(offset_t);
  const Tensor grad_mask = needs.mask ? new_gradient(s, *mask_t) : not_asked(offset_t);
  std::vector<double> grad_bias(s.out_channels, 0.0);

  // Channels-last gradients of the kernels' own type are read where they lie.
  const bool in_place = has_rows<S, T>(grad_output);
  const int64_t rows_of_pixel = in_place ? 0 : s.out_channels;
  const int64_t partial_of_pixel = needs.offsets() ? 3 * s.taps() * count : 0;
  const int64_t row_bytes = s.out_width * (rows_of_pixel + partial_of_pixel) * kSize;
  const int64_t cell_row_bytes = 2 * s.width * panel * kSize;
  // A band adds its share to a gradient that another has stored: of a half type, that would be rounded each time.
  const bool cut = std::is_same_v<S, T> && needs.samples() &&
                   (s.out_height * row_bytes > kPictureBytes ||
                    s.height * cell_row_bytes > kWindowBytes || forced_band_rows() > 0);
  const BandLimits limits = band_limits(
      s,
      row_bytes > 0 ? kBandBytes / row_bytes : s.out_height,
      kWindowBytes / 4 / cell_row_bytes,
      kWindowBytes / cell_row_bytes);
  if (cut && needs.input) torch::stable::zero_(grad_input);

  // One slice of one band of picture n.
  const auto add_slice = [&](int64_t n,
                             const ChannelRun& slice,
                             const BandInputs<T>& band,
                             T* slice_partial,
                             BackwardWork<T>& work) {
    const int64_t last_cell = band.first_cell + band.cells;
    const Picture<S> map = picture<S>(input, n).slice(slice.first, slice.count);
    // Channels that the slice lacks, and the cell outside the map, are 0.
    if (slice.count < panel) {
      std::fill_n(work.source, work.map_size, T(0));
      std::fill_n(work.weight, work.weight_size, T(0));
    }
    std::fill_n(work.source + band.cells * panel, panel, T(0));
    std::fill_n(work.grad_source, work.map_size, T(0));
    std::fill_n(work.grad_weight, work.weight_size, T(0));
    load_weight(s, slice, panel, weights, work.weight);
    load_rows(map, band.first_cell, last_cell, work.source, panel);
    if (needs.input && band.first_pixel > 0) {  // what earlier bands have added
      load_rows(
          picture<S>(grad_input, n).slice(slice.first, slice.count),
          band.first_cell,
          last_cell,
          work.grad_source,
          panel);
    }
    backward_slice(s, needs, slice, band, slice_partial, work);
    if (needs.weight) {
      add_weight(
          s,
          slice,
          panel,
          work.grad_weight,
          n == 0 && band.first_pixel == 0,
          work.weight,
          static_cast<T*>(grad_weight.data_ptr()));
    }
    if (needs.input) {
      store_rows(
          picture<S>(grad_input, n).slice(slice.first, slice.count),
          band.first_cell,
          last_cell,
          work.grad_source,
          panel);
    }
  };

  for (int64_t n = 0; n < s.batch; ++n) {
    const T* picture_offset = offsets + n * 2 * mask_size;
    const std::vector<Band> bands =
        cut ? cut_bands(s, picture_offset, limits) : std::vector<Band>{whole_picture(s)};
    const int64_t most_pixels = bands.front().rows() * s.out_width;
    const int64_t most_cells = most_map_rows(bands) * s.width;
    const int64_t work_size = round_up(BackwardWork<T>::size(most_cells, panel, slice_weight), 64);
    const int64_t rows_size = round_up(most_pixels * rows_of_pixel, 64);
    Buffer<T> memory(rows_size + workers * work_size + most_pixels * partial_of_pixel);
    T* grad_rows = memory.data();
    T* works = grad_rows + rows_size;
    T* partial = works + workers * work_size;
    for (const Band& band : bands) {
      const BandInputs<T> inputs{
          in_place ? reinterpret_cast<const T*>(picture<S>(grad_output, n).data) +
                         band.first * s.out_width * s.out_channels
                   : grad_rows,
          picture_offset,
          masks ? masks + n * mask_size : nullptr,
          band.first * s.out_width,
          band.rows() * s.out_width,
          band.top * s.width,
          band.map_rows() * s.width};
      if (!in_place) {
        load_picture_rows(picture<S>(grad_output, n), band.first, band.last, grad_rows);
      }
      if (needs.bias) add_bias_gradient(s, inputs.grad_output, inputs.pixels, grad_bias);
      if (!needs.samples()) continue;
      // A worker owns neighbouring slices.
      torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
        for (int64_t w = begin; w < end; ++w) {
          BackwardWork<T> work(works + w * work_size, most_cells, panel, slice_weight);
          for (int64_t i = w * count / workers; i < (w + 1) * count / workers; ++i) {
            add_slice(n, slices[i], inputs, partial + i * 3 * s.taps() * inputs.pixels, work);
          }
        }
      });
      if (needs.offsets()) {
        reduce_partial(
            s,
            slices,
            inputs,
            partial,
            needs.offset ? static_cast<T*>(grad_offset.data_ptr()) + n * 2 * mask_size : nullptr,
            needs.mask ? static_cast<T*>(grad_mask.data_ptr()) + n * mask_size : nullptr);
      }
    }
  }

  Gradients gradients{
      grad_input,
      torch::stable::to(grad_offset, offset.scalar_type()),
      torch::stable::to(grad_weight, weight.scalar_type()),
      not_asked(input),
      torch::stable::to(grad_mask, mask.has_value() ? mask->scalar_type() : offset.scalar_type())};
  if (needs.bias) {
    gradients.bias = torch::stable::new_zeros(input, std::vector<int64_t>{s.out_channels});
    S* out = static_cast<S*>(gradients.bias.data_ptr());
    for (int64_t o = 0; o < s.out_channels; ++o) out[o] = static_cast<S>(T(grad_bias[o]));
  }
  return gradients;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> deform_conv2d_backward(
    const Tensor& grad_output,
    const Tensor& input,
    const Tensor& offset,
    const Tensor& weight,
    const std::optional<Tensor>& mask,
    int64_t stride_h,
    int64_t stride_w,
    int64_t pad_h,
    int64_t pad_w,
    int64_t dilation_h,
    int64_t dilation_w,
    bool need_input,
    bool need_offset,
    bool need_weight,
    bool need_bias,
    bool need_mask,
    bool /*deterministic: always*/) {
  const ConvShape s = conv_shape(
      input, offset, weight, mask, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w);
  check_cells(s);
  STD_TORCH_CHECK(
      grad_output.dim() == 4 && grad_output.size(0) == s.batch &&
          grad_output.size(1) == s.out_channels && grad_output.size(2) == s.out_height &&
          grad_output.size(3) == s.out_width && grad_output.scalar_type() == input.scalar_type(),
      "grad_output: expected the shape and type of the output");
  STD_TORCH_CHECK(
      !need_mask || mask.has_value(), "mask: its gradient is asked for, but it is absent");
  const Needs needs{need_input, need_offset, need_weight, need_bias, need_mask};
  const Gradients gradients = dispatch_types(input.scalar_type(), [&](auto types) {
    using Ts = decltype(types);
    return backward<typename Ts::Storage, typename Ts::Compute>(
        s, needs, grad_output, input, offset, weight, mask);
  });
  return {gradients.input, gradients.offset, gradients.weight, gradients.bias, gradients.mask};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(d2_deform, CPU, m) {
  m.impl("deform_conv2d_backward", TORCH_BOX(&deform_conv2d_backward));
}

}  // namespace d2_deform::cpu
