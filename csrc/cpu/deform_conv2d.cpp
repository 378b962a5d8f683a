// Deformable convolution, forward.
//
// The map is laid out channels-last, the weight as panels. Output pixels are cut into tiles. For each tile, the samples of a
// few taps and channels are gathered into a matrix that stays in the level-2 cache and multiplied into the tile's sums at
// once. Every output is summed in the same order whatever the tiles and the number of threads.
#include "deform_conv2d.h"

#include <cstring>

namespace d2_deform::cpu {
namespace {

constexpr int64_t kTileBytes = 640 * 1024;  // samples and sums of one tile: most of a level-2 cache
constexpr int64_t kDepth =
    256;  // samples of a pixel per product: a panel of weights fits the level-1 cache
constexpr int64_t kRun =
    128;  // channels gathered at a time: what all taps of a tile read of them stays in level 2
constexpr int64_t kStagingBytes = 8 << 20;  // pictures laid out channels-last at a time

// The samples of one tap and one run of channels: columns [column, column + channels.count) of its block.
struct Segment {
  ChannelRun channels;
  int64_t tap, column;
};

// Segments of one group whose samples are multiplied together. weight: where its panels begin, [panel][sample][output].
struct Block {
  int64_t group, depth, weight;
  std::vector<Segment> segments;
};

// All taps of the first channels, then all of the next: so a tile's cells are read while they are in the cache.
std::vector<Block> make_blocks(const ConvShape& s, int64_t group_width) {
  std::vector<Block> blocks;
  int64_t weight = 0;
  for (const ChannelRun& run : channel_runs(s, kRun)) {
    for (int64_t t = 0; t < s.taps(); ++t) {
      if (blocks.empty() || blocks.back().group != run.group ||
          blocks.back().depth + run.count > kDepth) {
        blocks.push_back({run.group, 0, weight, {}});
      }
      Block& block = blocks.back();
      block.segments.push_back({run, t, block.depth});
      block.depth += run.count;
      weight += run.count * group_width;
    }
  }
  return blocks;
}

// weight (out, in/groups, kh, kw) -> the blocks' panels, zeros beyond a group's outputs.
template <typename T>
void pack_weight(
    const ConvShape& s,
    const T* weight,
    const std::vector<Block>& blocks,
    int64_t panels,
    T* packed) {
  constexpr int64_t kChannels = 16;  // at a time: with all their taps they fit the level-1 cache
  const int64_t panel = kernels<T>().panel;
  const int64_t taps = s.taps();
  // target[run][tap]: first element in panel 0, and how far its panels lie apart.
  struct Target {
    int64_t first, panel_stride;
  };
  std::vector<Target> targets;
  for (const Block& block : blocks) {
    for (const Segment& segment : block.segments) {
      targets.push_back({block.weight + segment.column * panel, block.depth * panel});
    }
  }
  const std::vector<ChannelRun> runs = channel_runs(s, kRun);
  const int64_t items = static_cast<int64_t>(runs.size()) * panels;
  torch::stable::parallel_for(0, items, 1, [&](int64_t begin, int64_t end) {
    Buffer<T> square(kChannels * taps * panel, T(0));
    for (int64_t i = begin; i < end; ++i) {
      const ChannelRun& run = runs[i / panels];
      const int64_t p = i % panels;
      const int64_t outputs = std::min(panel, s.group_out() - p * panel);
      const int64_t row = run.group * s.group_out() + p * panel;
      const T* in = weight + (row * s.group_in() + run.first - run.group * s.group_in()) * taps;
      for (int64_t c0 = 0; c0 < run.count; c0 += kChannels) {
        const int64_t count = std::min(kChannels, run.count - c0);
        if (outputs < panel) square.fill(T(0));
        kernels<T>().transpose(
            outputs, count * taps, in + c0 * taps, s.group_in() * taps, square.data(), panel);
        for (int64_t t = 0; t < taps; ++t) {
          const Target& target = targets[i / panels * taps + t];
          T* out = packed + target.first + p * target.panel_stride + c0 * panel;
          for (int64_t c = 0; c < count; ++c) {
            std::memcpy(out + c * panel, square.data() + (c * taps + t) * panel, panel * sizeof(T));
          }
        }
      }
    }
  });
}

// The same for a depthwise convolution: [tap][channel], in its blocks' order of channels and taps.
template <typename T>
void pack_depthwise(const ConvShape& s, const T* weight, T* packed) {
  kernels<T>().transpose(s.in_channels, s.taps(), weight, s.taps(), packed, s.in_channels);
}

// How one picture's output pixels are cut: tile i is [begin(i), begin(i + 1)).
struct Tiles {
  int64_t pixels, count, rows;

  // most: pixels of the largest; rows: tiles are multiples of it. So many that each thread gets as many as the others.
  Tiles(int64_t pixels, int64_t most, int64_t rows, int64_t pictures)
      : pixels(pixels), count((pixels + most - 1) / most), rows(rows) {
    const int64_t threads = torch::stable::get_num_threads();
    while (count * pictures % threads != 0 && count * 2 * rows < pixels) ++count;
  }

