// Deformable convolution, backward.
//
// For one chunk of output pixels after another, in one workspace: the columns' gradient is a matrix product; one kernel
// turns it into the offsets' and the mask's gradients, another one scatters it into the map's by atomic sums, or, where
// results must be reproducible, every cell of the map sums its samples in their order. Then the columns are gathered once
// more, for the weight's gradient, another product. Sums over chunks are kept in float32 at least.
#include "chunks.h"
#include "column_gradients.h"
#include "matrices.h"

namespace d2_deform::cuda {
namespace {

// Which gradients are asked for.
struct Needs {
  bool input, offset, weight, bias, mask;

  bool columns() const { return input || offset || mask; }
  bool offsets() const { return offset || mask; }
};

struct Gradients {
  Tensor input, offset, weight, bias, mask;
};

// total += part.
template <typename S, typename T>
struct Accumulate {
  Array<const S> part;
  Array<T> total;

  D2_DEFORM_HOST_DEVICE void operator()(int64_t i) const { total[i] += static_cast<T>(part[i]); }
};

// One backward pass; S: what lies in the tensors, T: what sums are kept in.
template <typename S, typename T>
class Backward {
 public:
  Backward(
      const ConvShape& s,
      const Needs& needs,
      bool deterministic,
      const Tensor& grad_output,
      const Tensor& input,
      const Tensor& offset,
      const Tensor& weight,
      const std::optional<Tensor>& mask)
      : s_(s),
        needs_(needs),
        deterministic_(deterministic),
        launcher_(input),
        type_(input.scalar_type()),
        offset_(dense<T>(offset)),
        mask_(dense_or_none<T>(mask)),
        sampling_(s, offset_, mask_),
        layout_(s),
        grad_rows_(rows_of(grad_output, type_)),
        input_rows_(rows_of(input, type_)),
        weight_(torch::stable::to(weight, type_)),
        matrix_(s.depthwise() ? tap_rows(s, weight_) : weight_matrix(s, weight_)) {}

  Gradients run() {
    const Tensor none = not_asked(input_rows_);
    const ScalarType sum_type = scalar_type_of<T>();
    grad_input_ = needs_.input
                      ? zero_rows(input_rows_, {input_rows_.size(0), s_.in_channels}, sum_type)
                      : none;
    grad_offset_ = needs_.offset ? torch::stable::new_empty(offset_, offset_.sizes()) : none;
    grad_mask_ = needs_.mask ? torch::stable::new_empty(*mask_, mask_->sizes()) : none;
    grad_matrix_ = needs_.weight ? zero_rows(matrix_, {matrix_.numel()}, sum_type) : none;
    if (needs_.columns() || needs_.weight) {
      const int64_t chunk = chunk_pixels(s_, layout_, sizeof(S));
      columns_ = empty_rows(input_rows_, {chunk, layout_.row_size()}, type_);
      const bool packs = channels_fit_packs<S>(s_) &&
                         aligned_to_packs(array_of<const S>(input_rows_)) &&
                         aligned_to_packs(array_of<const S>(grad_rows_));
      for_each_chunk(s_.batch * s_.pixels(), chunk, [&](int64_t first, int64_t pixels) {
        dispatch_pack<S>(packs, [&](auto pack) {
          if (needs_.columns()) from_columns<decltype(pack)::value>(first, pixels);
          if (needs_.weight) into_weight<decltype(pack)::value>(first, pixels);
        });
      });
    }
    return {
        grad_input_,
        grad_offset_,
        needs_.weight ? weight_gradient() : none,
        needs_.bias ? sum_first(grad_rows_, sum_type) : none,
        grad_mask_};
  }

