// Deformable convolution, forward.
//
// The map is laid out channels-last, the weight as panels. Output pixels are cut into tiles; for each tap (and block of
// channels) a tile's samples are gathered into a matrix that stays in the level-2 cache and multiplied into the tile's
// sums at once. Every output is summed in the same order whatever the number of threads.
#include "deform_conv2d.h"

#include "kernels.h"

namespace d2_deform::cpu {
namespace {

constexpr int64_t kTileBytes = 640 * 1024;  // samples and sums of one tile: most of a level-2 cache
constexpr int64_t kDepth = 256;  // channels per block: a panel's block fits the level-1 cache
constexpr int64_t kStagingBytes = 8 << 20;  // pictures laid out channels-last at a time

// weight (out, in/groups, kh, kw) -> [tap][block][panel][channel][panel width], zeros beyond a group's outputs;
// depthwise: [tap][channel].
template <typename T>
std::vector<T> pack_weight(
    const ConvShape& s, const T* weight, const std::vector<ChannelRun>& blocks, int64_t panel) {
  const int64_t taps = s.taps();
  const int64_t panels = round_up(s.group_out(), panel) / panel;
  const int64_t tap_size = s.depthwise() ? s.in_channels : s.in_channels * panels * panel;
  std::vector<T> packed(taps * tap_size, T(0));
  if (s.depthwise()) {
    for (int64_t c = 0; c < s.in_channels; ++c) {
      for (int64_t t = 0; t < taps; ++t) packed[t * tap_size + c] = weight[c * taps + t];
    }
    return packed;
  }
  torch::stable::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      for (const ChannelRun& block : blocks) {
        T* out = packed.data() + block.first * panels * panel + p * block.count * panel;
        const int64_t outputs = std::min(panel, s.group_out() - p * panel);
        for (int64_t o = 0; o < outputs; ++o) {
          const int64_t row = block.group * s.group_out() + p * panel + o;
          const T* in =
              weight + (row * s.group_in() + block.first - block.group * s.group_in()) * taps;
          for (int64_t c = 0; c < block.count; ++c) {
            for (int64_t t = 0; t < taps; ++t) {
              out[t * tap_size + c * panel + o] = in[c * taps + t];
            }
          }
        }
      }
    }
  });
  return packed;
}

template <typename T>
struct ForwardTile {
  SamplingPlan<T> plan;
  std::vector<T> columns;  // pixels x kDepth
  std::vector<T> sums;     // pixels x padded outputs

  ForwardTile(int64_t pixels, int64_t outputs)
      : plan(pixels), columns(pixels * kDepth), sums(pixels * outputs) {}
};

