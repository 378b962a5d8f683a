// Deformable convolution, forward.
//
// The map is laid out channels-last, the weight as panels. Output pixels are cut into tiles. For each tile, the samples of a
// few taps and channels are gathered into a matrix that stays in the level-2 cache and multiplied into the tile's sums at
// once. Every output is summed in the same order whatever the tiles and the number of threads.
#include "deform_conv2d.h"
#include "bands.h"

#include <cstring>

namespace d2_deform::cpu {
namespace {

constexpr int64_t kTileBytes = 640 * 1024;  // samples and sums of one tile: most of a level-2 cache
constexpr int64_t kDepth =
    256;  // samples of a pixel per product: a panel of weights fits the level-1 cache
constexpr int64_t kRun =
    128;  // channels gathered at a time: what all taps of a tile read of them stays in level 2
constexpr int64_t kStagingBytes = 8 << 20;  // of several pictures laid out channels-last at a time
// A picture that takes more than this, with the weight's panels, is cut into bands. A band's sums and the rows that its
// pixels stand on take kBandBytes each; kWindowBytes hold all rows that it samples.
constexpr int64_t kPictureBytes = 15 << 20;
constexpr int64_t kLeastPictureBytes =
    4 << 20;  // a picture up to this is not cut, whatever the weight takes
constexpr int64_t kBandBytes = 2 << 20;
constexpr int64_t kWindowBytes = 7 << 20;

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

// Neighbouring input channels [first, first + count) and their blocks [begin, end): what is laid out at a time.
struct Part {
  int64_t first, count;
  size_t begin, end;
};

struct Blocks {
  std::vector<Block> blocks;
  std::vector<Part> parts;
};

// All taps of the first channels, then all of the next: so a tile's cells are read while they are in the cache. Parts have
// up to `part` channels (a run at least).
Blocks make_blocks(const ConvShape& s, int64_t group_width, int64_t part) {
  std::vector<Block> blocks;
  std::vector<Part> parts;
  int64_t weight = 0;
  for (const ChannelRun& run : channel_runs(s, kRun)) {
    if (parts.empty() || parts.back().count + run.count > part) {
      parts.push_back({run.first, 0, blocks.size(), 0});
    }
    for (int64_t t = 0; t < s.taps(); ++t) {
      if (blocks.size() == parts.back().begin || blocks.back().group != run.group ||
          blocks.back().depth + run.count > kDepth) {
        blocks.push_back({run.group, 0, weight, {}});
      }
      Block& block = blocks.back();
      block.segments.push_back({run, t, block.depth});
      block.depth += run.count;
      weight += run.count * group_width;
    }
    parts.back().count += run.count;
    parts.back().end = blocks.size();
  }
  return {std::move(blocks), std::move(parts)};
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

// The weight as panels, and how the sums lie: each group's padded to whole panels.
template <typename T>
struct PackedWeight {
  int64_t panels, group_width, outputs, size;
  Blocks layout;
  const T* packed = nullptr;

  PackedWeight(const ConvShape& s, int64_t part)
      : panels(round_up(s.group_out(), kernels<T>().panel) / kernels<T>().panel),
        group_width(s.depthwise() ? 1 : panels * kernels<T>().panel),
        outputs(s.groups * group_width),
        size(s.in_channels * group_width * s.taps()),
        layout(make_blocks(s, group_width, part)) {}

  // memory: `size` elements.
  void pack(const ConvShape& s, const T* weight, T* memory) {
    if (s.depthwise()) {
      pack_depthwise(s, weight, memory);
    } else {
      pack_weight(s, weight, layout.blocks, panels, memory);
    }
    packed = memory;
  }
};

// The channels of a picture's cells as rows.
template <typename T>
struct Source {
  const T* rows;
  int64_t row_length, first_channel, first_cell;
};

// Adds a part's products to the sums of the pixels that the tile's plan has chosen.
template <typename T>
void add_part(
    const ConvShape& s,
    const PackedWeight<T>& weight,
    const Part& part,
    const Source<T>& source,
    const T* offset,
    const T* mask,
    int64_t pixels,
    ForwardTile<T>& work,
    T* sums) {
  const Kernels<T>& kernel = kernels<T>();
  for (size_t i = part.begin; i < part.end; ++i) {
    const Block& block = weight.layout.blocks[i];
    for (const Segment& segment : block.segments) {
      const ChannelRun& run = segment.channels;
      work.plan.make(
          s, offset, mask, run.deform_group, segment.tap, source.first_cell, /*missing=*/-1);
      kernel.gather(
          pixels,
          run.count,
          source.rows + run.first - source.first_channel,
          source.row_length,
          work.plan.arrays,
          work.columns.data() + segment.column,
          block.depth);
      if (s.depthwise()) {
        kernel.multiply_add(
            pixels,
            run.count,
            work.columns.data() + segment.column,
            block.depth,
            weight.packed + segment.tap * s.in_channels + run.first,
            sums + run.first,
            weight.outputs);
      }
    }
    if (s.depthwise()) continue;
    const T* panels = weight.packed + block.weight;
    for (int64_t p = 0; p < weight.panels; ++p) {
      const T* b = panels + p * block.depth * kernel.panel;
      const bool last = p == weight.panels - 1 && i + 1 == weight.layout.blocks.size();
      kernel.gemm(
          pixels,
          block.depth,
          work.columns.data(),
          block.depth,
          1,
          b,
          sums + block.group * weight.group_width + p * kernel.panel,
          weight.outputs,
          /*accumulate=*/true,
          last ? nullptr : b + block.depth * kernel.panel);
    }
  }
}

// Every pixel's sums before anything is added: the bias, zeros where outputs are padded.
template <typename T>
std::vector<T> first_sums(
    const ConvShape& s, const PackedWeight<T>& weight, const std::optional<Tensor>& bias) {
  std::vector<T> sums(weight.outputs, T(0));
  if (!bias.has_value()) return sums;
  const Tensor bias_t = dense<T>(*bias);
  for (int64_t o = 0; o < s.out_channels; ++o) {
    sums[o / s.group_out() * weight.group_width + o % s.group_out()] =
        static_cast<const T*>(bias_t.data_ptr())[o];
  }
  return sums;
}

// Sums of neighbouring pixels from `pixel` on -> the output picture.
template <typename S, typename T>
void store_sums(
    const ConvShape& s,
    const PackedWeight<T>& weight,
    const Picture<S>& output,
    int64_t pixel,
    int64_t pixels,
    const T* sums) {
  const int64_t parts = weight.group_width == s.group_out() ? 1 : s.groups;
  const int64_t channels = s.out_channels / parts;
  for (int64_t g = 0; g < parts; ++g) {
    store_rows(
        output.slice(g * channels, channels),
        pixel,
        pixel + pixels,
        sums + g * weight.group_width,
        weight.outputs);
  }
}

template <typename S, typename T>
void forward(
    const ConvShape& s,
    const Tensor& input,
    const Tensor& offset,
    const Tensor& weight,
    const std::optional<Tensor>& bias,
    const std::optional<Tensor>& mask,
    const Tensor& output) {
  constexpr int64_t kSize = sizeof(T);
  const int64_t picture_size = s.cells() * s.in_channels;
  // Channels-last pictures of the kernels' own type are read where they lie.
  const bool in_place = has_rows<S, T>(input);
  PackedWeight<T> packed(s, s.in_channels);
  const int64_t most_bytes = std::max(kPictureBytes - packed.size * kSize, kLeastPictureBytes);
  const bool cut = !in_place && (picture_size * kSize > most_bytes || forced_band_rows() > 0);
  if (cut) packed.layout = make_blocks(s, packed.group_width, kRun);
  const std::vector<Part>& parts = packed.layout.parts;
  const int64_t outputs = packed.outputs;

  // What is laid out at a time: pictures, or a band's rows of one part.
  int64_t staged = s.batch;
  int64_t rows_size = 0;
  int64_t sums_size = 0;
  BandLimits limits{};
  if (cut) {
    int64_t channels = 0;  // of the largest part
    for (const Part& part : parts) channels = std::max(channels, part.count);
    const int64_t row = s.width * channels;
    const int64_t sums_row = parts.size() > 1 ? s.out_width * outputs : 0;
    limits = band_limits(
        s,
        sums_row > 0 ? kBandBytes / (kSize * sums_row) : s.out_height,
        kBandBytes / (kSize * row),
        kWindowBytes / (kSize * row));
    rows_size = limits.map_rows * row;
    sums_size = limits.rows * sums_row;
  } else if (!in_place) {
    staged = std::clamp<int64_t>(kStagingBytes / (kSize * picture_size), 1, s.batch);
    rows_size = staged * picture_size;
  }
  // One block: the backward pass, which wants as much, takes it again.
  Buffer<T> memory(packed.size + rows_size + sums_size);
  const Tensor weight_t = dense<T>(weight);
  packed.pack(s, static_cast<const T*>(weight_t.data_ptr()), memory.data());
  T* staged_rows = memory.data() + packed.size;
  T* band_sums = sums_size > 0 ? staged_rows + rows_size : nullptr;

  const Tensor offset_t = dense<T>(offset);
  const T* offsets = static_cast<const T*>(offset_t.data_ptr());
  const std::optional<Tensor> mask_t = dense_or_none<T>(mask);
  const T* masks = data_or_null<T>(mask_t);
  const int64_t mask_size = s.deform_groups * s.taps() * s.pixels();
  const std::vector<T> start = first_sums(s, packed, bias);

  const int64_t pixel_bytes = kSize * (std::min(s.in_channels * s.taps(), kDepth) + outputs);
  const int64_t most = std::clamp<int64_t>(kTileBytes / pixel_bytes, 24, 192);
  const int64_t gemm_rows = kernels<T>().gemm_rows;

  // One band of `count` pictures. source_of(picture): its cells. sums: of the band's pixels, which several parts add to;
  // null where one part has all channels.
  const auto add = [&](int64_t first,
                       int64_t count,
                       const Band& band,
                       const Part& part,
                       const auto& source_of,
                       T* sums) {
    const int64_t begin_pixel = band.first * s.out_width;
    const Tiles tiles(band.rows() * s.out_width, most, gemm_rows, count);
    torch::stable::parallel_for(0, count * tiles.count, 1, [&](int64_t begin, int64_t end) {
      ForwardTile<T> work(most + gemm_rows, outputs);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n = first + i / tiles.count;
        const int64_t in_band = tiles.begin(i % tiles.count);
        const int64_t pixel = begin_pixel + in_band;
        const int64_t pixels = tiles.begin(i % tiles.count + 1) - in_band;
        T* tile_sums = sums != nullptr ? sums + in_band * outputs : work.sums.data();
        if (part.begin == 0) {
          for (int64_t q = 0; q < pixels; ++q) {
            std::copy(start.begin(), start.end(), tile_sums + q * outputs);
          }
        }
        work.plan.choose_pixels(s, pixel, pixels);
        add_part(
            s,
            packed,
            part,
            source_of(n),
            offsets + n * 2 * mask_size,
            masks ? masks + n * mask_size : nullptr,
            pixels,
            work,
            tile_sums);
        if (part.end == packed.layout.blocks.size()) {
          store_sums(s, packed, picture<S>(output, n), pixel, pixels, tile_sums);
        }
      }
    });
  };
  const Part all{0, s.in_channels, 0, packed.layout.blocks.size()};
  const auto add_whole = [&](int64_t first, int64_t count, T* rows) {
    if (!in_place) load_pictures<S>(input, first, count, rows);
    const auto source_of = [&](int64_t n) {
      const T* data = in_place ? reinterpret_cast<const T*>(picture<S>(input, n).data)
                               : rows + (n - first) * picture_size;
      return Source<T>{data, s.in_channels, 0, 0};
    };
    add(first, count, whole_picture(s), all, source_of, nullptr);
  };
  if (!cut) {
    for (int64_t first = 0; first < s.batch; first += staged) {
      add_whole(first, std::min(staged, s.batch - first), staged_rows);
    }
    return;
  }

  for (int64_t n = 0; n < s.batch; ++n) {
    const std::vector<Band> bands = cut_bands(s, offsets + n * 2 * mask_size, limits);
    if (bands.size() == 1) {
      Buffer<T> rows(picture_size);
      add_whole(n, 1, rows.data());
      continue;
    }
    for (const Band& band : bands) {
      for (const Part& part : parts) {
        load_picture_rows(
            picture<S>(input, n).slice(part.first, part.count), band.top, band.bottom, staged_rows);
        const Source<T> source{staged_rows, part.count, part.first, band.top * s.width};
        const auto source_of = [&](int64_t) { return source; };
        add(n, 1, band, part, source_of, band_sums);
      }
    }
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