 private:
  // The gradients that pass through the columns of pixels [first, first + pixels).
  template <int N>
  void from_columns(int64_t first, int64_t pixels) {
    const int64_t elements = pixels * layout_.row_size();
    const Array<const S> grad_columns = array_of<const S>(columns_);
    if (s_.depthwise()) {
      launcher_.for_each(
          "DepthwiseColumnGradient",
          elements / N,
          DepthwiseColumnGradient<S, T, N>{
              layout_,
              first,
              array_of<const S>(grad_rows_),
              array_of<const S>(matrix_),
              array_of<S>(columns_)});
    } else {
      multiply(
          by_group(row_range(grad_rows_, first, pixels), s_.groups),
          matrix_,
          by_group(row_range(columns_, 0, pixels), s_.groups));
    }
    const TapNumbers numbers(s_);
    const int64_t taps = pixels * s_.deform_groups * s_.taps();
    if (needs_.offsets()) {
      launcher_.for_each_sum(
          "OffsetGradient",
          taps,
          lanes_for(s_.deform_channels() / N),
          OffsetGradient<S, T, N>{
              sampling_,
              layout_,
              numbers,
              first,
              array_of<const S>(input_rows_),
              grad_columns,
              needs_.offset ? array_of<T>(grad_offset_) : Array<T>{},
              needs_.mask ? array_of<T>(grad_mask_) : Array<T>{}});
    }
    if (needs_.input && !deterministic_) {
      launcher_.for_each(
          "ScatterInputGradient",
          elements / N,
          ScatterInputGradient<S, T, N>{
              sampling_, layout_, first, grad_columns, array_of<T>(grad_input_)});
    }
    if (needs_.input && deterministic_) {
      const int64_t first_image = first / s_.pixels();
      const int64_t images = (first + pixels - 1) / s_.pixels() + 1 - first_image;
      inverse_gather<T, N>(
          launcher_,
          ColumnSource<S, T, N>{
              sampling_,
              layout_,
              numbers,
              Divider<uint64_t>(s_.width),
              first,
              first_image,
              KeyGrid{images * s_.deform_groups, s_.height, s_.width, 1},
              grad_columns,
              array_of<T>(grad_input_)},
          taps,
          s_.deform_channels(),
          input_rows_);
    }
  }

  // Adds what pixels [first, first + pixels) contribute to the weight's gradient.
  template <int N>
  void into_weight(int64_t first, int64_t pixels) {
    const Array<const S> factor = s_.depthwise() ? array_of<const S>(grad_rows_) : Array<const S>{};
    launcher_.for_each(
        "GatherColumns",
        pixels * layout_.row_size() / N,
        GatherColumns<S, T, N>{
            sampling_,
            layout_,
            first,
            array_of<const S>(input_rows_),
            factor,
            array_of<S>(columns_)});
    const Tensor columns = row_range(columns_, 0, pixels);
    if (s_.depthwise()) {
      accumulate<T>(sum_first(columns, scalar_type_of<T>()));
      return;
    }
    const Tensor part = empty_rows(matrix_, weight_matrix_sizes(s_), type_);
    multiply(
        transposed(by_group(row_range(grad_rows_, first, pixels), s_.groups)),
        by_group(columns, s_.groups),
        part);
    accumulate<S>(part);
  }

  template <typename P>
  void accumulate(const Tensor& part) {
    launcher_.for_each(
        "Accumulate",
        part.numel(),
        Accumulate<P, T>{array_of<const P>(part), array_of<T>(grad_matrix_)});
  }

  // The weight's gradient as (out, in/groups, kh, kw).
  Tensor weight_gradient() const {
    if (!s_.depthwise()) return weight_of_matrix(s_, grad_matrix_);
    const Tensor channels = torch::stable::contiguous(
        torch::stable::transpose(viewed(grad_matrix_, {s_.taps(), s_.in_channels}), 0, 1));
    return viewed(channels, {s_.in_channels, 1, s_.kernel_h, s_.kernel_w});
  }

  const ConvShape s_;
  const Needs needs_;
  const bool deterministic_;
  const Launcher launcher_;
  const ScalarType type_;
  const Tensor offset_;
  const std::optional<Tensor> mask_;
  const Sampling<T> sampling_;
  const ColumnLayout layout_;
  const Tensor grad_rows_;   // (pixels of the batch, out)
  const Tensor input_rows_;  // (N * H * W, C)
  const Tensor weight_;
  const Tensor matrix_;  // weight_matrix(), or tap_rows() of a depthwise convolution
  Tensor columns_;       // the workspace: the columns' gradient, then the columns
  Tensor grad_input_, grad_offset_, grad_mask_, grad_matrix_;
};

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
    bool deterministic) {
  check_device("grad_output", grad_output, input);
  check_device("offset", offset, input);
  check_device("weight", weight, input);
  check_device("mask", mask, input);
  const ConvShape s = conv_shape(
      input, offset, weight, mask, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w);
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
    return Backward<typename Ts::Storage, typename Ts::Compute>(
               s, needs, deterministic, grad_output, input, offset, weight, mask)
        .run();
  });
  const auto as = [](const Tensor& gradient, const Tensor& like) {
    return torch::stable::to(gradient, like.scalar_type());
  };
  return {
      need_input ? map_of(gradients.input, s.height, s.width, input) : not_asked(input),
      need_offset ? as(gradients.offset, offset) : not_asked(offset),
      need_weight ? as(gradients.weight, weight) : not_asked(weight),
      need_bias ? as(gradients.bias, input) : not_asked(input),
      need_mask ? as(gradients.mask, *mask) : not_asked(offset)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(d2_deform, D2_DEFORM_CUDA_KEY, m) {
  m.impl("deform_conv2d_backward", TORCH_BOX(&deform_conv2d_backward));
}

}  // namespace d2_deform::cuda
