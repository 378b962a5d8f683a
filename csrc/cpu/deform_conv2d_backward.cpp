// Deformable convolution, backward.
//
// A thread owns one panel of input channels at a time: its slices of the map, of the map's gradient and of the weight's
// gradient belong to nobody else. One pass over the samples of a tile reads each cell once and gives the sampled values
// (for the weight's gradient), the scatter (the map's) and the dot products (the offsets' and the mask's). So there are
// no atomics, nothing is gathered twice, and results are the same for any number of threads.
#include "deform_conv2d.h"
#include "kernels.h"

namespace d2_deform::cpu {
namespace {

constexpr int64_t kTile = 96;  // output pixels

// A run of at most a panel of channels that share their group and their deformable group.
struct Slice {
  int64_t first, count, group, deform_group;
};

std::vector<Slice> channel_slices(const ConvShape& s, int64_t panel) {
  std::vector<Slice> slices;
  for (int64_t c = 0; c < s.in_channels;) {
    const int64_t deform_group = c / s.deform_channels();
    int64_t end = std::min((deform_group + 1) * s.deform_channels(), c + panel);
    const int64_t group = c / s.group_in();
    if (!s.depthwise()) end = std::min(end, (group + 1) * s.group_in());
    slices.push_back({c, end - c, group, deform_group});
    c = end;
  }
  return slices;
}

// Visits the elements of weight (out, in/groups, kh, kw) beside those of one slice's layout: [tap][output][panel], or
// depthwise [tap][panel]. f(element of the weight, element of the slice).
template <typename W, typename T, typename F>
void for_each_weight(
    const ConvShape& s, const Slice& slice, int64_t panel, W* weight, T* packed, const F& f) {
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
    for (int64_t c = 0; c < slice.count; ++c) {
      for (int64_t t = 0; t < taps; ++t) {
        f(weight[(row + first + c) * taps + t], packed[(t * s.group_out() + o) * panel + c]);
      }
    }
  }
}

template <typename T>
struct BackwardTile {
  SamplingPlan<T> plan;
  std::vector<T> grad_columns, columns, dots;

  BackwardTile(int64_t panel)
      : plan(kTile), grad_columns(kTile * panel), columns(kTile * panel), dots(kTile * 4) {}
};

// Everything about one picture that its slices share.
template <typename T>
struct PictureGradients {
  const T* grad_output;  // (pixels, out_channels)
  const T* offset;
  const T* mask;  // or null
};

template <typename T>
void backward_slice(
    const ConvShape& s,
    const Slice& slice,
    const PictureGradients<T>& picture,
    const T* packed_weight,
    const T* source,
    T* grad_source,
    T* grad_packed_weight,
    T* partial,  // (3 * taps, pixels): this slice's share of the y, x and mask gradients; or null
    BackwardTile<T>& work) {
  const Kernels<T>& kernel = kernels<T>();
  const int64_t panel = kernel.panel;
  const int64_t outputs = s.depthwise() ? 1 : s.group_out();
  const int64_t first_output = s.depthwise() ? slice.first : slice.group * s.group_out();
  for (int64_t pixel = 0; pixel < s.pixels(); pixel += kTile) {
    const int64_t pixels = std::min(kTile, s.pixels() - pixel);
    const T* grad_output = picture.grad_output + pixel * s.out_channels + first_output;
    for (int64_t t = 0; t < s.taps(); ++t) {
      work.plan.make(
          s,
          picture.offset,
          picture.mask,
          slice.deform_group,
          t,
          pixel,
          pixels,
          /*missing=*/s.cells());
      const T* tap_weight = packed_weight + t * outputs * panel;
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
            /*accumulate=*/false);
      }
      kernel.scatter(
          pixels,
          source,
          work.plan.index.data(),
          work.plan.weight.data(),
          grad_columns,
          grad_source,
          work.columns.data(),
          work.dots.data());
      T* grad_tap_weight = grad_packed_weight + t * outputs * panel;
      if (s.depthwise()) {
        kernel.multiply_reduce(
            pixels,
            slice.count,
            grad_output,
            s.out_channels,
            work.columns.data(),
            panel,
            grad_tap_weight);
      } else {
        kernel.gemm(
            outputs,
            pixels,
            grad_output,
            1,
            s.out_channels,
            work.columns.data(),
            grad_tap_weight,
            panel,
            /*accumulate=*/true);
      }
      if (partial == nullptr) continue;
      for (int64_t q = 0; q < pixels; ++q) {
        const BilinearSample<T>& sample = work.plan.samples[q];
        T dy = 0, dx = 0, value = 0;
        if (sample.inside) {
          T w[4];
          bilinear_weights(sample, w);
          bilinear_derivatives(sample, &work.dots[4 * q], &dy, &dx);
          for (int j = 0; j < 4; ++j) value += w[j] * work.dots[4 * q + j];
        }
        partial[(3 * t + 0) * s.pixels() + pixel + q] = dy * work.plan.mask[q];
        partial[(3 * t + 1) * s.pixels() + pixel + q] = dx * work.plan.mask[q];
        partial[(3 * t + 2) * s.pixels() + pixel + q] = value;
      }
    }
  }
}

