// The columns: for each output pixel of a chunk, what every tap samples from every channel.
//
// A row of the columns belongs to one output pixel and is laid out [block][tap][channel of the block], so that it is the
// left operand of one matrix product per block; a block is a convolution's group, or all channels of a depthwise one. The
// gradient of the columns is laid out alike.
#pragma once

#include "sampling.h"

namespace d2_deform::cuda {

// Where an element of the columns belongs.
struct ColumnPlace {
  int64_t pixel;  // of the chunk
  int64_t tap, channel, deform_group;
};

// Sizes are below 2^31 within a chunk (see chunks.h), so that places are found by 32-bit arithmetic.
struct ColumnLayout {
  int64_t taps, blocks, block_channels;
  Divider<uint32_t> by_taps, by_blocks, by_block_channels, by_deform_channels;

  explicit ColumnLayout(const ConvShape& s)
      : taps(s.taps()),
        blocks(s.depthwise() ? 1 : s.groups),
        block_channels(s.in_channels / blocks),
        by_taps(taps),
        by_blocks(blocks),
        by_block_channels(block_channels),
        by_deform_channels(s.deform_channels()) {}

  int64_t row_size() const { return blocks * taps * block_channels; }

  D2_DEFORM_HOST_DEVICE ColumnPlace place(int64_t element) const {
    uint32_t rest = static_cast<uint32_t>(element);
    uint32_t channel = rest;
    rest = by_block_channels.split(channel);
    uint32_t tap = rest;
    rest = by_taps.split(tap);
    uint32_t block = rest;
    const uint32_t pixel = by_blocks.split(block);
    channel += block * static_cast<uint32_t>(block_channels);
    return {pixel, tap, channel, by_deform_channels.quotient(channel)};
  }

  D2_DEFORM_HOST_DEVICE int64_t element(int64_t pixel, int64_t tap, int64_t channel) const {
    const int64_t block = by_block_channels.quotient(static_cast<uint32_t>(channel));
    return ((pixel * blocks + block) * taps + tap) * block_channels + channel -
           block * block_channels;
  }
};

// The sampled values of N neighbouring channels: value = sum of weight * cell.
template <typename S, typename T, int N>
D2_DEFORM_HOST_DEVICE void sample_channels(
    const Array<const S>& input,  // (N, H, W, C)
    const ConvShape& s,
    const TapSample<T>& sample,
    int64_t channel,
    T (&value)[N]) {
  for (int j = 0; j < N; ++j) value[j] = T(0);
  T weight[4];
  sample.weights(weight);
  for (int corner = 0; corner < 4; ++corner) {
    const int64_t cell = sample.where.index[corner];
    if (cell < 0) continue;
    T neighbour[N];
    input.load((sample.image * s.cells() + cell) * s.in_channels + channel, neighbour);
    for (int j = 0; j < N; ++j) value[j] += weight[corner] * neighbour[j];
  }
}

// Columns of a chunk: a thread gathers N channels of one pixel and tap.
template <typename S, typename T, int N>
struct GatherColumns {
  Sampling<T> sampling;
  ColumnLayout layout;
  int64_t first_pixel;
  Array<const S> input;   // (N, H, W, C)
  Array<const S> factor;  // (pixels of the batch, C) that multiplies, or none
  Array<S> columns;

  D2_DEFORM_HOST_DEVICE void operator()(int64_t i) const {
    const ColumnPlace place = layout.place(i * N);
    const int64_t pixel = first_pixel + place.pixel;
    const TapSample<T> sample = sampling.at(pixel, place.deform_group, place.tap);
    T value[N];
    sample_channels(input, sampling.shape, sample, place.channel, value);
    if (factor.exists()) {
      T by[N];
      factor.load(pixel * sampling.shape.in_channels + place.channel, by);
      for (int j = 0; j < N; ++j) value[j] *= by[j];
    }
    columns.store(i * N, value);
  }
};

// A depthwise convolution needs no columns: a thread sums the taps of N channels of one pixel.
template <typename S, typename T, int N>
struct DepthwiseForward {
  Sampling<T> sampling;
  Divider<uint64_t> by_channels;
  Divider<uint32_t> by_deform_channels;
  Array<const S> input;   // (N, H, W, C)
  Array<const S> weight;  // (taps, C)
  Array<S> output;        // (pixels of the batch, C)

  D2_DEFORM_HOST_DEVICE void operator()(int64_t i) const {
    const ConvShape& s = sampling.shape;
    uint64_t channel = static_cast<uint64_t>(i * N);
    const int64_t pixel = static_cast<int64_t>(by_channels.split(channel));
    const int64_t deform_group = by_deform_channels.quotient(static_cast<uint32_t>(channel));
    T sum[N] = {};
    for (int64_t tap = 0; tap < s.taps(); ++tap) {
      const TapSample<T> sample = sampling.at(pixel, deform_group, tap);
      if (!sample.where.inside) continue;
      T value[N], w[N];
      sample_channels(input, s, sample, static_cast<int64_t>(channel), value);
      weight.load(tap * s.in_channels + static_cast<int64_t>(channel), w);
      for (int j = 0; j < N; ++j) sum[j] += w[j] * value[j];
    }
    output.store(i * N, sum);
  }
};

// Gradient of a depthwise convolution's columns: a thread does N channels of one pixel and tap.
template <typename S, typename T, int N>
struct DepthwiseColumnGradient {
  ColumnLayout layout;
  int64_t first_pixel;
  Array<const S> grad_output;  // (pixels of the batch, C)
  Array<const S> weight;       // (taps, C)
  Array<S> grad_columns;

  D2_DEFORM_HOST_DEVICE void operator()(int64_t i) const {
    const ColumnPlace place = layout.place(i * N);
    T gradient[N], w[N];
    grad_output.load((first_pixel + place.pixel) * layout.block_channels + place.channel, gradient);
    weight.load(place.tap * layout.block_channels + place.channel, w);
    for (int j = 0; j < N; ++j) gradient[j] *= w[j];
    grad_columns.store(i * N, gradient);
  }
};

}  // namespace d2_deform::cuda