template <typename S, typename T>
void forward(
    const ConvShape& s,
    const Tensor& input,
    const Tensor& offset,
    const Tensor& weight,
    const std::optional<Tensor>& bias,
    const std::optional<Tensor>& mask,
    const Tensor& output) {
  const Kernels<T>& kernel = kernels<T>();
  const int64_t panel = kernel.panel;
  const std::vector<ChannelRun> blocks = channel_runs(s, kDepth);
  const Tensor weight_t = dense<T>(weight);
  const std::vector<T> packed =
      pack_weight(s, static_cast<const T*>(weight_t.data_ptr()), blocks, panel);
  const Tensor offset_t = dense<T>(offset);
  const T* offsets = static_cast<const T*>(offset_t.data_ptr());
  const std::optional<Tensor> mask_t = dense_or_none<T>(mask);
  const T* masks = data_or_null<T>(mask_t);
  const std::optional<Tensor> bias_t = dense_or_none<T>(bias);
  const T* biases = data_or_null<T>(bias_t);

  // Each group's sums are padded to whole panels.
  const int64_t panels = round_up(s.group_out(), panel) / panel;
  const int64_t group_width = s.depthwise() ? 1 : panels * panel;
  const int64_t outputs = s.groups * group_width;
  const int64_t pixel_bytes = sizeof(T) * (std::min(s.in_channels, kDepth) + outputs);
  const int64_t tile = std::clamp<int64_t>(kTileBytes / pixel_bytes / 12 * 12, 24, 192);
  const int64_t tiles = (s.pixels() + tile - 1) / tile;
  const int64_t tap_size = s.depthwise() ? s.in_channels : s.in_channels * group_width;

  // Channels-last pictures of the kernels' own type are read where they lie.
  const bool in_place = std::is_same_v<S, T> && input.stride(1) == 1 &&
                        input.stride(3) == s.in_channels &&
                        input.stride(2) == s.width * s.in_channels;
  const int64_t picture_size = s.cells() * s.in_channels;
  const int64_t picture_bytes = picture_size * static_cast<int64_t>(sizeof(T));
  const int64_t staged =
      in_place ? s.batch : std::clamp<int64_t>(kStagingBytes / picture_bytes, 1, s.batch);
  std::vector<T> rows(in_place ? 0 : staged * picture_size);

  for (int64_t first = 0; first < s.batch; first += staged) {
    const int64_t count = std::min(staged, s.batch - first);
    if (!in_place) {
      torch::stable::parallel_for(0, count * s.height, 4, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t h = i % s.height;
          T* target = rows.data() + i / s.height * picture_size;
          load_rows(picture<S>(input, first + i / s.height), h, h + 1, target, s.in_channels);
        }
      });
    }
    torch::stable::parallel_for(0, count * tiles, 1, [&](int64_t begin, int64_t end) {
      ForwardTile<T> work(tile, outputs);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n = first + i / tiles;
        const int64_t pixel = i % tiles * tile;
        const int64_t pixels = std::min(tile, s.pixels() - pixel);
        const T* source = in_place ? reinterpret_cast<const T*>(picture<S>(input, n).data)
                                   : rows.data() + (n - first) * picture_size;
        const T* picture_offsets = offsets + n * 2 * s.deform_groups * s.taps() * s.pixels();
        const T* picture_masks =
            masks ? masks + n * s.deform_groups * s.taps() * s.pixels() : nullptr;

        std::fill_n(work.sums.data(), pixels * outputs, T(0));
        for (int64_t t = 0; t < s.taps(); ++t) {
          int64_t planned = -1;
          for (const ChannelRun& block : blocks) {
            if (planned != block.deform_group) {
              planned = block.deform_group;
              work.plan.make(
                  s, picture_offsets, picture_masks, planned, t, pixel, pixels, /*missing=*/-1);
            }
            kernel.gather(
                pixels,
                block.count,
                source + block.first,
                s.in_channels,
                work.plan.index.data(),
                work.plan.weight.data(),
                work.columns.data(),
                block.count);
            const T* tap_weight = packed.data() + t * tap_size;
            if (s.depthwise()) {
              kernel.multiply_add(
                  pixels,
                  block.count,
                  work.columns.data(),
                  block.count,
                  tap_weight + block.first,
                  work.sums.data() + block.first,
                  outputs);
              continue;
            }
            for (int64_t p = 0; p < panels; ++p) {
              kernel.gemm(
                  pixels,
                  block.count,
                  work.columns.data(),
                  block.count,
                  1,
                  tap_weight + block.first * group_width + p * block.count * panel,
                  work.sums.data() + block.group * group_width + p * panel,
                  outputs,
                  /*accumulate=*/true);
            }
          }
        }

        const Picture<S> out = picture<S>(output, n);
        for (int64_t o0 = 0; o0 < s.out_channels; o0 += 16) {
          const int64_t o1 = std::min(s.out_channels, o0 + 16);
          for (int64_t q = 0; q < pixels; ++q) {
            const int64_t h = (pixel + q) / s.out_width;
            const int64_t w = (pixel + q) % s.out_width;
            S* target = out.data + h * out.row_stride + w * out.column_stride;
            for (int64_t o = o0; o < o1; ++o) {
              const int64_t column = o / s.group_out() * group_width + o % s.group_out();
              const T sum = work.sums[q * outputs + column] + (biases ? biases[o] : T(0));
              target[o * out.channel_stride] = static_cast<S>(sum);
            }
          }
        }
      }
    });
  }
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
  const ConvShape s = conv_shape(
      input, offset, weight, mask, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w);
  STD_TORCH_CHECK(
      !bias.has_value() || (bias->dim() == 1 && bias->size(0) == s.out_channels),
      "bias: expected one value per output channel");
  const Tensor output = empty_as(
      input,
      {s.batch, s.out_channels, s.out_height, s.out_width},
      input.scalar_type(),
      suggested_format(input));
  if (s.batch > 0) {
    dispatch_types(input.scalar_type(), [&](auto types) {
      using Ts = decltype(types);
      forward<typename Ts::Storage, typename Ts::Compute>(
          s, input, offset, weight, bias, mask, output);
    });
  }
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(d2_deform, CPU, m) {
  m.impl("deform_conv2d", TORCH_BOX(&deform_conv2d));
}

}  // namespace d2_deform::cpu