// Sums the slices' shares of the offset and mask gradients of one picture, in the order of the slices.
template <typename T>
void reduce_partial(
    const ConvShape& s,
    const std::vector<Slice>& slices,
    const std::vector<T>& partial,
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

struct Gradients {
  Tensor input, offset, weight, mask;
};

template <typename S, typename T>
void backward(
    const ConvShape& s,
    const Tensor& grad_output,
    const Tensor& input,
    const Tensor& offset,
    const Tensor& weight,
    const std::optional<Tensor>& mask,
    bool need_input,
    bool need_offset,
    bool need_weight,
    bool need_mask,
    Gradients& gradients) {
  const Kernels<T>& kernel = kernels<T>();
  const int64_t panel = kernel.panel;
  const std::vector<Slice> slices = channel_slices(s, panel);
  const int64_t count = static_cast<int64_t>(slices.size());
  const int64_t slice_weight = s.taps() * (s.depthwise() ? 1 : s.group_out()) * panel;
  const bool need_partial = need_offset || need_mask;

  const Tensor weight_t = dense<T>(weight);
  std::vector<T> packed(count * slice_weight, T(0));
  std::vector<T> grad_packed(count * slice_weight, T(0));
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for_each_weight(
          s,
          slices[i],
          panel,
          static_cast<const T*>(weight_t.data_ptr()),
          packed.data() + i * slice_weight,
          [](const T& w, T& p) { p = w; });
    }
  });

  const Tensor offset_t = dense<T>(offset);
  const std::optional<Tensor> mask_t = dense_or_none<T>(mask);
  // Kept in T until all pictures are done; cast to the tensors' own type at the end.
  const int64_t mask_size = s.deform_groups * s.taps() * s.pixels();
  const Tensor grad_offset_t =
      need_offset ? torch::stable::new_empty(offset_t, offset_t.sizes()) : not_asked(offset_t);
  const Tensor grad_mask_t =
      need_mask ? torch::stable::new_empty(*mask_t, mask_t->sizes()) : not_asked(offset_t);
  std::vector<T> partial(need_partial ? count * 3 * s.taps() * s.pixels() : 0);
  std::vector<T> grad_rows(s.pixels() * s.out_channels);

  for (int64_t n = 0; n < s.batch; ++n) {
    torch::stable::parallel_for(0, s.out_height, 4, [&](int64_t begin, int64_t end) {
      load_rows(picture<S>(grad_output, n), begin, end, grad_rows.data(), s.out_channels);
    });
    const PictureGradients<T> shared{
        grad_rows.data(),
        static_cast<const T*>(offset_t.data_ptr()) + n * 2 * mask_size,
        mask_t ? data_or_null<T>(mask_t) + n * mask_size : nullptr};
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      BackwardTile<T> work(panel);
      // One row more than the map has: where cells outside the map are read from (0) and written to.
      std::vector<T> source((s.cells() + 1) * panel);
      std::vector<T> grad_source((s.cells() + 1) * panel);
      for (int64_t i = begin; i < end; ++i) {
        const Slice& slice = slices[i];
        std::fill(source.begin(), source.end(), T(0));
        std::fill(grad_source.begin(), grad_source.end(), T(0));
        load_rows(
            picture<S>(input, n).slice(slice.first, slice.count),
            0,
            s.height,
            source.data(),
            panel);
        backward_slice(
            s,
            slice,
            shared,
            packed.data() + i * slice_weight,
            source.data(),
            grad_source.data(),
            grad_packed.data() + i * slice_weight,
            need_partial ? partial.data() + i * 3 * s.taps() * s.pixels() : nullptr,
            work);
        if (need_input) {
          store_rows(
              picture<S>(gradients.input, n).slice(slice.first, slice.count),
              0,
              s.height,
              grad_source.data(),
              panel);
        }
      }
    });
    if (need_partial) {
      reduce_partial(
          s,
          slices,
          partial,
          need_offset ? static_cast<T*>(grad_offset_t.data_ptr()) + n * 2 * mask_size : nullptr,
          need_mask ? static_cast<T*>(grad_mask_t.data_ptr()) + n * mask_size : nullptr);
    }
  }

  if (need_offset) gradients.offset = torch::stable::to(grad_offset_t, offset.scalar_type());
  if (need_mask) gradients.mask = torch::stable::to(grad_mask_t, mask->scalar_type());
  if (need_weight) {
    Tensor grad_weight_t = torch::stable::new_empty(weight_t, weight_t.sizes());
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        for_each_weight(
            s,
            slices[i],
            panel,
            static_cast<T*>(grad_weight_t.data_ptr()),
            grad_packed.data() + i * slice_weight,
            [](T& w, const T& p) { w = p; });
      }
    });
    gradients.weight = torch::stable::to(grad_weight_t, weight.scalar_type());
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> deform_conv2d_backward(
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
    bool need_mask) {
  const ConvShape s = conv_shape(
      input, offset, weight, mask, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w);
  STD_TORCH_CHECK(
      grad_output.dim() == 4 && grad_output.size(0) == s.batch &&
          grad_output.size(1) == s.out_channels && grad_output.size(2) == s.out_height &&
          grad_output.size(3) == s.out_width && grad_output.scalar_type() == input.scalar_type(),
      "grad_output: expected the shape and type of the output");
  STD_TORCH_CHECK(
      !need_mask || mask.has_value(), "mask: its gradient is asked for, but it is absent");
  Gradients gradients{
      need_input ? empty_as(
                       input,
                       {s.batch, s.in_channels, s.height, s.width},
                       input.scalar_type(),
                       suggested_format(input))
                 : not_asked(input),
      need_offset ? torch::stable::new_zeros(offset, offset.sizes()) : not_asked(offset),
      need_weight ? torch::stable::new_zeros(weight, weight.sizes()) : not_asked(weight),
      need_mask ? torch::stable::new_zeros(*mask, mask->sizes()) : not_asked(offset)};
  if (s.batch > 0) {
    dispatch_types(input.scalar_type(), [&](auto types) {
      using Ts = decltype(types);
      backward<typename Ts::Storage, typename Ts::Compute>(
          s,
          grad_output,
          input,
          offset,
          weight,
          mask,
          need_input,
          need_offset,
          need_weight,
          need_mask,
          gradients);
    });
  }
  return {gradients.input, gradients.offset, gradients.weight, gradients.mask};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(d2_deform, CPU, m) {
  m.impl("deform_conv2d_backward", TORCH_BOX(&deform_conv2d_backward));
}

}  // namespace d2_deform::cpu
