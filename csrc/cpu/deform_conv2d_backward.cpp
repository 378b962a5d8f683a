// Deformable convolution, backward.
//
// A thread owns one panel of input channels at a time: its slices of the map, of the map's gradient and of the weight's
// gradient belong to nobody else. One pass over the samples of a tile reads each cell once and gives the sampled values
// (for the weight's gradient), the scatter (the map's) and the dot products (the offsets' and the mask's). So there are
// no atomics, nothing is gathered twice, and results are the same for any number of threads.
#include "../geometry.h"
#include "deform_conv2d.h"

namespace d2_deform::cpu {
namespace {

constexpr int64_t kTile = 192;  // output pixels
// Tiles whose share of the weight's gradient is summed before it joins the total: a single long sum of float32 loses
// digits once the total dwarfs what is added.
constexpr int64_t kTilesPerSum = 8;

// Which gradients are asked for.
struct Needs {
  bool input, offset, weight, bias, mask;

  bool samples() const { return input || offset || weight || mask; }
  bool offsets() const { return offset || mask; }
};

// Visits the elements of weight (out, in/groups, kh, kw) beside those of one slice's layout: [tap][output][panel], or
// depthwise [tap][panel]. f(element of the weight, element of the slice).
template <typename W, typename T, typename F>
void for_each_weight(
    const ConvShape& s, const ChannelRun& slice, int64_t panel, W* weight, T* packed, const F& f) {
  const int64_t taps = s.taps();
  if (s.depthwise()) {
    for (int64_t c = 0; c < slice.count; ++c) {
      for (int64_t t = 0; t < taps; ++t) {
        f(weight[(slice.first + c) * taps + t], packed[t * panel + c]);
      }
    }
    return;
  }
  for (int64_t o = 0; o < s.group_out(); ++o) {
    const int64_t row = (slice.group * s.group_out() + o) * s.group_in();
    const int64_t first = slice.first - slice.group * s.group_in();
    for (int64_t t = 0; t < taps; ++t) {
      W* in = weight + (row + first) * taps + t;
      T* out = packed + (t * s.group_out() + o) * panel;
      for (int64_t c = 0; c < slice.count; ++c) f(in[c * taps], out[c]);
    }
  }
}

// What one thread works with.
template <typename T>
struct BackwardWork {
  SamplingPlan<T> plan;
  Buffer<T> grad_columns, columns, dots;
  // The slice's channels of one picture, and their gradient. One row more than the map has: where cells outside the map
  // are read from (0) and written to.
  Buffer<T> source, grad_source;
  Buffer<T> weight;               // of the slice
  Buffer<T> grad_weight, recent;  // its gradient, and the last tiles' share that it lacks

  BackwardWork(const ConvShape& s, int64_t panel, int64_t slice_weight)
      : plan(kTile),
        grad_columns(kTile * panel),
        columns(kTile * panel),
        dots(kTile * 4),
        source((s.cells() + 1) * panel, T(0)),
        grad_source(source.size()),
        weight(slice_weight, T(0)),
        grad_weight(slice_weight),
        recent(slice_weight, T(0)) {}