  int64_t begin(int64_t i) const {
    const int64_t strips = (pixels + rows - 1) / rows;
    return std::min(pixels, i * strips / count * rows);
  }
};

template <typename T>
struct ForwardTile {
  SamplingPlan<T> plan;
  Buffer<T> columns;  // pixels x kDepth
  Buffer<T> sums;     // pixels x padded outputs

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
  // Each group's sums are padded to whole panels.
  const int64_t panels = round_up(s.group_out(), panel) / panel;
  const int64_t group_width = s.depthwise() ? 1 : panels * panel;
  const int64_t outputs = s.groups * group_width;

  const std::vector<Block> blocks = make_blocks(s, group_width);
  const Tensor weight_t = dense<T>(weight);
  const T* weights = static_cast<const T*>(weight_t.data_ptr());
  Buffer<T> packed(s.in_channels * group_width * s.taps());
  if (s.depthwise()) {
    pack_depthwise(s, weights, packed.data());
  } else {
    pack_weight(s, weights, blocks, panels, packed.data());
  }
  const Tensor offset_t = dense<T>(offset);
  const T* offsets = static_cast<const T*>(offset_t.data_ptr());
  const std::optional<Tensor> mask_t = dense_or_none<T>(mask);
  const T* masks = data_or_null<T>(mask_t);
  std::vector<T> start(outputs, T(0));  // of every pixel's sums: the bias
  if (bias.has_value()) {
    const Tensor bias_t = dense<T>(*bias);
    for (int64_t o = 0; o < s.out_channels; ++o) {
      start[o / s.group_out() * group_width + o % s.group_out()] =
          static_cast<const T*>(bias_t.data_ptr())[o];
    }
  }

  const int64_t pixel_bytes = sizeof(T) * (std::min(s.in_channels * s.taps(), kDepth) + outputs);
  const int64_t most = std::clamp<int64_t>(kTileBytes / pixel_bytes, 24, 192);

  // Channels-last pictures of the kernels' own type are read where they lie.
  const bool in_place = has_rows<S, T>(input);
  const int64_t picture_size = s.cells() * s.in_channels;
  const int64_t picture_bytes = picture_size * static_cast<int64_t>(sizeof(T));
  const int64_t staged =
      in_place ? s.batch : std::clamp<int64_t>(kStagingBytes / picture_bytes, 1, s.batch);
  Buffer<T> rows(in_place ? 0 : staged * picture_size);

  for (int64_t first = 0; first < s.batch; first += staged) {
    const int64_t count = std::min(staged, s.batch - first);
    if (!in_place) load_pictures<S>(input, first, count, rows.data());
    const Tiles tiles(s.pixels(), most, kernel.gemm_rows, count);
    torch::stable::parallel_for(0, count * tiles.count, 1, [&](int64_t begin, int64_t end) {
      ForwardTile<T> work(most + kernel.gemm_rows, outputs);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n = first + i / tiles.count;
        const int64_t pixel = tiles.begin(i % tiles.count);
        const int64_t pixels = tiles.begin(i % tiles.count + 1) - pixel;
        const T* source = in_place ? reinterpret_cast<const T*>(picture<S>(input, n).data)
                                   : rows.data() + (n - first) * picture_size;
        const T* picture_offsets = offsets + n * 2 * s.deform_groups * s.taps() * s.pixels();
        const T* picture_masks =
            masks ? masks + n * s.deform_groups * s.taps() * s.pixels() : nullptr;

        work.plan.choose_pixels(s, pixel, pixels);
        for (int64_t q = 0; q < pixels; ++q) {
          std::copy(start.begin(), start.end(), work.sums.data() + q * outputs);
        }
        for (const Block& block : blocks) {
          for (const Segment& segment : block.segments) {
            const ChannelRun& run = segment.channels;
            work.plan.make(
                s, picture_offsets, picture_masks, run.deform_group, segment.tap, /*missing=*/-1);
            kernel.gather(
                pixels,
                run.count,
                source + run.first,
                s.in_channels,
                work.plan.arrays,
                work.columns.data() + segment.column,
                block.depth);
            if (s.depthwise()) {
              kernel.multiply_add(
                  pixels,
                  run.count,
                  work.columns.data() + segment.column,
                  block.depth,
                  packed.data() + segment.tap * s.in_channels + run.first,
                  work.sums.data() + run.first,
                  outputs);
            }
          }
          if (s.depthwise()) continue;
          const T* weights_of_block = packed.data() + block.weight;
          for (int64_t p = 0; p < panels; ++p) {
            const T* b = weights_of_block + p * block.depth * panel;
            const bool last = p == panels - 1 && &block == &blocks.back();
            kernel.gemm(
                pixels,
                block.depth,
                work.columns.data(),
                block.depth,
                1,
                b,
                work.sums.data() + block.group * group_width + p * panel,
                outputs,
                /*accumulate=*/true,
                last ? nullptr : b + block.depth * panel);
          }
        }

        const Picture<S> out = picture<S>(output, n);
        const int64_t parts = group_width == s.group_out() ? 1 : s.groups;
        const int64_t channels = s.out_channels / parts;
        for (int64_t g = 0; g < parts; ++g) {
          store_rows(
              out.slice(g * channels, channels),
              pixel,
              pixel + pixels,
              work.sums.data() + g * group_width,
              outputs);
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
  check_cells(s);
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
