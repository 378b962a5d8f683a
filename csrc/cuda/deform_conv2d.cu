// Deformable convolution, forward.
//
// Maps are laid out channels-last (those that are, are read where they lie). For one chunk of output pixels after another,
// across pictures: a kernel gathers the columns, a matrix product turns them into the output's rows. A depthwise
// convolution sums its taps in one kernel without columns.
#include "chunks.h"
#include "matrices.h"

namespace d2_deform::cuda {
namespace {

// rows (R, columns) += vector (columns).
template <typename S, typename T>
struct AddToRows {
  Divider<uint64_t> by_columns;
  Array<const S> vector;
  Array<S> rows;

  D2_DEFORM_HOST_DEVICE void operator()(int64_t i) const {
    uint64_t column = static_cast<uint64_t>(i);
    by_columns.split(column);
    rows[i] = static_cast<S>(
        static_cast<T>(rows[i]) + static_cast<T>(vector[static_cast<int64_t>(column)]));
  }
};

template <typename S, typename T>
void depthwise(
    const Launcher& launcher,
    const Sampling<T>& sampling,
    const Array<const S>& input,
    const Tensor& weight,
    const Tensor& rows) {
  const ConvShape& s = sampling.shape;
  const Tensor taps = tap_rows(s, weight);
  dispatch_pack<S>(channels_fit_packs<S>(s) && aligned_to_packs(input), [&](auto pack) {
    constexpr int N = decltype(pack)::value;
    launcher.for_each(
        "DepthwiseForward",
        rows.numel() / N,
        DepthwiseForward<S, T, N>{
            sampling,
            Divider<uint64_t>(s.in_channels),
            Divider<uint32_t>(s.deform_channels()),
            input,
            array_of<const S>(taps),
            array_of<S>(rows)});
  });
}

template <typename S, typename T>
void dense_or_grouped(
    const Launcher& launcher,
    const Sampling<T>& sampling,
    const Array<const S>& input,
    const Tensor& weight,
    const Tensor& rows) {
  const ConvShape& s = sampling.shape;
  const ColumnLayout layout(s);
  const int64_t total = s.batch * s.pixels();
  const int64_t chunk = chunk_pixels(s, layout, sizeof(S));
  const Tensor columns = empty_rows(weight, {chunk, layout.row_size()}, weight.scalar_type());
  const Tensor matrix = weight_matrix(s, weight);
  for_each_chunk(total, chunk, [&](int64_t first, int64_t pixels) {
    dispatch_pack<S>(channels_fit_packs<S>(s) && aligned_to_packs(input), [&](auto pack) {
      constexpr int N = decltype(pack)::value;
      launcher.for_each(
          "GatherColumns",
          pixels * layout.row_size() / N,
          GatherColumns<S, T, N>{
              sampling, layout, first, input, Array<const S>{}, array_of<S>(columns)});
    });
    multiply(
        by_group(row_range(columns, 0, pixels), s.groups),
        transposed(matrix),
        by_group(row_range(rows, first, pixels), s.groups));
  });
}

Tensor deform_conv2d(
    const Tensor& input,
    const Tensor& offset,
    const Tensor& weight,
    const std::optional<Tensor>& bias,
    const std::optional<Tensor>& mask,
    int64_t stride_h,
    int64_t stride_w,
    int64_t pad_h,
    int64_t pad_w,
    int64_t dilation_h,
    int64_t dilation_w) {
  check_device("offset", offset, input);
  check_device("weight", weight, input);
  check_device("bias", bias, input);
  check_device("mask", mask, input);
  const ConvShape s = conv_shape(
      input, offset, weight, mask, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w);
  STD_TORCH_CHECK(
      !bias.has_value() || (bias->dim() == 1 && bias->size(0) == s.out_channels),
      "bias: expected one value per output channel");
  const Launcher launcher(input);
  const ScalarType type = input.scalar_type();
  const Tensor rows = empty_rows(input, {s.batch * s.pixels(), s.out_channels}, type);
  if (s.batch > 0) {
    dispatch_types(type, [&](auto types) {
      using S = typename decltype(types)::Storage;
      using T = typename decltype(types)::Compute;
      const Tensor offset_t = dense<T>(offset);
      const std::optional<Tensor> mask_t = dense_or_none<T>(mask);
      const Sampling<T> sampling(s, offset_t, mask_t);
      const Tensor input_rows = rows_of(input, type);
      const Tensor weight_s = torch::stable::to(weight, type);
      const auto run = s.depthwise() ? depthwise<S, T> : dense_or_grouped<S, T>;
      run(launcher, sampling, array_of<const S>(input_rows), weight_s, rows);
      if (!bias.has_value()) return;
      const Tensor bias_s = torch::stable::contiguous(torch::stable::to(*bias, type));
      launcher.for_each(
          "AddToRows",
          rows.numel(),
          AddToRows<S, T>{
              Divider<uint64_t>(s.out_channels), array_of<const S>(bias_s), array_of<S>(rows)});
    });
  }
  return map_of(rows, s.out_height, s.out_width, input);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(d2_deform, D2_DEFORM_CUDA_KEY, m) {
  m.impl("deform_conv2d", TORCH_BOX(&deform_conv2d));
}

}  // namespace d2_deform::cuda