  void add_recent() {
    for (int64_t i = 0; i < recent.size(); ++i) grad_weight.data()[i] += recent.data()[i];
    recent.fill(T(0));
  }
};

// What all slices of one picture read.
template <typename T>
struct PictureInputs {
  const T* grad_output;  // (pixels, out_channels)
  const T* offset;
  const T* mask;  // or null
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

// One slice of one picture.
template <typename T>
void backward_slice(
    const ConvShape& s,
    const Needs& needs,
    const ChannelRun& slice,
    const PictureInputs<T>& picture,
    T* partial,  // (3 * taps, pixels): this slice's share of the y, x and mask gradients
    BackwardWork<T>& work) {
  const Kernels<T>& kernel = kernels<T>();
  const int64_t panel = kernel.panel;
  const int64_t outputs = s.depthwise() ? 1 : s.group_out();
  const int64_t first_output = s.depthwise() ? slice.first : slice.group * s.group_out();
  for (int64_t pixel = 0; pixel < s.pixels(); pixel += kTile) {
    const int64_t pixels = std::min(kTile, s.pixels() - pixel);
    const T* grad_output = picture.grad_output + pixel * s.out_channels + first_output;
    work.plan.choose_pixels(s, pixel, pixels);
    for (int64_t t = 0; t < s.taps(); ++t) {
      work.plan.make(
          s,
          picture.offset,
          picture.mask,
          slice.deform_group,
          t,
          /*missing=*/s.cells());
      const T* tap_weight = work.weight.data() + t * outputs * panel;
      T* grad_tap_weight = work.recent.data() + t * outputs * panel;
      T* grad_columns = work.grad_columns.data();
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
          work.source.data(),
          work.plan.arrays,
          grad_columns,
          work.grad_source.data(),
          work.columns.data(),
          work.dots.data());
      if (needs.weight && s.depthwise()) {
        kernel.multiply_reduce(
            pixels,
            slice.count,
            grad_output,
            s.out_channels,
            work.columns.data(),
            panel,
            grad_tap_weight);
      } else if (needs.weight) {
        kernel.gemm(
            outputs,
            pixels,
            grad_output,
            1,
            s.out_channels,
            work.columns.data(),
            grad_tap_weight,
            panel,
            /*accumulate=*/true,
            /*next_b=*/nullptr);
      }
      if (needs.offsets()) {
        T* grad_y = partial + 3 * t * s.pixels() + pixel;
        T* grad_x = grad_y + s.pixels();
        T* grad_mask = grad_x + s.pixels();
        offset_gradients(work.plan, work.dots.data(), pixels, grad_y, grad_x, grad_mask);
      }
    }
    if (needs.weight && (pixel / kTile + 1) % kTilesPerSum == 0) {
      work.add_recent();
    }
  }
  if (needs.weight) work.add_recent();
}

// Sums the slices' shares of the offset and mask gradients of one picture, in the order of the slices.
template <typename T>
void reduce_partial(
    const ConvShape& s,
    const std::vector<ChannelRun>& slices,
    const Buffer<T>& partial,
    T* grad_offset,
    T* grad_mask) {
  const int64_t rows = s.deform_groups * s.taps();
  torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t t = row % s.taps();
      for (int64_t kind = 0; kind < 3; ++kind) {
        T* out = kind == 2 ? grad_mask : grad_offset;
        if (out == nullptr) continue;
        out += (kind == 2 ? row : 2 * row + kind) * s.pixels();
        std::fill_n(out, s.pixels(), T(0));
        for (size_t i = 0; i < slices.size(); ++i) {
          if (slices[i].deform_group != row / s.taps()) continue;
          const T* in = partial.data() + (i * 3 * s.taps() + 3 * t + kind) * s.pixels();
          for (int64_t q = 0; q < s.pixels(); ++q) out[q] += in[q];
        }
      }
    }
  });
}

// Adds one picture to the bias's gradient; a thread owns output channels.
template <typename T>
void add_bias_gradient(const ConvShape& s, const T* grad_rows, std::vector<double>& grad_bias) {
  torch::stable::parallel_for(0, s.out_channels, 16, [&](int64_t begin, int64_t end) {
    for (int64_t q = 0; q < s.pixels(); ++q) {
      for (int64_t o = begin; o < end; ++o) grad_bias[o] += grad_rows[q * s.out_channels + o];
    }
  });
}

struct Gradients {
  Tensor input, offset, weight, bias, mask;
};

template <typename S, typename T>
void backward(
    const ConvShape& s,
    const Needs& needs,
    const Tensor& grad_output,
    const Tensor& input,
    const Tensor& offset,
    const Tensor& weight,
    const std::optional<Tensor>& mask,
    Gradients& gradients) {
  const int64_t panel = kernels<T>().panel;
  const std::vector<ChannelRun> slices = channel_runs(s, panel);
  const int64_t count = static_cast<int64_t>(slices.size());
  const int64_t slice_weight = s.taps() * (s.depthwise() ? 1 : s.group_out()) * panel;
  const int64_t slice_partial = needs.offsets() ? 3 * s.taps() * s.pixels() : 0;

  const Tensor weight_t = dense<T>(weight);
  const T* weights = static_cast<const T*>(weight_t.data_ptr());
  const Tensor grad_weight_t =
      needs.weight ? torch::stable::new_empty(weight_t, weight_t.sizes()) : not_asked(weight_t);
  const Tensor offset_t = dense<T>(offset);
  const std::optional<Tensor> mask_t = dense_or_none<T>(mask);
  // In T until all pictures are done, then cast to the tensors' own type.
  const Tensor grad_offset_t =
      needs.offset ? torch::stable::new_empty(offset_t, offset_t.sizes()) : not_asked(offset_t);
  const Tensor grad_mask_t =
      needs.mask ? torch::stable::new_empty(*mask_t, mask_t->sizes()) : not_asked(offset_t);
  const int64_t mask_size = s.deform_groups * s.taps() * s.pixels();
  Buffer<T> partial(count * slice_partial);
  Buffer<T> grad_rows(s.pixels() * s.out_channels);
  std::vector<double> grad_bias(s.out_channels, 0.0);

  for (int64_t n = 0; n < s.batch; ++n) {
    torch::stable::parallel_for(0, s.out_height, 4, [&](int64_t begin, int64_t end) {
      load_rows(
          picture<S>(grad_output, n),
          begin * s.out_width,
          end * s.out_width,
          grad_rows.data() + begin * s.out_width * s.out_channels,
          s.out_channels);
    });
    if (needs.bias) add_bias_gradient(s, grad_rows.data(), grad_bias);
    if (!needs.samples()) continue;
    const PictureInputs<T> inputs{
        grad_rows.data(),
        static_cast<const T*>(offset_t.data_ptr()) + n * 2 * mask_size,
        mask_t ? data_or_null<T>(mask_t) + n * mask_size : nullptr};
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      BackwardWork<T> work(s, panel, slice_weight);
      for (int64_t i = begin; i < end; ++i) {
        const ChannelRun& slice = slices[i];
        if (slice.count < panel) {
          work.source.fill(T(0));
          work.weight.fill(T(0));
        }
        work.grad_source.fill(T(0));
        work.grad_weight.fill(T(0));
        for_each_weight(
            s, slice, panel, weights, work.weight.data(), [](const T& w, T& p) { p = w; });
        load_rows(
            picture<S>(input, n).slice(slice.first, slice.count),
            0,
            s.cells(),
            work.source.data(),
            panel);
        backward_slice(s, needs, slice, inputs, partial.data() + i * slice_partial, work);
        if (needs.weight) {
          for_each_weight(
              s,
              slice,
              panel,
              static_cast<T*>(grad_weight_t.data_ptr()),
              work.grad_weight.data(),
              [n](T& w, const T& p) { w = n == 0 ? p : w + p; });
        }
        if (needs.input) {
          store_rows(
              picture<S>(gradients.input, n).slice(slice.first, slice.count),
              0,
              s.cells(),
              work.grad_source.data(),
              panel);
        }
      }
    });
    if (needs.offsets()) {
      reduce_partial(
          s,
          slices,
          partial,
          needs.offset ? static_cast<T*>(grad_offset_t.data_ptr()) + n * 2 * mask_size : nullptr,
          needs.mask ? static_cast<T*>(grad_mask_t.data_ptr()) + n * mask_size : nullptr);
    }
  }

  if (needs.offset) gradients.offset = torch::stable::to(grad_offset_t, offset.scalar_type());
  if (needs.mask) gradients.mask = torch::stable::to(grad_mask_t, mask->scalar_type());
  if (needs.bias) {
    S* out = static_cast<S*>(gradients.bias.data_ptr());
    for (int64_t o = 0; o < s.out_channels; ++o) out[o] = static_cast<S>(T(grad_bias[o]));
  }
  if (needs.weight) {
    gradients.weight = torch::stable::to(grad_weight_t, weight.scalar_type());
  }
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
  const std::vector<int64_t> input_size{s.batch, s.in_channels, s.height, s.width};
  const std::vector<int64_t> bias_size{s.out_channels};
  Gradients gradients{
      need_input ? empty_as(input, input_size, input.scalar_type(), suggested_format(input))
                 : not_asked(input),
      need_offset ? torch::stable::new_zeros(offset, offset.sizes()) : not_asked(offset),
      need_weight ? torch::stable::new_zeros(weight, weight.sizes()) : not_asked(weight),
      need_bias ? torch::stable::new_zeros(input, bias_size) : not_asked(input),
      need_mask ? torch::stable::new_zeros(*mask, mask->sizes()) : not_asked(offset)};
  if (s.batch > 0) {
    const Needs needs{need_input, need_offset, need_weight, need_bias, need_mask};
    dispatch_types(input.scalar_type(), [&](auto types) {
      using Ts = decltype(types);
      backward<typename Ts::Storage, typename Ts::Compute>(
          s, needs, grad_output, input, offset, weight, mask, gradients);
    });
  }
  return {gradients.input, gradients.offset, gradients.weight, gradients.bias, gradients.mask};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(d2_deform, CPU, m) {
  m.impl("deform_conv2d_backward", TORCH_BOX(&deform_conv2d_backward));
}

}  // namespace d2_deform::cpu
